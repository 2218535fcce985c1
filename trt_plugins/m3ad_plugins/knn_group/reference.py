"""The specification of KnnGroup in plain NumPy: every other form is tested against it. Unchecked and slow.

Grouping follows Point-MAE (Pang et al. 2022).
"""

import numpy as np

from m3ad_plugins.arithmetic import squared_distance
from m3ad_plugins.arrays import Float32, Int32


def knn_group(points: Float32, idx: Int32, group_size: int) -> tuple[Float32, Int32]:
    """The group_size points nearest to each centre, ordered by (distance, index)."""
    knn_idx = np.stack(
        [squared_distance(points, points[i]).argsort(kind="stable")[:group_size] for i in idx]
    ).astype(np.int32)
    return points[knn_idx] - points[idx][:, None], knn_idx
