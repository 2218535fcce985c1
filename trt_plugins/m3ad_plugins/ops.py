"""The m3ad ops on NumPy arrays: inputs are checked here, once; the native or the NumPy form does the work."""

import numpy as np
from m3ad.contract import IMAGE_SIZE

from m3ad_plugins import form
from m3ad_plugins.arrays import Float32, Int32, checked
from m3ad_plugins.sparse_rows import InterpolatedRows as InterpolatedRows
from m3ad_plugins.sparse_rows import SparseRows as SparseRows
from m3ad_plugins.sparse_rows import cosine_scores as cosine_scores

KERNELS = ("linear", "rbf")


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
    result: Int32 = form.chosen().farthest_point_sample(
        points, num_samples, min_norm_sq, point_pixel, image_size
    )
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
    result: tuple[Float32, Int32] = form.chosen().knn_group(points, idx, group_size, point_pixel, image_size)
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
    result: tuple[Int32, Float32, Int32] = form.chosen().point_group(
        points, num_samples, group_size, min_norm_sq, point_pixel, image_size
    )
    return result


def interpolation_operator(
    points: Float32,
    point_pixel: Int32,
    centers: Float32,
    scored_pixel: Int32,
    image_size: int = IMAGE_SIZE,
) -> SparseRows:
    """The linear map A [R, G] from tokens to pixel rows: 3-NN weights, 3x3 average, 222 -> 224 pooling.

    A = select (P x P) scatter(W);  W_nk = v_k / sum v, v_k = 1 / (|p_n - c_k|^2 + 1e-8), 3 nearest centres k;
    P = AdaptiveAvgPool(image_size) AvgPool(3, stride 1, no padding) along one axis   (Qi et al. 2017, M3DM)

    Args:
        points: [N, 3] float32, finite.
        point_pixel: [N] int32, the row-major pixel of each point, each pixel at most once.
        centers: [G, 3] float32, G >= 3, in the frame of the points.
        scored_pixel: [R] int32, the row-major pixel of each row: `m3ad.scored.scored_pixels`, or some of them.
        image_size: side of the pixel grid, at least 3.

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
    scored_pixel = checked("scored_pixel", scored_pixel, "int32", ("R",))
    if len(scored_pixel) and not 0 <= scored_pixel.min() <= scored_pixel.max() < image_size * image_size:
        found = f"{scored_pixel.min()}..{scored_pixel.max()}"
        raise ValueError(f"scored_pixel: expected pixels 0..{image_size * image_size - 1}, got {found}")
    indptr, indices, weights = form.chosen().interpolation_operator(
        points, point_pixel, centers, scored_pixel, image_size
    )
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
) -> Float32:
    """Spread the group tokens over the scored pixels: `interpolation_operator(...).apply(tokens)`.

    Args:
        points: [N, 3] float32, finite.
        point_pixel: [N] int32, the row-major pixel of each point, each pixel at most once.
        centers: [G, 3] float32, G >= 3.
        tokens: [G, D] float32, finite.
        scored_pixel: [R] int32, the row-major pixel of each row.
        image_size: side of the pixel grid, at least 3.

    Returns:
        rows [R, D] float32.

    Raises:
        ValueError: an argument is not as described.
    """
    return interpolation_operator(points, point_pixel, centers, scored_pixel, image_size).apply(tokens)


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
    result: Float32 = form.chosen().one_class_svm(x, support_vectors, coefficients, rho, kernel, gamma)
    return result
