import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_input
from m3ad.errors import ArtifactError, MissingDependencyError
from m3ad.scored import scored_pixels
from m3ad_export.baselines.forms import FORMS, cfm, runner
from m3ad_export.dense import torch_ops
from m3ad_export.dense.cfm import random_mappings
from m3ad_export.detector import Detector
from m3ad_export.torch_stages import stage_functions
from m3ad_plugins import ops
from m3ad_plugins.farthest_point_sample.reference import farthest_point_sample
from m3ad_plugins.token_interpolate import reference
from m3ad_runtime.pipeline import Pipeline, model_arrays
from scipy.ndimage import uniform_filter


def cloud(points: int = 1500) -> tuple[np.ndarray, np.ndarray]:
    frame = make_input(points)
    return frame.points, frame.point_pixel


def test_torch_ops_are_the_reference_s() -> None:
    points, pixel = cloud()
    idx = torch_ops.farthest_points(torch.from_numpy(points), 64)
    np.testing.assert_array_equal(idx, farthest_point_sample(points, 64))
    centers = points[idx]
    nearest, weights = torch_ops.three_nearest(torch.from_numpy(points), torch.from_numpy(centers))
    expected_nearest, expected_weights = reference.nearest_three(points, centers)
    np.testing.assert_array_equal(nearest, expected_nearest)
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-4)
    tokens = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32)
    operator = ops.interpolation_operator(points, pixel, centers, scored_pixels(pixel))
    rows = torch_ops.pooled(
        torch_ops.interpolated(torch.from_numpy(tokens), nearest, weights), torch.from_numpy(pixel)
    )
    scored = torch_ops.scored_pixels(torch.from_numpy(pixel))
    np.testing.assert_array_equal(scored, operator.scored_pixel)
    np.testing.assert_allclose(rows[scored], operator.apply(tokens), atol=1e-5)
    outside = np.setdiff1d(np.arange(224 * 224), scored.numpy())
    assert not rows[outside].any()


def test_points_near_the_origin_are_not_sampled() -> None:
    points, _ = cloud()
    points = points - points.mean(axis=0)
    idx = torch_ops.farthest_points(torch.from_numpy(points), 200, min_norm_sq=1e-3)
    np.testing.assert_array_equal(idx, farthest_point_sample(points, 200, 1e-3))


@pytest.mark.parametrize("form", ["dense", "fused"])
def test_the_map_is_the_chain_s(tiny_detector: Detector, form: str) -> None:
    frame = make_input(2000)
    pipeline = Pipeline(tiny_detector.contract.steps("chain"), stage_functions(tiny_detector))
    expected, _ = pipeline.run(model_arrays(frame))
    tensors = [torch.from_numpy(a) for a in (frame.image, frame.points, frame.point_pixel)]
    with torch.inference_mode():
        found = FORMS[form](tiny_detector)(*tensors)
    np.testing.assert_allclose(found, expected["anomaly_map"], atol=1e-4)


def test_cfm_is_the_smoothed_product_of_two_chords(tiny_detector: Detector) -> None:
    frame = make_input(2000)
    tensors = [torch.from_numpy(a) for a in (frame.image, frame.points, frame.point_pixel)]
    with torch.inference_mode():
        maps = random_mappings(tiny_detector)
        found = cfm(tiny_detector)(*tensors).numpy()
        stage = stage_functions(tiny_detector)
        tokens = {
            **stage["rgb_extractor"](model_arrays(frame)),
            **stage["xyz_extractor"](model_arrays(frame)),
        }
        rows = stage["project"]({**model_arrays(frame), **tokens})
        real = [torch.from_numpy(rows[n]).double() for n in ("rgb_features", "xyz_features")]
        made = maps.double()(*real)
    chords = [
        np.linalg.norm((a / a.norm(dim=1, keepdim=True) - b / b.norm(dim=1, keepdim=True)).numpy(), axis=1)
        for a, b in zip(real, made, strict=True)
    ]
    grid = np.zeros(224 * 224)
    grid[frame.scored_pixel] = chords[0] * chords[1]
    grid = grid.reshape(224, 224)
    for size in (5, 5, 5, 5, 5, 7, 7, 7):
        grid = uniform_filter(grid, size, mode="constant")
    np.testing.assert_allclose(found, grid, rtol=1e-3, atol=1e-4)


def test_no_detector_and_no_device_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no detector of this version"):
        runner("dense", tmp_path, 2, "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(
            MissingDependencyError, match="sees no CUDA device here; measure with --device cpu"
        ):
            runner("dense", tmp_path, 2, "cuda")


def test_the_worker_says_why_it_cannot_start(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "m3ad_export.baselines", "dense", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=True)
    assert "holds no detector of this version" in json.loads(done.stdout)["error"]
