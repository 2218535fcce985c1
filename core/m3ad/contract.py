"""The contract: every tensor that crosses a stage's wall, by name, shape and dtype, and how the stages are wired.

Networks, ONNX files, engines, `config.pbtxt`, golden files, the runner and the docs are derived from this table or
checked against it; no other file spells a tensor's shape or dtype. It knows nothing of files or runtimes.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

CONTRACT_VERSION = 4  # raised with every change of a wall or of the files in a bundle
IMAGE_SIZE = 224
MIN_POINTS = 1024
MAX_POINTS = IMAGE_SIZE * IMAGE_SIZE
MAX_SIZE = 2**20  # of any other dimension: a damaged manifest must not ask for more memory than there is
# The dynamic dimensions: N foreground points, R scored pixels.
LETTERS = {"N": range(MIN_POINTS, MAX_POINTS + 1), "R": range(1, MAX_POINTS + 1)}

Layout = Literal["chain", "fused"]
LAYOUTS: tuple[Layout, ...] = ("chain", "fused")
DEFAULT_LAYOUT: Layout = "fused"  # the one to ship; chain is the one to read and to debug


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


def stages(dims: Dims) -> dict[str, Stage]:
    """Every stage of both layouts for these sizes, by name."""
    size = IMAGE_SIZE
    # The stage does not look at its values: Triton's ensemble can wait for ever when its first step answers with an
    # error before the second is started. What is not finite makes tokens that are not, which the next stage refuses.
    image = Tensor("image", (1, 3, size, size), unit="ImageNet-normalised RGB")
    points = Tensor("points", ("N", 3), unit="m", values="finite")
    pixel = "row-major pixel of the 224 x 224 grid"
    point_pixel = Tensor("point_pixel", ("N",), "int32", unit=pixel, values="pixels")
    rgb_tokens = Tensor("rgb_tokens", (dims.rgb_tokens, dims.rgb_width), values="finite")
    centers = Tensor("centers", (dims.groups, 3), unit="m")
    xyz_tokens = Tensor("xyz_tokens", (dims.groups, dims.xyz_width))
    scored_pixel = Tensor("scored_pixel", ("R",), "int32", unit=pixel, values="pixels")
    rgb = Tensor("rgb_features", ("R", dims.rgb_width))
    xyz = Tensor("xyz_features", ("R", dims.xyz_width))
    mentor = Tensor("mentor", ("R", dims.mentor_width))
    rgb_rec = Tensor("rgb_reconstructed", ("R", dims.rgb_width))
    xyz_rec = Tensor("xyz_reconstructed", ("R", dims.xyz_width))
    mentor_rec = Tensor("mentor_reconstructed", ("R", dims.mentor_width))
    anomaly_map = Tensor("anomaly_map", (size, size), unit="one-class SVM decision, larger is more anomalous")
    score = Tensor("score", (1,), unit="largest value of anomaly_map")
    tokens = (rgb_tokens, centers, xyz_tokens, points, point_pixel, scored_pixel)
    score_maps = Tensor(
        "score_maps",
        (dims.score_maps, size, size),
        unit="1 - cos in multiples of the expected, smoothed; named in the manifest",
    )
    verdict = (anomaly_map, score, score_maps)
    table = (
        Stage("rgb_extractor", (image,), (rgb_tokens,)),
        Stage("xyz_extractor", (points,), (centers, xyz_tokens)),
        Stage("project", tokens, (rgb, xyz)),
        Stage("mfm", (rgb, xyz), (mentor,)),
        Stage("mgm", (rgb, xyz, mentor), (rgb_rec, xyz_rec)),
        Stage("vm", (rgb, rgb_rec, xyz, xyz_rec, mentor, mentor_rec, scored_pixel), verdict),
        Stage("head", tokens, verdict),
    )
    return {stage.name: stage for stage in table}


# The pipeline's own inputs and outputs: what a client sends and can ask for, whatever the layout. An inspection needs
# the first two outputs; score_maps explain a verdict and feed the evaluation.
PIPELINE_INPUTS = ("image", "points", "point_pixel", "scored_pixel")
PIPELINE_OUTPUTS = ("anomaly_map", "score", "score_maps")


def pipeline_tensors(dims: Dims) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Inputs and outputs of the whole pipeline, in the order of PIPELINE_INPUTS and PIPELINE_OUTPUTS."""
    by_name = {t.name: t for stage in stages(dims).values() for t in (*stage.inputs, *stage.outputs)}
    by_name["image"] = replace(by_name["image"], values="finite")
    return tuple(by_name[n] for n in PIPELINE_INPUTS), tuple(by_name[n] for n in PIPELINE_OUTPUTS)


def _step(dims: Dims, stage: str, **renamed: str) -> Step:
    table = stages(dims)[stage]
    return Step(
        stage,
        {t.name: renamed.get(t.name, t.name) for t in table.inputs},
        {t.name: renamed.get(t.name, t.name) for t in table.outputs},
    )


def steps(dims: Dims, layout: Layout) -> tuple[Step, ...]:
    """The wiring of a layout: extractors -> MFM -> MGM -> MFM -> VM as `chain`, extractors -> head as `fused`.

    Raises:
        ValueError: the layout is neither.
    """
    extractors = (_step(dims, "rgb_extractor"), _step(dims, "xyz_extractor"))
    if layout == "fused":
        return (*extractors, _step(dims, "head"))
    if layout != "chain":
        raise ValueError(f"unknown layout {layout!r}, expected one of {', '.join(LAYOUTS)}")
    again = {
        "rgb_features": "rgb_reconstructed",
        "xyz_features": "xyz_reconstructed",
        "mentor": "mentor_reconstructed",
    }
    return (
        *extractors,
        _step(dims, "project"),
        _step(dims, "mfm"),
        _step(dims, "mgm"),
        _step(dims, "mfm", **again),
        _step(dims, "vm"),
    )


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
        Op("FarthestPointSample", ("points",), ("idx",), {"num_samples": int, "min_norm_sq": float}),
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
