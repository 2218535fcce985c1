"""What an installed package can prove of its ops on its machine: each form there is against its reference."""

import importlib.util
from typing import Any

import numpy as np

from m3ad_plugins import native, ops
from m3ad_plugins.farthest_point_sample import reference as sampling
from m3ad_plugins.fpfh import in_numpy as histograms_in_numpy
from m3ad_plugins.knn_group import reference as grouping
from m3ad_plugins.library import TENSORRT_MODULES, Finding, check_plugin_library, check_registry
from m3ad_plugins.nearest_row import reference as nearest
from m3ad_plugins.one_class_svm import reference as svm
from m3ad_plugins.token_interpolate import reference as interpolation

SIDE = 224
GROUPS, GROUP_SIZE, WIDTH = 128, 32, 16


def check_ops() -> list[Finding]:
    """The C++ form against the references, then the plugin library and the registry of every TensorRT here.

    The library is asked for only where there is a TensorRT that could load it.
    """
    found = [_check_native()]
    if modules := [name for name in TENSORRT_MODULES if importlib.util.find_spec(name)]:
        found += [check_plugin_library(), *(check_registry(name) for name in modules)]
    return found


def _check_native() -> Finding:
    subject = "C++ ops"
    if native.library() is None:
        return Finding(
            subject, False, "not built", "install a C++ compiler and run: python -m m3ad_plugins.build"
        )
    rng = np.random.default_rng(0)
    pixel = np.sort(rng.choice(SIDE * SIDE, 3000, replace=False)).astype(np.int32)
    plane = np.stack([pixel % SIDE, pixel // SIDE, np.zeros_like(pixel)], 1)
    points = (plane / SIDE + rng.normal(0, 1e-3, plane.shape)).astype(np.float32)
    idx = ops.farthest_point_sample(points, GROUPS, point_pixel=pixel)
    exact: list[tuple[Any, Any]] = [(idx, sampling.farthest_point_sample(points, GROUPS))]
    exact += zip(
        ops.knn_group(points, idx, GROUP_SIZE), grouping.knn_group(points, idx, GROUP_SIZE), strict=True
    )
    tokens = rng.normal(0, 1, (GROUPS, WIDTH)).astype(np.float32)
    exact += zip(ops.nearest_row(points, points[idx]), nearest.nearest_row(points, points[idx]), strict=True)
    inputs = (points, pixel, points[idx], tokens, interpolation.scored_pixels(pixel, SIDE))
    close: list[tuple[Any, Any]] = [
        (ops.token_interpolate(*inputs), interpolation.token_interpolate(*inputs))
    ]
    described, expected = ops.fpfh(points, pixel), histograms_in_numpy(points, pixel, None, SIDE)
    exact.append((described[1], expected[1]))  # normals
    close.append((described[0], expected[0]))
    vectors, coefficients = tokens[:8], np.linspace(-1, 1, 8, dtype=np.float32)
    for kernel in ops.KERNELS:
        model = (tokens, vectors, coefficients, 0.5, kernel, 0.1)
        close.append((ops.one_class_svm(*model), svm.one_class_svm(*model)))
    same = all(np.array_equal(a, b) for a, b in exact)
    deviation = max(float(np.abs(a - b).max()) for a, b in close)
    # fp32 sums of a few dozen terms of size 1
    if not same or deviation > 1e-4:
        what = f"values by {deviation:.1e}" if same else "indices or normals"
        return Finding(
            subject, False, f"differ from the references in {what}", "report it, with the compiler's version"
        )
    return Finding(
        subject, True, f"equal the references, indices and normals exactly, values within {deviation:.1e}"
    )
