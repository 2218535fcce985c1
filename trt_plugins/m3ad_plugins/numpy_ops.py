"""The ops in vectorised NumPy and SciPy: the form that serves when the native library is not built.

Same results as `reference` (identical indices), without its [N, G] matrices. Inputs are already checked.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy import sparse

from m3ad_plugins import reference
from m3ad_plugins.arrays import Features, Float32, Int32, Sparse

CHUNK = 512  # points per step: a [CHUNK, 1024] fp32 block and its temporaries stay in cache

one_class_svm = reference.one_class_svm


def farthest_point_sample(
    points: Float32, num_samples: int, min_norm_sq: float, point_pixel: Int32 | None, image_size: int
) -> Int32:
    """As `reference.farthest_point_sample`; where the points lie in the image is of no use here."""
    return reference.farthest_point_sample(points, num_samples, min_norm_sq)


def knn_group(
    points: Float32, idx: Int32, group_size: int, point_pixel: Int32 | None, image_size: int
) -> tuple[Float32, Int32]:
    """As `reference.knn_group`, sorting only the points not farther than the group_size-th."""
    knn_idx = np.empty((len(idx), group_size), np.int32)
    for row, center in zip(knn_idx, points[idx], strict=True):
        distance = reference.squared_distance(points, center)
        near = np.flatnonzero(distance <= np.partition(distance, group_size - 1)[group_size - 1])
        row[:] = near[distance[near].argsort(kind="stable")[:group_size]]
    return points[knn_idx] - points[idx][:, None], knn_idx


def point_group(
    points: Float32,
    num_samples: int,
    group_size: int,
    min_norm_sq: float,
    point_pixel: Int32 | None,
    image_size: int,
) -> tuple[Int32, Float32, Int32]:
    """Both of the above: idx, neighborhood, knn_idx."""
    idx = reference.farthest_point_sample(points, num_samples, min_norm_sq)
    return idx, *knn_group(points, idx, group_size, point_pixel, image_size)


@lru_cache(maxsize=2)
def _pooling_operator(image_size: int) -> sparse.csr_matrix:
    """Kronecker product of P with itself, [image_size^2, image_size^2]: both axes of the pooling at once."""
    pool = sparse.csr_matrix(reference.pooling_matrix(image_size))
    return sparse.csr_matrix(sparse.kron(pool, pool, format="csr"))


def interpolation_operator(
    points: Float32, point_pixel: Int32, centers: Float32, scored_pixel: Int32, image_size: int
) -> tuple[Int32, Int32, Float32]:
    """The linear map of `reference.token_interpolate`: indptr, indices, weights of its rows."""
    count, pixels = len(points), image_size * image_size
    parts = [reference.nearest_three(points[i : i + CHUNK], centers) for i in range(0, count, CHUNK)]
    nearest, weights = (np.concatenate(part) for part in zip(*parts, strict=True))
    rows = np.repeat(point_pixel, reference.NEIGHBORS)
    image = sparse.csr_matrix(
        (weights.reshape(-1), (rows, nearest.reshape(-1))), shape=(pixels, len(centers)), dtype=np.float32
    )
    operator = sparse.csr_matrix(_pooling_operator(image_size)[scored_pixel] @ image)
    operator.sort_indices()
    return (
        operator.indptr.astype(np.int32),
        operator.indices.astype(np.int32),
        np.asarray(operator.data, np.float32),
    )


def apply_rows(rows: Sparse, table: Float32, out: Float32, num_threads: int | None = None) -> None:
    """The sparse rows times a table [G, D] into out, on one thread whatever is asked for."""
    indptr, indices, weights = rows
    first, last = indptr[0], indptr[-1]
    parts = (weights[first:last], indices[first:last], indptr - first)
    out[:] = sparse.csr_matrix(parts, shape=(len(out), len(table))) @ table


def cosine_scores(
    features: Sequence[Features],
    reconstructed: Sequence[Sequence[Float32]],
    num_threads: int | None = None,
) -> Float32:
    """As `reference.cosine_scores`, of rows that may still have to be formed."""
    formed = []
    for indptr, indices, weights, values in features:
        rows = values
        if indptr is not None and indices is not None and weights is not None:
            rows = np.empty((len(indptr) - 1, values.shape[1]), np.float32)
            apply_rows((indptr, indices, weights), values, rows)
        formed.append(rows)
    return reference.cosine_scores(formed, reconstructed)
