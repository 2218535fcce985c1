"""The contract's terms: tensors, stages, steps, ops, and the `Method` in which a detector declares its own.

Networks, ONNX files, engines, `config.pbtxt`, golden files, the runner and the docs are derived from the declarations
in `m3ad.methods` or checked against them; no other file spells a tensor's shape or dtype.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from m3ad.errors import ArtifactError

CONTRACT_VERSION = 4  # raised with every change of a stage's tensors or of the files in a bundle
IMAGE_SIZE = 224
MIN_POINTS = 1024
MAX_POINTS = IMAGE_SIZE * IMAGE_SIZE
MAX_SIZE = 2**20  # of any other dimension: a damaged manifest must not ask for more memory than there is
# The dynamic dimensions: N foreground points, R scored pixels.
LETTERS = {"N": range(MIN_POINTS, MAX_POINTS + 1), "R": range(1, MAX_POINTS + 1)}

Layout = Literal["chain", "fused"]
LAYOUTS: tuple[Layout, ...] = ("chain", "fused")  # the one to read and to debug, the one to ship


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the contract; a dimension is a number or the letter N (foreground points) or R (scored pixels).

    `values` is what its values must be besides: `finite`, or `pixels` of the grid, each at most once and ascending.
    """

    name: str
    dims: tuple[int | str, ...]
    dtype: Literal["float32", "int32"] = "float32"
    unit: str = ""
    values: Literal["any", "finite", "pixels"] = "any"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape with -1 for the dynamic dimensions N and R."""
        return tuple(-1 if isinstance(d, str) else d for d in self.dims)

    def mismatch(self, array: np.ndarray[Any, Any]) -> str | None:
        """Say in a few words how `array` differs from this tensor, or None when it fits."""
        fits = array.ndim == len(self.dims) and all(
            got in LETTERS[want] if isinstance(want, str) else want == got
            for want, got in zip(self.dims, array.shape, strict=True)
        )
        if fits and array.dtype == self.dtype:
            return self._wrong_values(array)
        dims = ", ".join(str(d) for d in self.dims)
        sizes = "".join(
            f", {d} in {LETTERS[d].start}..{LETTERS[d][-1]}" for d in self.dims if isinstance(d, str)
        )
        return f"`{self.name}` is {array.dtype} {list(array.shape)}, expected {self.dtype} [{dims}]{sizes}"

    def _wrong_values(self, array: np.ndarray[Any, Any]) -> str | None:
        if self.values == "finite" and not np.isfinite(array).all():
            bad = np.count_nonzero(~np.isfinite(array))
            return f"`{self.name}` holds {bad} values that are NaN or infinite, expected finite ones"
        if self.values == "pixels" and len(array):
            if array.min() < 0 or array.max() >= MAX_POINTS:
                return f"`{self.name}` holds {array.min()}..{array.max()}, expected pixels in 0..{MAX_POINTS - 1}"
            if (wrong := array[1:] <= array[:-1]).any():
                first, second = array[wrong.argmax() :][:2]
                return f"`{self.name}` holds {second} after {first}, expected each pixel once, in ascending order"
        return None


def mismatch(tensors: Iterable[Tensor], arrays: Mapping[str, np.ndarray[Any, Any]]) -> str | None:
    """Say in a few words how the arrays differ from the tensors, or None when they fit and agree in N and R."""
    sizes: dict[str, tuple[int, str]] = {}
    for tensor in tensors:
        if tensor.name not in arrays:
            return f"`{tensor.name}` is needed, it was not given"
        if problem := tensor.mismatch(arrays[tensor.name]):
            return problem
        for letter, size in zip(tensor.dims, arrays[tensor.name].shape, strict=True):
            if isinstance(letter, str):
                first, name = sizes.setdefault(letter, (size, tensor.name))
                if first != size:
                    return (
                        f"`{tensor.name}` has {size} rows but `{name}` {first}, expected as many ({letter})"
                    )
    return None


@dataclass(frozen=True, slots=True)
class Stage:
    """A model of the chain: its name and the tensors that go in and come out, in order."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One use of a stage in a layout: stage tensor name -> name of the value in the pipeline."""

    stage: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dims:
    """The sizes a bundle fixes, and where sampling may not start; everything else in the contract follows.

    A size of which a method has no tensor keeps its default.
    `min_norm_sq` is FarthestPointSample's: positive, it keeps points this near to the origin from being sampled.
    """

    rgb_tokens: int = 784  # 28 x 28 for DINO ViT-B/8, row-major
    rgb_width: int = 768
    groups: int = 1024
    group_size: int = 32
    xyz_width: int = 1152
    mentor_width: int = 256
    score_maps: int = 7  # rgb, xyz, mentor and each voting term
    min_norm_sq: float = 0.0

    def __post_init__(self) -> None:
        sizes = {name: value for name, value in asdict(self).items() if name != "min_norm_sq"}
        if odd := [name for name, value in sizes.items() if not 1 <= value <= MAX_SIZE]:
            raise ValueError(f"{odd[0]} must lie in 1..{MAX_SIZE}, got {sizes[odd[0]]}")
        if not 0 <= self.min_norm_sq < math.inf:
            raise ValueError(f"min_norm_sq must be a number from 0 on, got {self.min_norm_sq}")
        side = math.isqrt(self.rgb_tokens)
        if side * side != self.rgb_tokens:
            raise ValueError(f"rgb_tokens must be a square number, got {self.rgb_tokens}")
        if not 1 <= self.group_size <= MIN_POINTS or not 1 <= self.groups <= MIN_POINTS:
            raise ValueError(
                f"groups and group_size must lie in 1..{MIN_POINTS}, got {self.groups} and {self.group_size}"
            )

    @property
    def rgb_side(self) -> int:
        """Tokens along one side of the image."""
        return math.isqrt(self.rgb_tokens)

    def to_json(self) -> dict[str, float]:
        """The sizes as they stand in a bundle's manifest."""
        return asdict(self)


