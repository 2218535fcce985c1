"""The stages of the contract on a CPU: ONNX Runtime for the dense graphs, the custom ops between them.

A stage is a callable from named arrays to named arrays. The in-process pipeline and the Triton stage models run the
same ones. Which form a stage has and which files it reads, its method declares; the export room makes them.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from m3ad.contract import IMAGE_SIZE, MAX_POINTS, Dims, Stage, mismatch
from m3ad.method import Contract, Pair
from m3ad_plugins import ops
from m3ad_plugins.ops import SparseRows

from m3ad_runtime.banks import Cells, Halves, NearestBanks
from m3ad_runtime.onnx_graph import Arrays, OnnxGraph
from m3ad_runtime.refine import Refined
from m3ad_runtime.windows import Windowed

StageFunction = Callable[[Arrays], dict[str, npt.NDArray[Any]]]
FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]

# All threads' tiles together, so that a machine of many cores needs no more memory; but a product of few rows is slow.
ROWS_IN_FLIGHT, LEAST_TILE_ROWS = 4096, 128


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


def bilinear_operator(side: int, scored_pixel: IntArray) -> SparseRows:
    """The operator from image tokens [side * side, D], row-major, to the rows of the scored pixels."""
    taps, weights = bilinear_taps(side)
    y, x = np.divmod(scored_pixel, IMAGE_SIZE)
    indices = (taps[y][:, :, None] * side + taps[x][:, None, :]).reshape(-1)
    products = (weights[y][:, :, None] * weights[x][:, None, :]).reshape(-1)
    indptr = np.arange(0, len(indices) + 1, 4, dtype=np.int32)
    return SparseRows(indptr, indices, products, scored_pixel, side * side)


def operators(arrays: Arrays, dims: Dims) -> dict[str, SparseRows]:
    """What spreads the tokens of each modality that is there over the scored pixels: `rgb`, `xyz`."""
    scored_pixel = arrays["scored_pixel"]
    found = {}
    if "rgb_tokens" in arrays:
        found["rgb"] = bilinear_operator(dims.rgb_side, scored_pixel)
    if "xyz_tokens" in arrays:
        found["xyz"] = ops.interpolation_operator(
            arrays["points"], arrays["point_pixel"], arrays["centers"], scored_pixel
        )
    return found


def modality_of(name: str) -> str:
    """`rgb` or `xyz`: tokens, projected tokens and rows begin with their modality's name."""
    return name.partition("_")[0]


