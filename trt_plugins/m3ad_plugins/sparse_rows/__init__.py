"""Sparse maps from tokens to pixel rows, applied where they are needed, and the scores of such rows.

No ONNX ops: what the CPU's head asks for beside them.
"""

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from m3ad_plugins import native
from m3ad_plugins.arrays import Features, Float32, Int32, Sparse, checked
from m3ad_plugins.sparse_rows import reference


@dataclass(frozen=True, slots=True)
class SparseRows:
    """A sparse operator A [R, G]; row r is indices and weights [indptr[r]:indptr[r + 1]].

    Attributes:
        indptr: [R + 1] int32, from 0 to nnz, never falling.
        indices: [nnz] int32, 0..G-1; of `interpolation_operator` ascending within a row.
        weights: [nnz] float32; of `interpolation_operator` positive, and a row sums to 1 inside the foreground, to
            less at its border.
        scored_pixel: [R] int32, ascending; the row-major pixel each row belongs to.
        groups: G.

    Raises:
        ValueError: the arrays do not describe such an operator.
    """

    indptr: Int32
    indices: Int32
    weights: Float32
    scored_pixel: Int32
    groups: int

    def __post_init__(self) -> None:
        rows, entries = len(self.scored_pixel), len(self.indices)
        checked("indptr", self.indptr, "int32", (rows + 1,))
        checked("weights", self.weights, "float32", (entries,))
        checked("indices", self.indices, "int32", (entries,))
        if self.indptr[0] != 0 or self.indptr[-1] != entries or (np.diff(self.indptr) < 0).any():
            raise ValueError(f"indptr: expected 0 rising to the {entries} entries, got {self.indptr}")
        if entries and not 0 <= self.indices.min() <= self.indices.max() < self.groups:
            found = f"{self.indices.min()}..{self.indices.max()}"
            raise ValueError(f"indices: expected 0..{self.groups - 1}, got {found}")

    def apply(self, tokens: Float32) -> Float32:
        """A @ tokens: [G, D] float32, finite -> [R, D] float32.

        Raises:
            ValueError: tokens are not as described.
        """
        rows = self.interpolated(tokens)
        out = np.empty((len(self.scored_pixel), rows.tokens.shape[1]), np.float32)
        rows.write(0, out)
        return out

    def interpolated(self, tokens: Float32) -> "InterpolatedRows":
        """A @ tokens without forming it: [G, D] float32, finite.

        Raises:
            ValueError: tokens are not as described.
        """
        return InterpolatedRows(self, checked("tokens", tokens, "float32", (self.groups, "D")))

    def tiles(self, tokens: Mapping[str, Float32], rows: int) -> Iterator[dict[str, Float32]]:
        """A @ tokens for each of these, at most `rows` rows at a time, in buffers that the next tile overwrites.

        Args:
            tokens: by name, [G, D] float32, finite.
            rows: of a tile.

        Yields:
            By the same names, [rows, D] float32; the last tile has what is left.

        Raises:
            ValueError: some are not as described, or a tile has no rows.
        """
        interpolated = {name: self.interpolated(each) for name, each in tokens.items()}
        if rows < 1:
            raise ValueError(f"rows: expected at least 1, got {rows}")
        buffers = {name: np.empty((rows, each.shape[1]), np.float32) for name, each in tokens.items()}
        for start in range(0, len(self.scored_pixel), rows):
            count = min(rows, len(self.scored_pixel) - start)
            tile = {name: buffer[:count] for name, buffer in buffers.items()}
            for name, out in tile.items():
                interpolated[name].write(start, out)
            yield tile


@dataclass(frozen=True, slots=True)
class InterpolatedRows:
    """A @ tokens [R, D], formed where it is needed; `SparseRows.interpolated` makes one."""

    operator: SparseRows
    tokens: Float32

    def write(self, start: int, out: Float32, threads: int | None = None) -> None:
        """Form the rows start .. start + T - 1.

        Args:
            start: the first of them.
            out: [T, D] float32 in C order; is written.
            threads: to form them on; the cores this process may use if left out.

        Raises:
            ValueError: there are no such rows, or out is not as described.
        """
        operator, have = self.operator, len(self.operator.scored_pixel)
        fits = out.ndim == 2 and out.shape[1] == self.tokens.shape[1] and 0 <= start <= have - len(out)
        if not fits or out.dtype != np.float32 or not out.flags.carray:
            raise ValueError(
                f"out: expected float32 [T, {self.tokens.shape[1]}] in C order for rows of {have} from {start} on, got "
                f"{out.dtype} {list(out.shape)}"
            )
        indptr = operator.indptr[start : start + len(out) + 1]
        apply = native.choose(apply_in_cpp, apply_in_numpy)
        apply((indptr, operator.indices, operator.weights), self.tokens, out, threads)