# What comes out of every pipeline: an inspection needs the first two; score_maps explain a verdict, for the evaluation.
PIPELINE_OUTPUTS = ("anomaly_map", "score", "score_maps")


@dataclass(frozen=True, slots=True)
class Use:
    """One use of a stage in a layout; a tensor that is not renamed is a value of its own name."""

    stage: str
    renamed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CpuForm:
    """How a stage runs on a CPU, where the graph that holds custom ops (`<stage>.onnx`) does not.

    Attributes:
        kind: `graph` runs the one file; `grouped` samples and groups the cloud before it; `interpolated` spreads the
            tokens over the scored pixels and has no file; `tiled` runs a file on the tokens, one on tiles of rows, and
            one on the scores; `pixel_layer` runs a file behind a layer that has a weight for each pixel of the grid.
        files: below the bundle's `onnx/`, the graphs first.
    """

    kind: Literal["graph", "grouped", "interpolated", "tiled", "pixel_layer"]
    files: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Pair:
    """What a score compares: a feature, and the blocks of columns of its reconstruction."""

    feature: str
    reconstructed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DenseGraph:
    """An ONNX file without custom ops, `<name>.onnx`.

    Attributes:
        layouts: whose it is part of.
        axis: what it is run over: a whole frame, rows of features each by itself, or the maps of scores, where it has
            no product with weights.
        may_quantize: whether a precision plan is written into it.
    """

    name: str
    layouts: tuple[Layout, ...] = LAYOUTS
    axis: Literal["frame", "rows", "map"] = "frame"
    may_quantize: bool = True


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Method:
    """A detector as everything but its training sees it.

    Attributes:
        name: as in a manifest and on the command line.
        title: as in a table.
        inputs: of the pipeline, names of `preprocess.ModelInput`'s tensors.
        stages: sizes -> the rows of its table, by name.
        layouts: its wirings; the last one is the one to ship.
        cpu: stage -> its form on a CPU.
        graphs: every dense ONNX file, in the order in which a frame meets them.
        pairs: of the fused head, one a row of scores.
        groups: layers that a precision plan treats alike: name -> pattern in `<graph>:<node>`.
        score_maps: how many a frame has, None where the detector's settings decide.
        group_size: neighbours in a group, as published.
    """

    name: str
    title: str
    inputs: tuple[str, ...]
    stages: Callable[[Dims], dict[str, Stage]]
    layouts: Mapping[Layout, tuple[Use, ...]]
    cpu: Mapping[str, CpuForm]
    graphs: tuple[DenseGraph, ...]
    pairs: tuple[Pair, ...] = ()
    groups: Mapping[str, str] = field(default_factory=dict)
    score_maps: int | None = None
    group_size: int = 32

    def graphs_in(self, stage: str) -> list[str]:
        """The dense graphs of a stage, by the names of the plain ones: a CPU has the encoder in row tiles."""
        stems = [file.removesuffix(".onnx") for file in self.cpu[stage].files if file.endswith(".onnx")]
        return [stem.removesuffix("_cpu") for stem in stems]

    def works_by_rows(self, stage: str) -> bool:
        """Whether each row of a stage's outputs follows from that row of its inputs alone."""
        axes = {graph.name: graph.axis for graph in self.graphs}
        form = self.cpu[stage]
        return form.kind in ("interpolated", "tiled") or (
            form.kind == "graph" and axes[self.graphs_in(stage)[0]] == "rows"
        )

    def graphs_of(self, layouts: Iterable[Layout]) -> list[DenseGraph]:
        """The dense graphs of some layouts."""
        chosen = set(layouts)
        return [graph for graph in self.graphs if chosen.intersection(graph.layouts)]