class GroupedEncoder:
    """points, point_pixel -> farthest point sampling -> KNN groups -> Point-MAE encoder -> centers, xyz_tokens."""

    def __init__(self, encoder: OnnxGraph, dims: Dims) -> None:
        self.encoder, self.dims = encoder, dims

    def feeds(self, arrays: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Sample and group the cloud: what the encoder reads."""
        points, dims = arrays["points"], self.dims
        idx, neighborhood, _ = ops.point_group(
            points, dims.groups, dims.group_size, dims.min_norm_sq, arrays["point_pixel"]
        )
        return {"neighborhood": neighborhood, "centers": points[idx]}

    def encode(self, grouped: Arrays) -> dict[str, npt.NDArray[Any]]:
        """The stage's outputs from what `feeds` made."""
        return {"centers": grouped["centers"], **self.encoder(grouped)}

    def __call__(self, arrays: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Group the cloud and encode the groups."""
        return self.encode(self.feeds(arrays))


class Patches:
    """points, point_pixel -> farthest point sampling -> KNN groups -> neighborhood, knn_idx."""

    def __init__(self, dims: Dims) -> None:
        self.dims = dims

    def __call__(self, arrays: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Sample and group the cloud."""
        dims = self.dims
        _, neighborhood, members = ops.point_group(
            arrays["points"], dims.groups, dims.group_size, dims.min_norm_sq, arrays["point_pixel"]
        )
        return {"neighborhood": neighborhood, "knn_idx": members}


class Interpolated:
    """Tokens of the modalities that the stage takes -> one row of features per scored pixel."""

    def __init__(self, dims: Dims) -> None:
        self.dims = dims

    def __call__(self, arrays: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Interpolate the tokens at the scored pixels."""
        spread = operators(arrays, self.dims)
        return {f"{side}_features": each.apply(arrays[f"{side}_tokens"]) for side, each in spread.items()}


class PixelLayer:
    """A layer with a weight for each pixel of the grid, W [50176, H], and a graph behind it.

    The layer reads X W_s with X [D, R] the features of the scored pixels s. From tokens that are spread by a sparse A,
    X = G^T A^T and so X W_s = G^T (A^T W_s): the rows are never formed.
    """

    def __init__(self, graph: OnnxGraph, weights: Path, dims: Dims) -> None:
        self.graph, self.dims = graph, dims
        self.weights = np.memmap(weights, np.float32, "r").reshape(MAX_POINTS, -1)

    def feeds(self, arrays: Arrays) -> dict[str, npt.NDArray[Any]]:
        """What the graph reads: `weights` [K, H] and `features` [K, D], K the scored pixels or the groups."""
        pixel = arrays["scored_pixel"]
        weights = self.weights[pixel]
        if "xyz_features" in arrays:
            return {"weights": weights, "features": arrays["xyz_features"], "scored_pixel": pixel}
        spread = operators(arrays, self.dims)["xyz"]
        return {
            "weights": transposed(spread).apply(weights),
            "features": arrays["xyz_tokens"],
            "scored_pixel": pixel,
        }

    def __call__(self, arrays: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Run the layer and the graph."""
        return self.graph(self.feeds(arrays))


def transposed(operator: SparseRows) -> SparseRows:
    """A^T of an operator A [R, G]: from rows of the scored pixels [R, D] to one row a group [G, D]."""
    count = np.diff(operator.indptr)
    order = np.argsort(operator.indices, kind="stable")
    rows = np.repeat(np.arange(len(count), dtype=np.int32), count)[order]
    indptr = np.concatenate([[0], np.bincount(operator.indices, minlength=operator.groups).cumsum()])
    groups = np.arange(operator.groups, dtype=np.int32)
    return SparseRows(indptr.astype(np.int32), rows, operator.weights[order], groups, len(count))


class TiledHead:
    """Tokens -> anomaly_map, score, score_maps, in tiles of rows (the fused layout).

    Each thread takes tiles of its own: all the threads on one tile would wait for each other after every layer, and for
    what ONNX Runtime does on one of them.
    """

    def __init__(
        self,
        tokens: OnnxGraph,
        rows: OnnxGraph,
        vote: OnnxGraph,
        dims: Dims,
        pairs: tuple[Pair, ...],
        threads: int,
    ) -> None:
        self.tokens, self.rows, self.vote = tokens, rows, vote
        self.dims, self.pairs, self.threads = dims, pairs, threads
        self.tile_rows = min(self.rows.tile_rows, max(ROWS_IN_FLIGHT // threads, LEAST_TILE_ROWS))
        self.pool = ThreadPoolExecutor(threads, "head")
        self.own = threading.local()  # each thread's buffers, kept

    def __call__(self, arrays: Arrays) -> dict[str, npt.NDArray[Any]]:
        """First layers on the tokens, then every scored pixel, a tile at a time."""
        pixels = {name: arrays[name] for name in ("scored_pixel", "point_pixel")}
        return self.vote({"scores": self.scores(arrays), **pixels})

    def projected_tokens(self, arrays: Arrays) -> dict[str, FloatArray]:
        """Everything that is spread over the pixels: the tokens themselves and what the first layers make of them."""
        own = {name: arrays[name] for name in ("rgb_tokens", "xyz_tokens")}
        return {**own, **self.tokens(arrays)}

    def spread(self, arrays: Arrays, projected: Mapping[str, FloatArray] | None = None) -> dict[str, Any]:
        """Rows of the scored pixels by name: spread tokens, formed when asked for, and rows that are given."""
        projected = self.projected_tokens(arrays) if projected is None else projected
        read = {*self.rows.inputs, *(pair.feature for pair in self.pairs)}
        by_side = operators(arrays, self.dims)
        tokens = {name: each for name, each in projected.items() if name in read}
        spread = {name: by_side[modality_of(name)].interpolated(each) for name, each in tokens.items()}
        given = {name for pair in self.pairs for name in pair.reconstructed} & arrays.keys()
        return {**spread, **{name: arrays[name] for name in given}}

    def scores(self, arrays: Arrays, projected: Mapping[str, FloatArray] | None = None) -> FloatArray:
        """1 - cos of each pair at each scored pixel: [pairs, R]; `projected_tokens` are made unless they are given."""
        rows = self.spread(arrays, projected)
        scores = np.empty((len(self.pairs), len(arrays["scored_pixel"])), np.float32)
        size = tile_size(scores.shape[1], self.tile_rows, self.threads)
        starts = iter(range(0, scores.shape[1], size))
        list(self.pool.map(lambda _: self.run_tiles(starts, size, rows, scores), range(self.threads)))
        return scores

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
            outputs = {name: tile[name][:count] for name in self.rows.outputs}
            scores[:, start : start + count] = pair_scores(self.pairs, rows, outputs, start, 1)


def tile_size(count: int, most: int, threads: int) -> int:
    """Rows of a tile, at most `most`, so that `count` rows are as many tiles for each thread, all but the last full.

    Threads that take one after another finish together, and one that is held up leaves the rest to the others.
    """
    tiles = -(-count // (most * threads)) * threads
    return -(-count // tiles) if tiles else 1


def pair_scores(
    pairs: tuple[Pair, ...],
    rows: Mapping[str, Any],
    outputs: Arrays,
    start: int = 0,
    threads: int | None = None,
) -> FloatArray:
    """Rows from `start` on and what `head_rows` made of them -> scores [pairs, T], 1 - cos (Mentor3AD Eq. 5).

    Args:
        pairs: what is compared.
        rows: of the whole frame: spread tokens, or plain rows [R, D].
        outputs: of this tile, [T, D] by name.
        start: the tile's first row.
        threads: of the comparison.
    """
    count = len(next(iter(outputs.values())))

    def blocks(name: str) -> FloatArray:
        return outputs[name] if name in outputs else rows[name][start : start + count]

    features = [outputs[p.feature] if p.feature in outputs else rows[p.feature] for p in pairs]
    return ops.cosine_scores(features, [[blocks(n) for n in p.reconstructed] for p in pairs], start, threads)


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


CpuStage = (
    GroupedEncoder
    | Patches
    | Interpolated
    | Cells
    | PixelLayer
    | Windowed
    | TiledHead
    | Halves
    | NearestBanks
    | Refined
    | OnnxGraph
)


def cpu_form(
    name: str,
    folder: Path,
    contract: Contract,
    threads: int,
    load: Callable[[Path, int], OnnxGraph] = OnnxGraph,
    refine: float | None = None,
) -> CpuStage:
    """The stage `name` on the CPU without a check of its inputs, its files read from `folder`.

    Args:
        name: of the stage.
        folder: a bundle's `onnx/`.
        contract: the bundle's.
        threads: of ONNX Runtime.
        load: path and threads -> the graph.
        refine: of a lattice whose head makes a second pass, the limit that it is made for; None makes none.

    Raises:
        ArtifactError: an ONNX file of the stage is missing.
        MissingDependencyError: ONNX Runtime is not installed.
    """
    form, dims = contract.method.cpu[name], contract.dims
    paths = [folder / file for file in form.files]
    match form.kind:
        case "grouped":
            return GroupedEncoder(load(paths[0], threads), dims)
        case "patches":
            return Patches(dims)
        case "interpolated":
            return Interpolated(dims)
        case "cells":
            return Cells(form.output_size)
        case "pixel_layer":
            return PixelLayer(load(paths[0], threads), paths[1], dims)
        case "windowed":
            return Windowed(load(paths[0], threads), form)
        case "halves":
            return Halves(load(paths[0], threads), load(paths[1], threads))
        case "nearest":
            return NearestBanks(paths[1:-1], paths[-1])
        case "tiled":
            tokens, rows, vote = (
                load(path, 1 if i == 1 else threads) for i, path in enumerate(paths)
            )  # rows on one thread: each tile has its own
            head = TiledHead(tokens, rows, vote, dims, contract.method.pairs, threads)
            return head if refine is None else Refined(head, refine)
        case "graph":
            return load(paths[0], threads)


def cpu_stage(
    name: str, folder: Path, contract: Contract, threads: int, refine: float | None = None
) -> StageFunction:
    """`cpu_form`, which refuses inputs that do not fit the contract.

    Raises:
        ArtifactError: an ONNX file of the stage is missing.
        MissingDependencyError: ONNX Runtime is not installed.
    """
    return CheckedStage(contract.stages[name], cpu_form(name, folder, contract, threads, refine=refine))