def cosine_scores(
    features: Sequence[Float32 | InterpolatedRows],
    reconstructed: Sequence[Sequence[Float32]],
    start: int = 0,
    threads: int | None = None,
) -> Float32:
    """Score rows of features against their reconstruction.

    s = 1 - cos(F, F~) = |F/|F| - F~/|F~||^2 / 2   (Mentor3AD Eq. 5; the second form keeps small scores exact)

    Args:
        features: n of [R, D_n] float32, or of interpolated rows, of which start .. start + R - 1 are meant.
        reconstructed: n of [R, D_n] float32, each as its blocks of columns from left to right.
        start: of the interpolated rows.
        threads: to work on; the cores this process may use if left out.

    Returns:
        [n, R] float32, 0..2; 1/2 where one of a pair is zero, NaN where a value is not finite.

    Raises:
        ValueError: an argument is not as described.
    """
    if not features or len(features) != len(reconstructed):
        raise ValueError(
            f"features: expected as many as reconstructed, got {len(features)} and {len(reconstructed)}"
        )
    if odd := [each for each in reconstructed if isinstance(each, np.ndarray) or not each]:
        found = "none" if len(odd[0]) == 0 else "a bare array; put it in a list"
        raise ValueError(f"reconstructed: expected at least one block of columns of each, got {found}")
    rows = len(reconstructed[0][0])
    pairs = [_checked_pair(a, b, rows, start) for a, b in zip(features, reconstructed, strict=True)]
    scores = native.choose(scores_in_cpp, scores_in_numpy)
    return scores([a for a, _ in pairs], [b for _, b in pairs], threads)


def _checked_pair(
    features: Float32 | InterpolatedRows, reconstructed: Sequence[Float32], rows: int, start: int
) -> tuple[Features, list[Float32]]:
    again = [checked("reconstructed", block, "float32", (rows, "D"), finite=False) for block in reconstructed]
    width = sum(block.shape[1] for block in again)
    if not isinstance(features, InterpolatedRows):
        rows_as_they_are = checked("features", features, "float32", (rows, width), finite=False)
        return (None, None, None, rows_as_they_are), again
    operator, tokens = features.operator, features.tokens
    have = len(operator.scored_pixel)
    if not 0 <= start <= have - rows or tokens.shape[1] != width:
        raise ValueError(
            f"features: expected interpolated rows {start}..{start + rows - 1} of {width} columns, got "
            f"{have} rows of {tokens.shape[1]}"
        )
    return (operator.indptr[start : start + rows + 1], operator.indices, operator.weights, tokens), again


def apply_in_cpp(rows: Sparse, tokens: Float32, out: Float32, num_threads: int | None = None) -> None:
    """The sparse rows times tokens [G, D] into out."""
    sizes = (len(out), tokens, tokens.shape[1], out, num_threads or native.threads())
    native.call("apply_rows", "pppipipi", *rows, *sizes)


def apply_in_numpy(rows: Sparse, tokens: Float32, out: Float32, num_threads: int | None = None) -> None:
    """The sparse rows times tokens [G, D] into out, on one thread whatever is asked for."""
    indptr, indices, weights = rows
    first, last = indptr[0], indptr[-1]
    parts = (weights[first:last], indices[first:last], indptr - first)
    out[:] = sparse.csr_matrix(parts, shape=(len(out), len(tokens))) @ tokens


def scores_in_cpp(
    features: Sequence[Features],
    reconstructed: Sequence[Sequence[Float32]],
    num_threads: int | None = None,
) -> Float32:
    """As the reference, sparse rows formed a few at a time."""
    scores = np.empty((len(features), len(reconstructed[0][0])), np.float32)
    parts = [0 if part is None else part.ctypes.data for each in features for part in each]
    arrays = [(_pointers(each), _widths(each)) for each in reconstructed]  # alive until the call is over
    blocks = [
        _Blocks(ctypes.addressof(values), ctypes.addressof(widths), len(widths), sum(widths))
        for values, widths in arrays
    ]
    packed = (ctypes.c_void_p * len(parts))(*parts), (_Blocks * len(blocks))(*blocks)
    native.call("cosine_scores", "ppiipi", *packed, *scores.shape, scores, num_threads or native.threads())
    return scores


def scores_in_numpy(
    features: Sequence[Features],
    reconstructed: Sequence[Sequence[Float32]],
    num_threads: int | None = None,
) -> Float32:
    """As the reference, of rows that may still have to be formed."""
    formed = []
    for indptr, indices, weights, values in features:
        rows = values
        if indptr is not None and indices is not None and weights is not None:
            rows = np.empty((len(indptr) - 1, values.shape[1]), np.float32)
            apply_in_numpy((indptr, indices, weights), values, rows)
        formed.append(rows)
    return reference.cosine_scores(formed, reconstructed)


class _Blocks(ctypes.Structure):
    """Blocks in kernel.hpp."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("widths", ctypes.c_void_p),
        ("count", ctypes.c_int32),
        ("width", ctypes.c_int32),
    )


def _pointers(arrays: Sequence[Float32]) -> Any:
    return (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))


def _widths(arrays: Sequence[Float32]) -> Any:
    return (ctypes.c_int32 * len(arrays))(*(array.shape[1] for array in arrays))
