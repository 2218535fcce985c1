"""The specification of the m3ad ops: plain NumPy, a few lines each; every other form is tested against it.

Distances are direct fp32 differences summed as (dx*dx + dy*dy) + dz*dz, each step rounded; ties go to the
lowest index. It checks nothing (`ops` does) and is slow: [N, G] matrices are formed as the formulas say.

Sampling and grouping follow Point-MAE (Pang et al. 2022), interpolation PointNet++ (Qi et al. 2017, section
3.4) and the pooling of M3DM (Wang et al. 2023).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from m3ad_plugins.arrays import Float32, Int32

NEIGHBORS = 3
DISTANCE_EPS = np.float32(1e-8)


def squared_distance(a: Float32, b: Float32) -> Float32:
    """|a - b|^2 over the last axis, which is xyz; the other axes broadcast."""
    x, y, z = (a[..., axis] - b[..., axis] for axis in range(3))
    return np.asarray((x * x + y * y) + z * z, np.float32)


def farthest_point_sample(points: Float32, num_samples: int, min_norm_sq: float = 0.0) -> Int32:
    """s_0 = 0, s_k = argmax_n min_{j<k} |p_n - p_{s_j}|^2; see `ops.farthest_point_sample`."""
    closest = np.full(len(points), np.inf, np.float32)
    if min_norm_sq > 0:
        closest[squared_distance(points, np.zeros(3, np.float32)) <= np.float32(min_norm_sq)] = -1
    idx = np.zeros(num_samples, np.int32)
    for k in range(1, num_samples):
        closest = np.minimum(closest, squared_distance(points, points[idx[k - 1]]))
        idx[k] = closest.argmax()
    return idx


def knn_group(points: Float32, idx: Int32, group_size: int) -> tuple[Float32, Int32]:
    """The group_size points nearest to each centre, ordered by (distance, index); see `ops.knn_group`."""
    knn_idx = np.stack(
        [squared_distance(points, points[i]).argsort(kind="stable")[:group_size] for i in idx]
    ).astype(np.int32)
    return points[knn_idx] - points[idx][:, None], knn_idx


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


def pooling_matrix(image_size: int) -> Float32:
    """P [H, H] of one axis: AvgPool(3, stride 1, no padding) to H - 2, then AdaptiveAvgPool back to H."""
    inner = image_size - 2
    average, adaptive = np.zeros((inner, image_size)), np.zeros((image_size, inner))
    for i in range(inner):
        average[i, i : i + 3] = 1 / 3
    for o in range(image_size):
        start, stop = o * inner // image_size, -(-(o + 1) * inner // image_size)
        adaptive[o, start:stop] = 1 / (stop - start)
    return (adaptive @ average).astype(np.float32)


def scored_pixels(point_pixel: Int32, image_size: int = 224) -> Int32:
    """The pixels with a foreground pixel under the pooling's taps, ascending: P F P^T > 0, F the foreground."""
    foreground = np.zeros((image_size, image_size), np.int64)
    foreground.reshape(-1)[point_pixel] = 1
    taps = (pooling_matrix(image_size) > 0).astype(np.int64)
    return np.flatnonzero(taps @ foreground @ taps.T).astype(np.int32)


def token_interpolate(
    points: Float32,
    point_pixel: Int32,
    centers: Float32,
    tokens: Float32,
    scored_pixel: Int32,
    image_size: int = 224,
) -> Float32:
    """P X P^T per channel at the scored pixels, X the image of interpolated tokens, 0 off the foreground; see `ops`."""
    pool, width = pooling_matrix(image_size), tokens.shape[1]
    nearest, weights = nearest_three(points, centers)
    image = np.zeros((image_size * image_size, width), np.float32)
    image[point_pixel] = (tokens[nearest] * weights[..., None]).sum(1)
    pooled = np.einsum("ay,yxd->axd", pool, image.reshape(image_size, image_size, width), optimize=True)
    pooled = np.einsum("bx,axd->abd", pool, pooled, optimize=True).reshape(-1, width)
    return np.asarray(pooled[scored_pixel])


def cosine_scores(features: Sequence[Float32], reconstructed: Sequence[Sequence[Float32]]) -> Float32:
    """|F/|F| - F~/|F~||^2 / 2 of each pair, in fp64; see `ops.cosine_scores`."""

    def unit(rows: Float32) -> NDArray[np.float64]:
        norm = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
        return np.asarray(rows / np.maximum(norm, 1e-12))

    pairs = zip(features, map(np.hstack, reconstructed), strict=True)
    return np.stack([((unit(a) - unit(b)) ** 2).sum(1) / 2 for a, b in pairs]).astype(np.float32)


def one_class_svm(
    x: Float32,
    support_vectors: Float32,
    coefficients: Float32,
    rho: float,
    kernel: str = "linear",
    gamma: float = 1.0,
) -> Float32:
    """sum_k c_k k(v_k, x) - rho, k(v, x) = v.x or exp(-gamma |v - x|^2), in fp64; see `ops.one_class_svm`."""
    x64, vectors = x.astype(np.float64), support_vectors.astype(np.float64)
    if kernel == "linear":
        gram = x64 @ vectors.T
    else:
        gram = np.stack([np.exp(-gamma * ((x64 - v) ** 2).sum(1)) for v in vectors], 1)
    return (gram @ coefficients.astype(np.float64) - rho).astype(np.float32)