@dataclass(frozen=True, slots=True)
class Contract:
    """What crosses the stage boundaries of one detector: its method with its sizes."""

    method: Method
    dims: Dims

    @property
    def stages(self) -> dict[str, Stage]:
        """Every stage of every layout, by name."""
        return self.method.stages(self.dims)

    def steps(self, layout: Layout) -> tuple[Step, ...]:
        """The wiring of a layout.

        Raises:
            ArtifactError: the method has no such layout.
        """
        if layout not in self.method.layouts:
            raise ArtifactError(
                f"{self.method.name} has no layout {layout!r}, expected one of {', '.join(self.method.layouts)}"
            )
        table = self.stages
        return tuple(
            Step(
                use.stage,
                {t.name: use.renamed.get(t.name, t.name) for t in table[use.stage].inputs},
                {t.name: use.renamed.get(t.name, t.name) for t in table[use.stage].outputs},
            )
            for use in self.method.layouts[layout]
        )

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What a client sends, whatever the layout."""
        by_name = self._tensors()
        if "image" in by_name:
            by_name["image"] = replace(by_name["image"], values="finite")
        return tuple(by_name[name] for name in self.method.inputs)

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """What it can ask for, in the order of PIPELINE_OUTPUTS."""
        by_name = self._tensors()
        return tuple(by_name[name] for name in PIPELINE_OUTPUTS)

    def _tensors(self) -> dict[str, Tensor]:
        return {t.name: t for stage in self.stages.values() for t in (*stage.inputs, *stage.outputs)}


@dataclass(frozen=True, slots=True)
class Op:
    """A custom op of ONNX domain `m3ad`; `version` is its plugin's and rises when its tensors change."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, type]
    version: int = 1


OP_DOMAIN = "m3ad"
OP_VERSION = 2  # of the domain: the highest version of an op in it
OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op(
            "FarthestPointSample",
            ("points", "point_pixel"),
            ("idx",),
            {"num_samples": int, "min_norm_sq": float},
            version=2,
        ),
        Op("KnnGroup", ("points", "idx"), ("neighborhood", "knn_idx"), {"group_size": int}),
        Op(
            "TokenInterpolate",
            ("points", "point_pixel", "centers", "tokens", "scored_pixel"),
            ("rows",),
            {"image_size": int},
            version=2,
        ),
        Op(
            "OneClassSvm",
            ("x", "support_vectors", "coefficients", "rho"),
            ("decision",),
            {"kernel": str, "gamma": float},
        ),
    )
}
