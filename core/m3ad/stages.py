"""The stages of the contract on a CPU: ONNX Runtime for the dense parts, the custom ops between them.

A stage is a callable from named arrays to named arrays. The in-process pipeline and the Triton stage models run the
same ones. Which ONNX files a stage reads is known here alone; how they are made, in the export room.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from m3ad.contract import IMAGE_SIZE, Dims, Stage, mismatch, stages
from m3ad.onnx_graph import Arrays, OnnxGraph

StageFunction = Callable[[Arrays], dict[str, npt.NDArray[Any]]]
FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]
Named = TypeVar("Named")

# Files the CPU needs per stage, the ONNX graph first. The graph with the custom ops in it (`<stage>.onnx`) is for
# TensorRT and any other ONNX runtime; here its plugin-free part is run and the ops are called between.
CPU_FILES: dict[str, tuple[str, ...]] = {
    "rgb_extractor": ("rgb_extractor.onnx",),
    "xyz_extractor": ("xyz_encoder_cpu.onnx", "xyz_encoder.weights"),
    "project": (),
    "mfm": ("mfm.onnx",),
    "mgm": ("mgm.onnx",),
    "vm": ("vm.onnx",),
    "head": ("head_tokens.onnx", "head_rows.onnx", "head_vote.onnx"),
}

# What the head's scores compare: a modality's turned features, and the blocks of columns of their reconstruction.
TURNED = {"rgb": "rgb_turned", "xyz": "xyz_turned"}
BLOCKS = {side: tuple(f"{side}_reconstructed_{part}" for part in ("read", "rest")) for side in TURNED}

# All threads' tiles together, so that a machine of many cores needs no more memory; but a product of few rows is slow.
ROWS_IN_FLIGHT, LEAST_TILE_ROWS = 4096, 128


class Operator(Protocol):
    """A sparse linear map from tokens to rows, as `m3ad_plugins.ops` builds it."""

    @property
    def scored_pixel(self) -> IntArray:
        """[R] the row-major pixel of each row."""

    def apply(self, tokens: FloatArray) -> FloatArray:
        """All rows of the map applied to tokens [G, D]."""

    def interpolated(self, tokens: FloatArray) -> Any:
        """The same, formed when `write(start, out, threads)` or `cosine_scores` asks for some of the rows."""

    def tiles(self, tables: Mapping[str, FloatArray], rows: int) -> Iterator[dict[str, FloatArray]]:
        """The map applied to each table [G, D], at most `rows` rows at a time; the next tile overwrites them."""


class Ops(Protocol):
    """The custom ops a CPU stage calls: `m3ad_plugins.ops`, handed in because core imports no other room."""

    def point_group(
        self, points: FloatArray, num_samples: int, group_size: int, min_norm_sq: float = 0.0
    ) -> tuple[IntArray, FloatArray, IntArray]:
        """Both in one pass: points [N, 3] -> idx [G], neighborhood [G, S, 3], knn_idx [G, S]."""

    def farthest_point_sample(
        self,
        points: FloatArray,
        num_samples: int,
        min_norm_sq: float = 0.0,
        point_pixel: IntArray | None = None,
    ) -> IntArray:
        """points [N, 3] -> idx [num_samples]."""

    def knn_group(self, points: FloatArray, idx: IntArray, group_size: int) -> tuple[FloatArray, IntArray]:
        """points [N, 3], idx [G] -> neighborhood [G, S, 3], knn_idx [G, S]."""

    def interpolation_operator(
        self,
        points: FloatArray,
        point_pixel: IntArray,
        centers: FloatArray,
        scored_pixel: IntArray,
        image_size: int = IMAGE_SIZE,
    ) -> Operator:
        """The operator from group tokens [G, D] to the rows of the scored pixels."""

    def cosine_scores(
        self,
        features: Sequence[Any],
        reconstructed: Sequence[Sequence[FloatArray]],
        start: int = 0,
        threads: int | None = None,
    ) -> FloatArray:
        """n features [R, D_n], or interpolated rows from `start` on, and their reconstructions -> scores [n, R].

        A reconstruction is given as its blocks of columns.
        """

    def SparseRows(  # noqa: N802  (a class of the ops module)
        self, indptr: IntArray, indices: IntArray, weights: FloatArray, scored_pixel: IntArray, groups: int
    ) -> Operator:
        """An operator from its compressed rows."""


def bilinear_taps(side: int) -> tuple[npt.NDArray[np.int32], FloatArray]:
    """The two tokens and weights that each of 224 pixels takes along one axis, align_corners=False.

    Returns:
        taps [224, 2] int32 in 0..side-1 and weights [224, 2] float32, which sum to 1.
    """
    source = np.maximum((np.arange(IMAGE_SIZE) + 0.5) * (side / IMAGE_SIZE) - 0.5, 0)
    low = np.minimum(np.floor(source), side - 1)
    taps = np.stack([low, np.minimum(low + 1, side - 1)], axis=1)
    part = source - low
    return taps.astype(np.int32), np.stack([1 - part, part], axis=1).astype(np.float32)


def bilinear_operator(side: int, scored_pixel: IntArray, ops: Ops) -> Operator:
    """The operator from image tokens [side * side, D], row-major, to the rows of the scored pixels."""
    taps, weights = bilinear_taps(side)
    y, x = np.divmod(scored_pixel, IMAGE_SIZE)
    indices = (taps[y][:, :, None] * side + taps[x][:, None, :]).reshape(-1)
    products = (weights[y][:, :, None] * weights[x][:, None, :]).reshape(-1)
    indptr = np.arange(0, len(indices) + 1, 4, dtype=np.int32)
    return ops.SparseRows(indptr, indices, products, scored_pixel, side * side)


def operators(arrays: Arrays, rgb_side: int, ops: Ops) -> tuple[Operator, Operator]:
    """What spreads the RGB tokens and what spreads the XYZ tokens over the scored pixels."""
    scored_pixel = arrays["scored_pixel"]
    return (
        bilinear_operator(rgb_side, scored_pixel, ops),
        ops.interpolation_operator(arrays["points"], arrays["point_pixel"], arrays["centers"], scored_pixel),
    )


class XyzExtractor:
    """points -> farthest point sampling -> KNN groups -> Point-MAE encoder -> centers, xyz_tokens."""

    def __init__(self, folder: Path, dims: Dims, ops: Ops, threads: int) -> None:
        self.dims, self.ops = dims, ops
        self.encoder = OnnxGraph(folder / CPU_FILES["xyz_extractor"][0], threads)

    def __call__(self, arrays: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Group the cloud and encode the groups."""
        points = arrays["points"]
        dims = self.dims
        idx, neighborhood, _ = self.ops.point_group(points, dims.groups, dims.group_size, dims.min_norm_sq)
        centers = points[idx]
        tokens = self.encoder({"neighborhood": neighborhood, "centers": centers})
        return {"centers": centers, **tokens}


