"""What a detector declares of itself (`Method`), and the contract that follows from it for some sizes (`Contract`)."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from m3ad.contract import LAYOUTS, Dims, Geometry, Layout, Stage, Step, Tensor
from m3ad.errors import ArtifactError
from m3ad.scored import Lattice

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
        kind: `graph` runs the one file; `grouped` samples and groups the cloud before it; `patches` does that alone and
            has no file; `interpolated` spreads the tokens over the scored pixels and has none either, nor has `cells`,
            which spreads them over a coarser grid; `tiled` runs a file on the tokens, one on tiles of rows, and one on
            the scores; `pixel_layer` runs a file behind a layer that has a weight for each pixel of the grid;
            `windowed` runs a file on the part of the grid that the scored pixels depend on; `halves` runs a file on
            RGB tokens and one on the cells that are not empty; `nearest` finds the nearest rows of banks, whose graph
            is for engines, itself.
        files: below the bundle's `onnx/`, the graphs first.
        output_size: of `cells`, the side of its grid.
        window: of `windowed`, consecutive row-major pixels that see each other; divides 50176.
        reach: of `windowed`, pixels to each side that the convolutions behind the windows look at.
    """

    kind: Literal[
        "graph",
        "grouped",
        "patches",
        "interpolated",
        "cells",
        "tiled",
        "pixel_layer",
        "windowed",
        "halves",
        "nearest",
    ]
    files: tuple[str, ...] = ()
    output_size: int = 0
    window: int = 0
    reach: int = 0


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
        backbones: the frozen encoders, where they are others than its geometry and inputs say.
        takes_lattice: whether fewer than all pixels may be scored: its score maps are smoothed by f last, and no
            network reads the rows of all pixels.
        chooses: whether its stages choose rows of a memory by which another is rebuilt: two that are nearly as near may
            change places with any rounding, and a few values with them.
        geometry: what its networks see of the cloud; the frame is prepared accordingly.
        plane: removal of the background, as published; `m3ad-export train --plane` overrides it.
        plane_distance_m: how far off the background the part begins, as published.
        reduced: settings of a training that a CPU does in minutes, for a table whose bundles are made on the way.
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
    backbones: tuple[str, ...] = ()
    takes_lattice: bool = False
    chooses: bool = False
    geometry: Geometry = "points"
    plane: Literal["none", "corners"] = "none"
    plane_distance_m: float = 0.005
    reduced: Mapping[str, int] = field(default_factory=dict)

    @property
    def encoders(self) -> tuple[str, ...]:
        """Which frozen encoders it takes: `efficientnet` or `teacher` of images, or `rgb` and `xyz` of tokens."""
        if self.backbones:
            return self.backbones
        if self.geometry == "relief":
            return ("efficientnet",)
        if self.geometry != "points":
            return ("teacher",)
        reads = {"rgb": "image", "xyz": "points"}
        return tuple(side for side, name in reads.items() if name in self.inputs)

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
    """What crosses the stage boundaries of one detector: its method with its sizes and its lattice.

    Raises:
        ArtifactError: the method scores every pixel and the lattice is another.
    """

    method: Method
    dims: Dims
    lattice: Lattice = "all"

    def __post_init__(self) -> None:
        require_lattice(self.method, self.lattice)

    @property
    def stages(self) -> dict[str, Stage]:
        """Every stage of every layout, by name.

        With a lattice the vote takes `point_pixel` too: all the pixels that the scored ones stand for follow from it.
        """
        table = self.method.stages(self.dims)
        if self.lattice == "all":
            return table
        (pixel,) = {t for stage in table.values() for t in stage.inputs if t.name == "point_pixel"}
        return {name: _with_input(stage, pixel) for name, stage in table.items()}

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
        for name in ("image", "fpfh", "depth_image", "relief", "relief_mask"):
            if name in by_name:
                by_name[name] = replace(by_name[name], values="finite")
        return tuple(by_name[name] for name in self.method.inputs)

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """What it can ask for, in the order of PIPELINE_OUTPUTS."""
        by_name = self._tensors()
        return tuple(by_name[name] for name in PIPELINE_OUTPUTS)

    def _tensors(self) -> dict[str, Tensor]:
        return {t.name: t for stage in self.stages.values() for t in (*stage.inputs, *stage.outputs)}


def require_lattice(method: Method, lattice: Lattice) -> None:
    """Refuse a lattice that the method does not take.

    Raises:
        ArtifactError: it scores every pixel.
    """
    if lattice != "all" and not method.takes_lattice:
        raise ArtifactError(
            f"{method.title} scores every pixel, so its lattice must be all, got {lattice}; train without --lattice"
        )


def _with_input(stage: Stage, tensor: Tensor) -> Stage:
    """A stage that makes the map takes the tensor, if it does not already; any other one is as it was."""
    if tensor in stage.inputs or all(output.name != "anomaly_map" for output in stage.outputs):
        return stage
    return replace(stage, inputs=(*stage.inputs, tensor))
