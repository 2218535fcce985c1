"""The specification of FarthestPointSample in plain NumPy: every other form is tested against it. Unchecked and slow.

Sampling follows Point-MAE (Pang et al. 2022).
"""

import numpy as np

from m3ad_plugins.arithmetic import squared_distance
from m3ad_plugins.arrays import Float32, Int32


def farthest_point_sample(
    points: Float32, num_samples: int, min_norm_sq: float = 0.0, point_pixel: Int32 | None = None
) -> Int32:
    """s_0 = 0, s_k = argmax_n min_{j<k} |p_n - p_{s_j}|^2; nothing depends on `point_pixel`, which is for speed."""
    closest = np.full(len(points), np.inf, np.float32)
    if min_norm_sq > 0:
        closest[squared_distance(points, np.zeros(3, np.float32)) <= np.float32(min_norm_sq)] = -1
    idx = np.zeros(num_samples, np.int32)
    for k in range(1, num_samples):
        closest = np.minimum(closest, squared_distance(points, points[idx[k - 1]]))
        idx[k] = closest.argmax()
    return idx