class Project:
    """Tokens of both modalities -> one row of features per scored pixel."""

    def __init__(self, dims: Dims, ops: Ops) -> None:
        self.dims, self.ops = dims, ops

    def __call__(self, arrays: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Interpolate both token sets at the scored pixels."""
        rgb, xyz = operators(arrays, self.dims.rgb_side, self.ops)
        return {
            "rgb_features": rgb.apply(arrays["rgb_tokens"]),
            "xyz_features": xyz.apply(arrays["xyz_tokens"]),
        }


class Head:
    """Tokens of both modalities -> anomaly_map, score, score_maps, in tiles of rows (the fused layout).

    Each thread takes tiles of its own: all the threads on one tile would wait for each other after every layer, and for
    what ONNX Runtime does on one of them.
    """

    def __init__(self, folder: Path, dims: Dims, ops: Ops, threads: int) -> None:
        self.dims, self.ops, self.threads = dims, ops, threads
        tokens, rows, vote = (folder / file for file in CPU_FILES["head"])
        self.tokens, self.rows, self.vote = (
            OnnxGraph(tokens, threads),
            OnnxGraph(rows, 1),
            OnnxGraph(vote, threads),
        )
        self.tile_rows = min(self.rows.tile_rows, max(ROWS_IN_FLIGHT // threads, LEAST_TILE_ROWS))
        self.pool = ThreadPoolExecutor(threads, "head")
        self.own = threading.local()  # each thread's buffers, kept

    def __call__(self, arrays: Arrays) -> dict[str, npt.NDArray[Any]]:
        """First layers on the tokens, then every scored pixel, a tile at a time."""
        rgb, xyz = operators(arrays, self.dims.rgb_side, self.ops)
        tables = zip((rgb, xyz), by_modality(self.tokens(arrays)), strict=True)
        rows = {name: operator.interpolated(t) for operator, each in tables for name, t in each.items()}
        scores = np.empty((3, len(arrays["scored_pixel"])), np.float32)
        size = tile_size(scores.shape[1], self.tile_rows, self.threads)
        starts = iter(range(0, scores.shape[1], size))
        list(self.pool.map(lambda _: self.run_tiles(starts, size, rows, scores), range(self.threads)))
        return self.vote({"scores": scores, "scored_pixel": arrays["scored_pixel"]})

    def run_tiles(
        self, starts: Iterator[int], size: int, rows: Mapping[str, Any], scores: FloatArray
    ) -> None:
        """Score the tiles that other threads leave, on this thread alone.

        Every tile of a frame is run at full size, the last one with old rows at its end: blocks of one size fit where
        the last ones were, so memory stays what it was.
        """
        if not hasattr(self.own, "buffers"):
            values = (*self.rows.session.get_inputs(), *self.rows.session.get_outputs())
            self.own.buffers = {v.name: np.zeros((self.tile_rows, v.shape[1]), np.float32) for v in values}
        tile = {name: buffer[:size] for name, buffer in self.own.buffers.items()}
        for start in starts:
            count = min(size, scores.shape[1] - start)
            for name in self.rows.inputs:
                rows[name].write(start, tile[name][:count], 1)
            self.rows.run_into(tile)
            made = {name: tile[name][:count] for name in self.rows.outputs}
            scores[:, start : start + count] = head_scores(rows, made, self.ops, start, 1)


def tile_size(count: int, most: int, threads: int) -> int:
    """Rows of a tile, at most `most`, so that `count` rows are as many tiles for each thread, all but the last full.

    Threads that take one after another finish together, and one that is held up leaves the rest to the others.
    """
    tiles = -(-count // (most * threads)) * threads
    return -(-count // tiles) if tiles else 1


def by_modality(tables: Mapping[str, Named]) -> tuple[dict[str, Named], dict[str, Named]]:
    """What belongs to the RGB tokens and what to the XYZ tokens: the head's tables begin with their modality's name."""
    rgb, xyz = ({n: t for n, t in tables.items() if n.startswith(p)} for p in ("rgb", "xyz"))
    return rgb, xyz


def head_scores(
    turned: Mapping[str, Any], made: Arrays, ops: Ops, start: int = 0, threads: int | None = None
) -> FloatArray:
    """Rows of `*_turned` and what `head_rows` made of their first layers -> scores [3, T]: RGB, XYZ, mentor (Eq. 5)."""
    features = [*(turned[name] for name in TURNED.values()), made["mentor"]]
    blocks = [*([made[name] for name in names] for names in BLOCKS.values()), [made["mentor_reconstructed"]]]
    return ops.cosine_scores(features, blocks, start, threads)


class CheckedStage:
    """A stage that refuses inputs which do not fit the contract, before any runtime sees them."""

    def __init__(self, stage: Stage, function: StageFunction) -> None:
        self.stage, self.function = stage, function

    def __call__(self, arrays: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Check, run, and return the outputs the contract names.

        Raises:
            ValueError: an input is missing, or has another shape, dtype or values than the contract says.
        """
        if problem := mismatch(self.stage.inputs, arrays):
            raise ValueError(f"stage {self.stage.name}: {problem}")
        results = self.function(arrays)
        return {tensor.name: results[tensor.name] for tensor in self.stage.outputs}


def cpu_stage(name: str, folder: Path, dims: Dims, ops: Ops, threads: int) -> StageFunction:
    """The stage `name` on the CPU, its ONNX files read from `folder`.

    Raises:
        ArtifactError: an ONNX file of the stage is missing.
        MissingDependencyError: ONNX Runtime is not installed.
    """
    function: StageFunction
    if name == "xyz_extractor":
        function = XyzExtractor(folder, dims, ops, threads)
    elif name == "project":
        function = Project(dims, ops)
    elif name == "head":
        function = Head(folder, dims, ops, threads)
    else:
        function = OnnxGraph(folder / CPU_FILES[name][0], threads)
    return CheckedStage(stages(dims)[name], function)
