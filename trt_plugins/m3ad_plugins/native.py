"""The portable C++ ops, called through ctypes (which lets go of the GIL). Inputs are already checked."""

import ctypes
import os
import warnings
from collections.abc import Sequence
from functools import lru_cache
from mmap import mmap
from typing import Any

import numpy as np
from m3ad.errors import M3adError

from m3ad_plugins import build
from m3ad_plugins.arrays import Features, Float32, Int32, Sparse

ROW_CAPACITY = 48  # kROW_CAPACITY in cpp/ops.hpp

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_float
_SIGNATURES = {
    "farthest_point_sample": [_POINTER, _POINTER, _INT, _INT, _INT, _FLOAT, _POINTER],
    "knn_group": [_POINTER, _POINTER, _INT, _INT, _POINTER, _INT, _INT, _POINTER, _POINTER, _INT],
    "point_group": [_POINTER, _POINTER, *[_INT] * 3, _FLOAT, _INT, *[_POINTER] * 3, _INT],
    "interpolation_operator": [
        _POINTER,
        _POINTER,
        _INT,
        _POINTER,
        _INT,
        _POINTER,
        _INT,
        _INT,
        *[_POINTER] * 3,
        _INT,
    ],
    "apply_rows": [*[_POINTER] * 3, _INT, _POINTER, _INT, _POINTER, _INT],
    "cosine_scores": [_POINTER, _POINTER, _INT, _INT, _POINTER, _INT],
    "one_class_svm": [_POINTER, _INT, _INT, _POINTER, _POINTER, _INT, _FLOAT, _INT, _FLOAT, _POINTER, _INT],
}


class _Blocks(ctypes.Structure):
    """Blocks in cpp/ops.hpp."""

    _fields_ = (("values", _POINTER), ("widths", _POINTER), ("count", _INT), ("width", _INT))


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The library of these sources, built at first use; None after one warning that says what is slower."""
    wanted = (build.source_hash() or "").encode()  # a package without sources takes the library it came with
    paths = [path for path in build.library_paths() if path.is_file()]
    # The hash is read, not asked for: a stale library that was loaded once would keep its name.
    found = next((path for path in paths if wanted in path.read_bytes()), None)
    try:
        loaded = ctypes.CDLL(str(found or build.build()))
    except M3adError as error:
        warnings.warn(
            f"m3ad's native ops are missing, so sampling, grouping and interpolation run in NumPy, 10 to 100 times "
            f"slower: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    for name, arguments in _SIGNATURES.items():
        getattr(loaded, f"m3ad_{name}").argtypes = arguments
    return loaded


def threads() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _call(name: str, *arguments: Any) -> None:
    found = library()
    assert found is not None  # ops takes the NumPy form otherwise
    plain = [a.ctypes.data if isinstance(a, np.ndarray) else a for a in arguments]
    if getattr(found, f"m3ad_{name}")(*plain) != 0:
        raise MemoryError(f"{name}: not enough memory or threads")


def farthest_point_sample(
    points: Float32, num_samples: int, min_norm_sq: float, point_pixel: Int32 | None, image_size: int
) -> Int32:
    """As `reference.farthest_point_sample`."""
    idx = np.empty(num_samples, np.int32)
    _call(
        "farthest_point_sample", points, point_pixel, len(points), image_size, num_samples, min_norm_sq, idx
    )
    return idx


def knn_group(
    points: Float32, idx: Int32, group_size: int, point_pixel: Int32 | None, image_size: int
) -> tuple[Float32, Int32]:
    """As `reference.knn_group`."""
    knn_idx = np.empty((len(idx), group_size), np.int32)
    neighborhood = np.empty((*knn_idx.shape, 3), np.float32)
    sizes = (len(points), image_size)
    groups = (idx, len(idx), group_size)
    _call("knn_group", points, point_pixel, *sizes, *groups, neighborhood, knn_idx, threads())
    return neighborhood, knn_idx


def point_group(
    points: Float32,
    num_samples: int,
    group_size: int,
    min_norm_sq: float,
    point_pixel: Int32 | None,
    image_size: int,
) -> tuple[Int32, Float32, Int32]:
    """Both of the above over the same tiles: idx, neighborhood, knn_idx."""
    idx = np.empty(num_samples, np.int32)
    knn_idx = np.empty((num_samples, group_size), np.int32)
    neighborhood = np.empty((*knn_idx.shape, 3), np.float32)
    sizes = (len(points), image_size, num_samples, min_norm_sq, group_size)
    _call("point_group", points, point_pixel, *sizes, idx, neighborhood, knn_idx, threads())
    return idx, neighborhood, knn_idx


def interpolation_operator(
    points: Float32, point_pixel: Int32, centers: Float32, scored_pixel: Int32, image_size: int
) -> tuple[Int32, Int32, Float32]:
    """The linear map of `reference.token_interpolate`: indptr, indices, weights of its rows."""
    rows = len(scored_pixel)
    indptr = np.empty(rows + 1, np.int32)
    # Room for every row at its widest, of which a few per cent are touched. NumPy asks for huge pages for arrays of
    # this size, and clearing those took 20 ms of a frame (measured); plain pages are cleared as they are touched.
    room = max(rows, 1) * ROW_CAPACITY * 4
    indices, weights = np.frombuffer(mmap(-1, room), np.int32), np.frombuffer(mmap(-1, room), np.float32)
    clouds = (points, point_pixel, len(points), centers, len(centers))
    _call(
        "interpolation_operator", *clouds, scored_pixel, rows, image_size, indptr, indices, weights, threads()
    )
    count = int(indptr[rows])
    return indptr, indices[:count].copy(), weights[:count].copy()


def _pointers(arrays: Sequence[Float32]) -> Any:
    return (_POINTER * len(arrays))(*(array.ctypes.data for array in arrays))


def _widths(arrays: Sequence[Float32]) -> Any:
    return (_INT * len(arrays))(*(array.shape[1] for array in arrays))


def apply_rows(rows: Sparse, table: Float32, out: Float32, num_threads: int | None = None) -> None:
    """The sparse rows times a table [G, D] into out."""
    _call("apply_rows", *rows, len(out), table, table.shape[1], out, num_threads or threads())


def cosine_scores(
    features: Sequence[Features],
    reconstructed: Sequence[Sequence[Float32]],
    num_threads: int | None = None,
) -> Float32:
    """As `reference.cosine_scores`, sparse rows formed a few at a time."""
    scores = np.empty((len(features), len(reconstructed[0][0])), np.float32)
    parts = [0 if part is None else part.ctypes.data for each in features for part in each]
    arrays = [(_pointers(each), _widths(each)) for each in reconstructed]  # alive until the call is over
    blocks = [
        _Blocks(ctypes.addressof(values), ctypes.addressof(widths), len(widths), sum(widths))
        for values, widths in arrays
    ]
    packed = (_POINTER * len(parts))(*parts), (_Blocks * len(blocks))(*blocks)
    _call("cosine_scores", *packed, *scores.shape, scores, num_threads or threads())
    return scores


def one_class_svm(
    x: Float32, support_vectors: Float32, coefficients: Float32, rho: float, kernel: str, gamma: float
) -> Float32:
    """As `reference.one_class_svm`."""
    decision = np.empty(len(x), np.float32)
    model = (support_vectors, coefficients, len(support_vectors), rho, int(kernel == "rbf"), gamma)
    _call("one_class_svm", x, len(x), x.shape[1], *model, decision, threads())
    return decision
