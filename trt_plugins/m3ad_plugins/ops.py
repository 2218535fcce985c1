"""The m3ad ops on NumPy arrays: inputs are checked here, once; the native or the NumPy form does the work."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
from m3ad.contract import IMAGE_SIZE

from m3ad_plugins import native, numpy_ops
from m3ad_plugins.arrays import Features, Float32, Int32, checked

KERNELS = ("linear", "rbf")


def _form() -> ModuleType:
    """The form that does the work: native when it is built."""
    return numpy_ops if native.library() is None else native


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
        out = np.empty((len(self.scored_pixel), rows.table.shape[1]), np.float32)
        rows.write(0, out)
        return out

    def interpolated(self, tokens: Float32) -> "InterpolatedRows":
        """A @ tokens without forming it: [G, D] float32, finite.

        Raises:
            ValueError: tokens are not as described.
        """
        return InterpolatedRows(self, checked("tokens", tokens, "float32", (self.groups, "D")))

    def tiles(self, tables: Mapping[str, Float32], rows: int) -> Iterator[dict[str, Float32]]:
        """A @ table for each table, at most `rows` rows at a time, in buffers that the next tile overwrites.

        Args:
            tables: by name, [G, D] float32, finite.
            rows: of a tile.

        Yields:
            By the same names, [rows, D] float32; the last tile has what is left.

        Raises:
            ValueError: a table is not as described, or a tile has no rows.
        """
        interpolated = {name: self.interpolated(table) for name, table in tables.items()}
        if rows < 1:
            raise ValueError(f"rows: expected at least 1, got {rows}")
        buffers = {name: np.empty((rows, table.shape[1]), np.float32) for name, table in tables.items()}
        for start in range(0, len(self.scored_pixel), rows):
            count = min(rows, len(self.scored_pixel) - start)
            tile = {name: buffer[:count] for name, buffer in buffers.items()}
            for name, out in tile.items():
                interpolated[name].write(start, out)
            yield tile


@dataclass(frozen=True, slots=True)
class InterpolatedRows:
    """A @ table [R, D], formed where it is needed; `SparseRows.interpolated` makes one."""

    operator: SparseRows
    table: Float32

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
        fits = out.ndim == 2 and out.shape[1] == self.table.shape[1] and 0 <= start <= have - len(out)
        if not fits or out.dtype != np.float32 or not out.flags.carray:
            raise ValueError(
                f"out: expected float32 [T, {self.table.shape[1]}] in C order for rows of {have} from {start} on, got "
                f"{out.dtype} {list(out.shape)}"
            )
        indptr = operator.indptr[start : start + len(out) + 1]
        _form().apply_rows((indptr, operator.indices, operator.weights), self.table, out, threads)


def _check_points(
    points: Float32, point_pixel: Int32 | None, image_size: int
) -> tuple[Float32, Int32 | None]:
    points = checked("points", points, "float32", ("N", 3))
    return points, None if point_pixel is None else _check_pixels(point_pixel, len(points), image_size)


def _check_sampling(count: int, num_samples: int, min_norm_sq: float) -> None:
    if not 1 <= num_samples <= count:
        raise ValueError(f"num_samples: expected 1..N with N = {count} points, got {num_samples}")
    if not 0 <= min_norm_sq < np.inf:
        raise ValueError(f"min_norm_sq: expected a finite value >= 0, got {min_norm_sq}")


def _check_group_size(count: int, group_size: int) -> None:
    if not 1 <= group_size <= count:
        raise ValueError(f"group_size: expected 1..N with N = {count} points, got {group_size}")


def _check_pixels(point_pixel: Int32, count: int, image_size: int) -> Int32:
    pixel: Int32 = checked("point_pixel", point_pixel, "int32", (count,))
    if pixel.min() < 0 or pixel.max() >= image_size * image_size:
        raise ValueError(
            f"point_pixel: expected pixels 0..{image_size * image_size - 1} of a {image_size} x {image_size} "
            f"image, got {pixel.min()}..{pixel.max()}"
        )
    seen = np.bincount(pixel, minlength=image_size * image_size)
    if seen.max() > 1:
        raise ValueError(f"point_pixel: pixel {seen.argmax()} is named by {seen.max()} points, expected one")
    return pixel


def farthest_point_sample(
    points: Float32,
    num_samples: int,
    min_norm_sq: float = 0.0,
    point_pixel: Int32 | None = None,
    image_size: int = IMAGE_SIZE,
) -> Int32:
    """Pick spread-out points greedily: each next one is farthest from all picked so far.

    s_0 = 0;  s_k = argmax_n min_{j<k} |p_n - p_{s_j}|^2, ties to the lowest n   (Qi et al. 2017, section 3.2)

    Args:
        points: [N, 3] float32, finite.
        num_samples: G, 1 <= G <= N.
        min_norm_sq: when positive, points with |p|^2 <= min_norm_sq are never picked after the first
            (pointnet2_ops: 1e-3).
        point_pixel: [N] int32, the row-major pixel of each point: lets an organised cloud be pruned by pixel
            tiles. The result is the same without it.
        image_size: side of the pixel grid.

    Returns:
        [G] int32 indices into N, in pick order.

    Raises:
        ValueError: an argument is not as described.
    """
    points, point_pixel = _check_points(points, point_pixel, image_size)
    _check_sampling(len(points), num_samples, min_norm_sq)
    result: Int32 = _form().farthest_point_sample(points, num_samples, min_norm_sq, point_pixel, image_size)
    return result


def knn_group(
    points: Float32,
    idx: Int32,
    group_size: int,
    point_pixel: Int32 | None = None,
    image_size: int = IMAGE_SIZE,
) -> tuple[Float32, Int32]:
    """The nearest points of each centre, relative to it.

    Args:
        points: [N, 3] float32, finite.
        idx: [G] int32, the centres' indices into N.
        group_size: S, 1 <= S <= N.
        point_pixel: [N] int32, as for `farthest_point_sample`.
        image_size: side of the pixel grid.

    Returns:
        neighborhood [G, S, 3] float32 = points[knn_idx] - points[idx], and knn_idx [G, S] int32, ordered by
        (squared distance, index).

    Raises:
        ValueError: an argument is not as described.
    """
    points, point_pixel = _check_points(points, point_pixel, image_size)
    idx = checked("idx", idx, "int32", ("G",))
    _check_group_size(len(points), group_size)
    if len(idx) == 0 or idx.min() < 0 or idx.max() >= len(points):
        found = f"{idx.min()}..{idx.max()}" if len(idx) else "none"
        raise ValueError(f"idx: expected indices 0..{len(points) - 1}, got {found}")
    result: tuple[Float32, Int32] = _form().knn_group(points, idx, group_size, point_pixel, image_size)
    return result


def point_group(
    points: Float32,
    num_samples: int,
    group_size: int,
    min_norm_sq: float = 0.0,
    point_pixel: Int32 | None = None,
    image_size: int = IMAGE_SIZE,
) -> tuple[Int32, Float32, Int32]:
    """`farthest_point_sample`, then `knn_group` round the samples; the two share their search structure.

    Args:
        points: [N, 3] float32, finite.
        num_samples: G, 1 <= G <= N.
        group_size: S, 1 <= S <= N.
        min_norm_sq: as for `farthest_point_sample`.
        point_pixel: [N] int32, as for `farthest_point_sample`.
        image_size: side of the pixel grid.

    Returns:
        idx [G] int32, neighborhood [G, S, 3] float32, knn_idx [G, S] int32.

    Raises:
        ValueError: an argument is not as described.
    """
    points, point_pixel = _check_points(points, point_pixel, image_size)
    _check_sampling(len(points), num_samples, min_norm_sq)
    _check_group_size(len(points), group_size)
    result: tuple[Int32, Float32, Int32] = _form().point_group(
        points, num_samples, group_size, min_norm_sq, point_pixel, image_size
    )
    return result


def interpolation_operator(
    points: Float32, point_pixel: Int32, centers: Float32, image_size: int = IMAGE_SIZE
) -> SparseRows:
    """The linear map A [R, G] from tokens to pixel rows: 3-NN weights, 3x3 average, 222 -> 224 pooling.

    A = select (P x P) scatter(W);  W_nk = v_k / sum v, v_k = 1 / (|p_n - c_k|^2 + 1e-8), 3 nearest centres k;
    P = AdaptiveAvgPool(image_size) AvgPool(3, stride 1, no padding) along one axis   (Qi et al. 2017, M3DM)

    Args:
        points: [N, 3] float32, finite.
        point_pixel: [N] int32, the row-major pixel of each point, each pixel at most once.
        centers: [G, 3] float32, G >= 3, in the frame of the points.
        image_size: side of the pixel grid, at least 3.

    Returns:
        The operator; its R rows are the pixels with a foreground pixel under the pooling's taps.

    Raises:
        ValueError: an argument is not as described.
    """
    if image_size < 3:
        raise ValueError(f"image_size: expected at least 3, got {image_size}")
    points = checked("points", points, "float32", ("N", 3))
    if len(points) == 0:
        raise ValueError("points: expected at least one point, got none")
    point_pixel = _check_pixels(point_pixel, len(points), image_size)
    centers = checked("centers", centers, "float32", ("G", 3))
    if len(centers) < 3:
        raise ValueError(f"centers: expected at least 3 of them to interpolate between, got {len(centers)}")
    indptr, indices, weights, scored_pixel = _form().interpolation_operator(
        points, point_pixel, centers, image_size
    )
    return SparseRows(indptr, indices, weights, scored_pixel, len(centers))


def token_interpolate(
    points: Float32, point_pixel: Int32, centers: Float32, tokens: Float32, image_size: int = IMAGE_SIZE
) -> tuple[Float32, Int32]:
    """Spread the group tokens over the pixels: `interpolation_operator(...).apply(tokens)`.

    Args:
        points: [N, 3] float32, finite.
        point_pixel: [N] int32, the row-major pixel of each point, each pixel at most once.
        centers: [G, 3] float32, G >= 3.
        tokens: [G, D] float32, finite.
        image_size: side of the pixel grid, at least 3.

    Returns:
        rows [R, D] float32 and scored_pixel [R] int32, ascending.

    Raises:
        ValueError: an argument is not as described.
    """
    operator = interpolation_operator(points, point_pixel, centers, image_size)
    return operator.apply(tokens), operator.scored_pixel


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
    result: Float32 = _form().cosine_scores([a for a, _ in pairs], [b for _, b in pairs], threads)
    return result


def _checked_pair(
    features: Float32 | InterpolatedRows, reconstructed: Sequence[Float32], rows: int, start: int
) -> tuple[Features, list[Float32]]:
    again = [checked("reconstructed", block, "float32", (rows, "D"), finite=False) for block in reconstructed]
    width = sum(block.shape[1] for block in again)
    if not isinstance(features, InterpolatedRows):
        rows_as_they_are = checked("features", features, "float32", (rows, width), finite=False)
        return (None, None, None, rows_as_they_are), again
    operator, table = features.operator, features.table
    have = len(operator.scored_pixel)
    if not 0 <= start <= have - rows or table.shape[1] != width:
        raise ValueError(
            f"features: expected interpolated rows {start}..{start + rows - 1} of {width} columns, got "
            f"{have} rows of {table.shape[1]}"
        )
    return (operator.indptr[start : start + rows + 1], operator.indices, operator.weights, table), again


def one_class_svm(
    x: Float32,
    support_vectors: Float32,
    coefficients: Float32,
    rho: float,
    kernel: str = "linear",
    gamma: float = 1.0,
) -> Float32:
    """The decision function of a one-class SVM.

    f(x) = sum_k c_k k(v_k, x) - rho, with k(v, x) = v.x or exp(-gamma |v - x|^2)   (Schoelkopf et al. 2001)

    Args:
        x: [R, D] float32.
        support_vectors: [K, D] float32.
        coefficients: [K] float32; their sign fixes which side is anomalous.
        rho: offset.
        kernel: "linear" or "rbf".
        gamma: width of the rbf kernel, positive.

    Returns:
        [R] float32.

    Raises:
        ValueError: an argument is not as described.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel: expected one of {', '.join(KERNELS)}, got {kernel!r}")
    if not 0 < gamma < np.inf:
        raise ValueError(f"gamma: expected a finite value > 0, got {gamma}")
    x = checked("x", x, "float32", ("R", "D"))
    support_vectors = checked("support_vectors", support_vectors, "float32", ("K", x.shape[1]))
    coefficients = checked("coefficients", coefficients, "float32", (len(support_vectors),))
    result: Float32 = _form().one_class_svm(x, support_vectors, coefficients, rho, kernel, gamma)
    return result
