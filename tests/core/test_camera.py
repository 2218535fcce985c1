"""Depth images become the points that a projection written here by hand takes back to their pixels."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from m3ad.camera import Camera, read_camera, xyz_from_depth
from m3ad.errors import ArtifactError, FrameError
from m3ad.frame_settings import Preprocessing
from m3ad.frames import find_pairs, find_samples, read_frame, read_sample
from m3ad.holes import measured
from PIL import Image

WIDTH, HEIGHT = 96, 64
FLAT: dict[str, Any] = {"width": WIDTH, "height": HEIGHT, "fx": 90.0, "fy": 92.0, "cx": 47.3, "cy": 30.8}
CAMERA = Camera(**FLAT)


def pixel_of(point: np.ndarray, camera: Camera) -> tuple[float, float]:
    """Brown-Conrady as it stands in the textbooks, one point at a time."""
    k1, k2, p1, p2, k3, k4, k5, k6 = [*camera.distortion, *[0.0] * 8][:8]
    x, y = point[0] / point[2], point[1] / point[2]
    r = math.hypot(x, y)
    radial = (1 + k1 * r**2 + k2 * r**4 + k3 * r**6) / (1 + k4 * r**2 + k5 * r**4 + k6 * r**6)
    bent_x = x * radial + (2 * p1 * x * y + p2 * (r**2 + 2 * x**2))
    bent_y = y * radial + (p1 * (r**2 + 2 * y**2) + 2 * p2 * x * y)
    return camera.fx * bent_x + camera.cx, camera.fy * bent_y + camera.cy


def depth_m() -> np.ndarray:
    v, u = np.indices((HEIGHT, WIDTH))
    return 0.5 + 0.04 * np.sin(u / 9) + 0.002 * v


def write(
    folder: Path, depth: np.ndarray, suffix: str = ".png", camera: dict[str, Any] | None = FLAT
) -> Path:
    """A picture in rgb/, a depth image in depth/, its camera above them."""
    for name in ("rgb", "depth"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", depth.shape[::-1]).save(folder / "rgb/000.png")
    path = folder / f"depth/000{suffix}"
    if suffix == ".png":
        Image.fromarray(depth).save(path)
    elif suffix == ".npy":
        np.save(path, depth)
    else:
        tifffile.imwrite(path, depth)
    if camera is not None:
        (folder / "intrinsics.json").write_text(json.dumps(camera))
    return path


@settings(max_examples=20, deadline=None)
@given(
    distortion=st.one_of(
        st.just(()),
        st.tuples(st.floats(-0.15, 0.2), st.floats(-0.03, 0.03), *[st.floats(-3e-3, 3e-3)] * 2),
        st.tuples(
            st.floats(-0.15, 0.2),
            st.floats(-0.03, 0.03),
            *[st.floats(-3e-3, 3e-3)] * 2,
            st.floats(-0.01, 0.01),
        ),
        st.tuples(*[st.floats(0, 0.3)] * 2, *[st.floats(-1e-3, 1e-3)] * 2, *[st.floats(0, 0.2)] * 4),
    ),
    fx=st.floats(110, 200),
    cx=st.floats(30, 60),
)
def test_every_point_projects_to_its_pixel(distortion, fx, cx):
    camera = Camera(**{**FLAT, "fx": fx, "cx": cx}, distortion=distortion)
    depth = depth_m()
    xyz = xyz_from_depth(depth, camera)
    np.testing.assert_allclose(xyz[..., 2], depth, rtol=1e-6)
    for v in (0, 17, HEIGHT - 1):
        for u in (0, 40, WIDTH - 1):
            found = pixel_of(xyz[v, u].astype(np.float64), camera)
            assert found == pytest.approx((u, v), abs=1e-3)  # of 0.5 m: 6 micrometres


@pytest.mark.parametrize("suffix", [".png", ".tiff", ".npy"])
@pytest.mark.parametrize(("dtype", "scale", "units"), [
    ("uint16", None, 1000), ("uint16", 1e-4, 10000), ("uint16", 5000.0, 5000), ("float32", None, 1),
    ("float32", 0.001, 1000), ("float64", 1.0, 1),
])  # fmt: skip
def test_files_of_every_kind_give_points_within_a_millimetre(tmp_path, suffix, dtype, scale, units):
    if suffix == ".png" and dtype != "uint16":
        suffix = ".tif"
    depth = depth_m()
    holes = np.random.default_rng(0).random(depth.shape) < 0.05
    stored = np.where(holes, 0, depth * units)
    stored = stored.round().astype(dtype) if dtype == "uint16" else stored.astype(dtype)
    write(tmp_path, stored, suffix, {**FLAT, "depth_scale": scale} if scale else FLAT)
    (sample,) = find_pairs(tmp_path)
    xyz = read_sample(sample).xyz
    np.testing.assert_array_equal(measured(xyz), ~holes)
    v, u = np.indices(depth.shape)
    expected = np.stack([(u - 47.3) / 90 * depth, (v - 30.8) / 92 * depth, depth], axis=-1)
    assert np.linalg.norm(xyz - expected, axis=-1)[~holes].max() < 1e-3
    assert (xyz[holes] == 0).all()


MATRIX = [90.0, 0, 0, 0, 92.0, 0, 47.3, 30.8, 1]
SIZE = {"width": WIDTH, "height": HEIGHT}
REALSENSE = {**SIZE, "fx": 90.0, "fy": 92.0, "ppx": 47.3, "ppy": 30.8, "model": "distortion.brown_conrady"}


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (FLAT, CAMERA),
        ({**SIZE, "intrinsic_matrix": MATRIX}, CAMERA),
        ({**SIZE, "intrinsic_matrix": np.reshape(MATRIX, (3, 3)).T.ravel().tolist()}, CAMERA),
        ({**REALSENSE, "coeffs": [0.1, 0, 0, 0, 0]}, Camera(**FLAT, distortion=(0.1, 0, 0, 0, 0))),
        (
            {**REALSENSE, "model": "inverse_brown_conrady", "coeffs": [0.0] * 5},
            Camera(**FLAT, distortion=(0.0,) * 5),
        ),
        ({**FLAT, "depth_scale": 0.001}, Camera(**FLAT, depth_scale=0.001)),
        ({**FLAT, "depth_scale": 1000}, Camera(**FLAT, depth_scale=0.001)),
    ],
)
def test_intrinsics_of_every_tool_are_one_camera(tmp_path, document, expected):
    (tmp_path / "camera.json").write_text(json.dumps(document))
    camera = read_camera(tmp_path / "camera.json")
    assert camera == expected
    record = Preprocessing(camera=camera).to_json()
    assert Preprocessing.from_json(json.loads(json.dumps(record))).camera == camera


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fx": None}, r"camera.json is damaged: Expected `float`, got `null` - at `\$.fx`"),
        ({"fx": -1}, "focal lengths above 0"),
        ({"width": 0}, "sizes and focal lengths above 0"),
        ({"depth_scale": 0}, "depth_scale must be above 0, got 0"),
        ({"distortion": [0.1, 0.2]}, "distortion has 2 coefficients, expected 4, 5 or 8"),
        (
            {"model": "inverse_brown_conrady", "coeffs": [0.1]},
            "which maps the other way; rectify the depth image",
        ),
        ({"intrinsic_matrix": [1, 2, 3]}, "its intrinsic_matrix has 3 numbers, expected 9"),
        ({"intrinsic_matrix": [90.0, 0, 0, 5, 92.0, 0, 47.3, 30.8, 1]}, "is none of a camera without skew"),
    ],
)
def test_intrinsics_that_cannot_be_used_are_named(tmp_path, change, message):
    (tmp_path / "camera.json").write_text(json.dumps({**FLAT, **change}))
    with pytest.raises(
        ArtifactError, match=rf"camera.json.*{message}" if "damaged" not in message else message
    ):
        read_camera(tmp_path / "camera.json")


def test_a_depth_image_needs_its_camera(tmp_path):
    path = write(tmp_path / "a/b/c/d", (depth_m() * 1000).astype(np.uint16), camera=None)
    rgb = tmp_path / "a/b/c/d/rgb/000.png"
    with pytest.raises(
        FrameError, match=r"000.png is a depth image \[64, 96\] without its camera; put intrinsics.json"
    ):
        read_frame(rgb, path)
    expected = read_frame(rgb, path, camera=CAMERA).xyz
    (tmp_path / "a/b/c/camera.json").write_text(json.dumps({**FLAT, "fx": 45.0}))
    beside = read_frame(rgb, path, camera=CAMERA).xyz  # the frames' own file says more than the detector's
    np.testing.assert_allclose(beside[..., 0], 2 * expected[..., 0], rtol=1e-5)
    (tmp_path / "a/b/c/camera.json").write_text(json.dumps({**FLAT, "width": 90}))
    with pytest.raises(
        FrameError, match=r"000.png: the depth image is 96x64 pixels but its camera 90x64; give the intr"
    ):
        read_frame(rgb, path)
    (tmp_path / "a/b/c/camera.json").write_text(json.dumps({**FLAT, "distortion": [9, 0, 0, 0, -300]}))
    with pytest.raises(FrameError, match=r"cannot be undone up to the image's corners; check its order"):
        read_frame(rgb, path)
    eight = tmp_path / "eight.png"
    Image.new("L", (WIDTH, HEIGHT)).save(eight)
    with pytest.raises(
        FrameError, match=r"eight.png is uint8 \[64, 96\], expected a depth image \[H, W\] of 16 bits"
    ):
        read_frame(rgb, eight, camera=CAMERA)


def test_categories_may_hold_depth_images(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / split / "good", (depth_m() * 1000).astype(np.uint16), camera=None)
    (tmp_path / "intrinsics.json").write_text(json.dumps(FLAT))
    for split in ("train", "test"):
        (sample,) = find_samples(tmp_path, split)
        assert read_sample(sample).xyz[0, 0, 2] == pytest.approx(depth_m()[0, 0], abs=5e-4)
    (tmp_path / "train/good/rgb/000.png").rename(tmp_path / "train/good/rgb/001.png")
    with pytest.raises(FrameError, match=r"depth/000.png has no image .* of the same name"):
        find_samples(tmp_path, "train")
