"""TokenInterpolate: group tokens spread over the scored pixels, as one sparse linear map."""

from functools import lru_cache
from mmap import mmap

import numpy as np
from m3ad.contract import IMAGE_SIZE
from scipy import sparse

from m3ad_plugins import native
from m3ad_plugins.arrays import Float32, Int32, checked, checked_pixels
from m3ad_plugins.sparse_rows import SparseRows
from m3ad_plugins.token_interpolate import reference

TAPS, WIDE_TAPS = 4, 7  # of a window along one axis: kMAX_TAPS and kMAX_WIDE_TAPS in arithmetic.hpp
CHUNK = 512  # points per step in NumPy: a [CHUNK, 1024] fp32 block and its temporaries stay in cache


def interpolation_operator(
    points: Float32,
    point_pixel: Int32,
    centers: Float32,
    scored_pixel: Int32,
    image_size: int = IMAGE_SIZE,
    output_size: int | None = None,
) -> SparseRows:
    """The linear map A [R, G] from tokens to pixel rows: 3-NN weights, 3x3 average, 222 -> 224 or 56 pooling.

    A = select (P x P) scatter(W);  W_nk = v_k / sum v, v_k = 1 / (|p_n - c_k|^2 + 1e-8), 3 nearest centres k;
    P = AdaptiveAvgPool(output_size) AvgPool(3, stride 1, no padding) along one axis   (Qi et al. 2017, M3DM)

    Args:
        points: [N, 3] float32, finite.
        point_pixel: [N] int32, the row-major pixel of each point, each pixel at most once.
        centers: [G, 3] float32, G >= 3, in the frame of the points.
        scored_pixel: [R] int32, the row-major pixel of each row: `m3ad.scored.scored_pixels`, or some of them.
        image_size: side of the points' grid, at least 3.
        output_size: side of the rows' grid, from a quarter of image_size up to it, which it is by default.

    Raises:
        ValueError: an argument is not as described.
    """
    if image_size < 3:
        raise ValueError(f"image_size: expected at least 3, got {image_size}")
    side = image_size if output_size is None else output_size
    if not image_size <= 4 * side <= 4 * image_size:
        raise ValueError(
            f"output_size: expected a quarter of image_size {image_size} up to it, got {output_size}"
        )
    points = checked("points", points, "float32", ("N", 3))
    if len(points) == 0:
        raise ValueError("points: expected at least one point, got none")
    point_pixel = checked_pixels(point_pixel, len(points), image_size)
    centers = checked("centers", centers, "float32", ("G", 3))
    if len(centers) < 3:
        raise ValueError(f"centers: expected at least 3 of them to interpolate between, got {len(centers)}")
    scored_pixel = checked("scored_pixel", scored_pixel, "int32", ("R",))
    if len(scored_pixel) and not 0 <= scored_pixel.min() <= scored_pixel.max() < side * side:
        found = f"{scored_pixel.min()}..{scored_pixel.max()}"
        raise ValueError(f"scored_pixel: expected pixels 0..{side * side - 1}, got {found}")
    spread = native.choose(in_cpp, in_numpy)
    indptr, indices, weights = spread(points, point_pixel, centers, scored_pixel, image_size, side)
    if (empty := np.diff(indptr) == 0).any():
        raise ValueError(
            f"scored_pixel: the foreground does not reach pixel {scored_pixel[empty.argmax()]}, expected some of "
            "m3ad.scored.scored_pixels(point_pixel)"
        )
    return SparseRows(indptr, indices, weights, scored_pixel, len(centers))


def token_interpolate(
    points: Float32,
    point_pixel: Int32,
    centers: Float32,
    tokens: Float32,
    scored_pixel: Int32,
    image_size: int = IMAGE_SIZE,
    output_size: int | None = None,
) -> Float32:
    """Spread the group tokens over the scored pixels: `interpolation_operator(...).apply(tokens)`.

    Args:
        points: [N, 3] float32, finite.
        point_pixel: [N] int32, the row-major pixel of each point, each pixel at most once.
        centers: [G, 3] float32, G >= 3.
        tokens: [G, D] float32, finite.
        scored_pixel: [R] int32, the row-major pixel of each row.
        image_size: side of the points' grid, at least 3.
        output_size: side of the rows' grid, from a quarter of image_size up to it, which it is by default.

    Returns:
        rows [R, D] float32.

    Raises:
        ValueError: an argument is not as described.
    """
    operator = interpolation_operator(points, point_pixel, centers, scored_pixel, image_size, output_size)
    return operator.apply(tokens)


def in_cpp(
    points: Float32, point_pixel: Int32, centers: Float32, scored_pixel: Int32, image_size: int, side: int
) -> tuple[Int32, Int32, Float32]:
    """The linear map in portable C++: indptr, indices, weights of its rows; inputs are already checked."""
    rows = len(scored_pixel)
    indptr = np.empty(rows + 1, np.int32)
    # Room for every row at its widest, of which a few per cent are touched. NumPy asks for huge pages for arrays of
    # this size, and clearing those took 20 ms of a frame (measured); plain pages are cleared as they are touched.
    capacity = (TAPS if side == image_size else WIDE_TAPS) ** 2 * reference.NEIGHBORS
    room = max(rows, 1) * capacity * 4
    indices, weights = np.frombuffer(mmap(-1, room), np.int32), np.frombuffer(mmap(-1, room), np.float32)
    clouds = (points, point_pixel, len(points), centers, len(centers))
    grids, found = (image_size, side, capacity), (indptr, indices, weights, native.threads())
    native.call("interpolation_operator", "ppipipiiiipppi", *clouds, scored_pixel, rows, *grids, *found)
    count = int(indptr[rows])
    return indptr, indices[:count].copy(), weights[:count].copy()


def in_numpy(
    points: Float32, point_pixel: Int32, centers: Float32, scored_pixel: Int32, image_size: int, side: int
) -> tuple[Int32, Int32, Float32]:
    """The same in vectorised NumPy and SciPy, without the [N, G] matrix of the reference."""
    count, pixels = len(points), image_size * image_size
    parts = [reference.nearest_three(points[i : i + CHUNK], centers) for i in range(0, count, CHUNK)]
    nearest, weights = (np.concatenate(part) for part in zip(*parts, strict=True))
    rows = np.repeat(point_pixel, reference.NEIGHBORS)
    image = sparse.csr_matrix(
        (weights.reshape(-1), (rows, nearest.reshape(-1))), shape=(pixels, len(centers)), dtype=np.float32
    )
    operator = sparse.csr_matrix(_pooling_operator(image_size, side)[scored_pixel] @ image)
    operator.sort_indices()
    return (
        operator.indptr.astype(np.int32),
        operator.indices.astype(np.int32),
        np.asarray(operator.data, np.float32),
    )


@lru_cache(maxsize=2)
def _pooling_operator(image_size: int, side: int) -> sparse.csr_matrix:
    """Kronecker product of P with itself, [side^2, image_size^2]: both axes of the pooling at once."""
    pool = sparse.csr_matrix(reference.pooling_matrix(image_size, side))
    return sparse.csr_matrix(sparse.kron(pool, pool, format="csr"))
