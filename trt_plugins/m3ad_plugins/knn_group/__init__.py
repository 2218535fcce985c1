"""KnnGroup: the nearest points of each centre; `point_group` samples the centres over the same tiles first."""

import numpy as np
from m3ad.contract import IMAGE_SIZE

from m3ad_plugins import native
from m3ad_plugins.arithmetic import squared_distance
from m3ad_plugins.arrays import Float32, Int32, checked, checked_points
from m3ad_plugins.farthest_point_sample import check_sampling
from m3ad_plugins.farthest_point_sample import in_numpy as sampled_in_numpy


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
    points, point_pixel = checked_points(points, point_pixel, image_size)
    idx = checked("idx", idx, "int32", ("G",))
    _check_group_size(len(points), group_size)
    if len(idx) == 0 or idx.min() < 0 or idx.max() >= len(points):
        found = f"{idx.min()}..{idx.max()}" if len(idx) else "none"
        raise ValueError(f"idx: expected indices 0..{len(points) - 1}, got {found}")
    return native.choose(in_cpp, in_numpy)(points, idx, group_size, point_pixel, image_size)


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
    points, point_pixel = checked_points(points, point_pixel, image_size)
    check_sampling(len(points), num_samples, min_norm_sq)
    _check_group_size(len(points), group_size)
    both = native.choose(both_in_cpp, both_in_numpy)
    return both(points, num_samples, group_size, min_norm_sq, point_pixel, image_size)


def _check_group_size(count: int, group_size: int) -> None:
    if not 1 <= group_size <= count:
        raise ValueError(f"group_size: expected 1..N with N = {count} points, got {group_size}")


def in_cpp(
    points: Float32, idx: Int32, group_size: int, point_pixel: Int32 | None, image_size: int
) -> tuple[Float32, Int32]:
    """The portable C++; inputs are already checked."""
    knn_idx = np.empty((len(idx), group_size), np.int32)
    neighborhood = np.empty((*knn_idx.shape, 3), np.float32)
    sizes = (len(points), image_size)
    groups = (idx, len(idx), group_size)
    found = (neighborhood, knn_idx, native.threads())
    native.call("knn_group", "ppiipiippi", points, point_pixel, *sizes, *groups, *found)
    return neighborhood, knn_idx


def in_numpy(
    points: Float32, idx: Int32, group_size: int, point_pixel: Int32 | None, image_size: int
) -> tuple[Float32, Int32]:
    """As the reference, sorting only the points not farther than the group_size-th."""
    knn_idx = np.empty((len(idx), group_size), np.int32)
    for row, center in zip(knn_idx, points[idx], strict=True):
        distance = squared_distance(points, center)
        near = np.flatnonzero(distance <= np.partition(distance, group_size - 1)[group_size - 1])
        row[:] = near[distance[near].argsort(kind="stable")[:group_size]]
    return points[knn_idx] - points[idx][:, None], knn_idx


def both_in_cpp(
    points: Float32,
    num_samples: int,
    group_size: int,
    min_norm_sq: float,
    point_pixel: Int32 | None,
    image_size: int,
) -> tuple[Int32, Float32, Int32]:
    """Sampling and grouping over the same tiles."""
    idx = np.empty(num_samples, np.int32)
    knn_idx = np.empty((num_samples, group_size), np.int32)
    neighborhood = np.empty((*knn_idx.shape, 3), np.float32)
    sizes = (len(points), image_size, num_samples, min_norm_sq, group_size)
    found = (idx, neighborhood, knn_idx, native.threads())
    native.call("point_group", "ppiiifipppi", points, point_pixel, *sizes, *found)
    return idx, neighborhood, knn_idx


def both_in_numpy(
    points: Float32,
    num_samples: int,
    group_size: int,
    min_norm_sq: float,
    point_pixel: Int32 | None,
    image_size: int,
) -> tuple[Int32, Float32, Int32]:
    """One after the other."""
    idx = sampled_in_numpy(points, num_samples, min_norm_sq, point_pixel, image_size)
    return idx, *in_numpy(points, idx, group_size, point_pixel, image_size)
