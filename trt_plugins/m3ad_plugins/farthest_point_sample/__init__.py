"""FarthestPointSample: points picked greedily, each next one farthest from all before it."""

import numpy as np
from m3ad.contract import IMAGE_SIZE

from m3ad_plugins import native
from m3ad_plugins.arrays import Float32, Int32, checked_points
from m3ad_plugins.farthest_point_sample import reference


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
            tiles. The result is the same without it, and later: the points are then sorted along a curve first.
        image_size: side of the pixel grid.

    Returns:
        [G] int32 indices into N, in pick order.

    Raises:
        ValueError: an argument is not as described.
    """
    points, point_pixel = checked_points(points, point_pixel, image_size)
    check_sampling(len(points), num_samples, min_norm_sq)
    return native.choose(in_cpp, in_numpy)(points, num_samples, min_norm_sq, point_pixel, image_size)


def check_sampling(count: int, num_samples: int, min_norm_sq: float) -> None:
    """Refuse what cannot be sampled from `count` points.

    Raises:
        ValueError: an attribute is not as described.
    """
    if not 1 <= num_samples <= count:
        raise ValueError(f"num_samples: expected 1..N with N = {count} points, got {num_samples}")
    if not 0 <= min_norm_sq < np.inf:
        raise ValueError(f"min_norm_sq: expected a finite value >= 0, got {min_norm_sq}")


def in_cpp(
    points: Float32, num_samples: int, min_norm_sq: float, point_pixel: Int32 | None, image_size: int
) -> Int32:
    """The portable C++; inputs are already checked."""
    idx = np.empty(num_samples, np.int32)
    sizes = (len(points), image_size, num_samples, min_norm_sq)
    native.call("farthest_point_sample", "ppiiifp", points, point_pixel, *sizes, idx)
    return idx


def in_numpy(
    points: Float32, num_samples: int, min_norm_sq: float, point_pixel: Int32 | None, image_size: int
) -> Int32:
    """The reference; where the points lie in the image is of no use here."""
    return reference.farthest_point_sample(points, num_samples, min_norm_sq)
