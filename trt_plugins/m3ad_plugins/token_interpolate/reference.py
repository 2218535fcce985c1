"""The specification of TokenInterpolate in plain NumPy: every other form is tested against it. Unchecked and slow.

[N, G] matrices are formed as the formulas say. Interpolation follows PointNet++ (Qi et al. 2017, section 3.4), pooling
M3DM (Wang et al. 2023).
"""

import numpy as np

from m3ad_plugins.arithmetic import squared_distance
from m3ad_plugins.arrays import Float32, Int32

NEIGHBORS = 3
DISTANCE_EPS = np.float32(1e-8)


def nearest_three(points: Float32, centers: Float32) -> tuple[Int32, Float32]:
    """The 3 nearest centres of each point and their weights v_k / sum v, v_k = 1 / (d_k^2 + 1e-8): [N, 3]."""
    distance = squared_distance(points[:, None], centers[None])  # [N, G]
    rows = np.arange(len(points))
    nearest, inverse = [], []
    for _ in range(NEIGHBORS):
        nearest.append(distance.argmin(1))
        inverse.append(1 / (distance[rows, nearest[-1]] + DISTANCE_EPS))
        distance[rows, nearest[-1]] = np.inf
    weights = np.stack(inverse, 1)
    return np.stack(nearest, 1).astype(np.int32), weights / weights.sum(1, keepdims=True)


def pooling_matrix(image_size: int, output_size: int | None = None) -> Float32:
    """P [S, H] of one axis: AvgPool(3, stride 1, no padding) to H - 2, then AdaptiveAvgPool to S, by default H."""
    inner, side = image_size - 2, output_size or image_size
    average, adaptive = np.zeros((inner, image_size)), np.zeros((side, inner))
    for i in range(inner):
        average[i, i : i + 3] = 1 / 3
    for o in range(side):
        start, stop = o * inner // side, -(-(o + 1) * inner // side)
        adaptive[o, start:stop] = 1 / (stop - start)
    return (adaptive @ average).astype(np.float32)


def scored_pixels(point_pixel: Int32, image_size: int = 224, output_size: int | None = None) -> Int32:
    """The output pixels with a foreground pixel under their taps, ascending: P F P^T > 0, F the foreground."""
    foreground = np.zeros((image_size, image_size), np.int64)
    foreground.reshape(-1)[point_pixel] = 1
    taps = (pooling_matrix(image_size, output_size) > 0).astype(np.int64)
    return np.flatnonzero(taps @ foreground @ taps.T).astype(np.int32)


def token_interpolate(
    points: Float32,
    point_pixel: Int32,
    centers: Float32,
    tokens: Float32,
    scored_pixel: Int32,
    image_size: int = 224,
    output_size: int | None = None,
) -> Float32:
    """P X P^T per channel at the scored pixels, X the image of interpolated tokens, 0 off the foreground."""
    pool, width = pooling_matrix(image_size, output_size), tokens.shape[1]
    nearest, weights = nearest_three(points, centers)
    image = np.zeros((image_size * image_size, width), np.float32)
    image[point_pixel] = (tokens[nearest] * weights[..., None]).sum(1)
    pooled = np.einsum("ay,yxd->axd", pool, image.reshape(image_size, image_size, width), optimize=True)
    pooled = np.einsum("bx,axd->abd", pool, pooled, optimize=True).reshape(-1, width)
    return np.asarray(pooled[scored_pixel])
