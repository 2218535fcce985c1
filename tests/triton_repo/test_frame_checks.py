"""Frames whose answers are known: what `prepare` and `judge` have to say of them."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from m3ad.bundle import Bundle
from m3ad.camera import Camera
from m3ad.regions import Regions
from m3ad_triton.frame_checks import FrameCheck, frame_checks
from m3ad_triton.golden import Golden
from m3ad_triton.repository import Repository, write_repository
from serving import renamed

CAMERA = Camera(width=320, height=240, fx=300.0, fy=300.0, cx=160.0, cy=120.0)
SUPPORT = (0.0, 0.1, 1.0, -0.7)  # 0.7 m away and tilted


def checks(
    bundle: Bundle, folder: Path, changes: dict[str, Any], door: dict[str, Any] | None = None
) -> tuple[FrameCheck, FrameCheck]:
    """Of `prepare` and `judge`."""
    path = renamed(bundle, "plate", folder)
    Bundle.open(path).update(preprocessing={**bundle.manifest.preprocessing, **changes})
    repository = write_repository(path, folder / "repository", "onnxruntime", "fused", **(door or {}))
    _, first, second = frame_checks(repository, Golden.read(repository.path, repository.manifest))
    return first, second


@pytest.mark.parametrize(
    ("changes", "door"),
    [
        ({}, {}),
        ({"plane": "ransac", "extent_m": 0.02}, {}),
        ({"plane": "fixed", "plane_coefficients": SUPPORT, "extent_m": 0.3}, {}),
        ({"plane": "ransac", "extent_m": 0.2}, {"depth": "uint16", "camera": CAMERA}),
        ({"extent_m": 0.1}, {"depth": "float32", "camera": CAMERA}),
    ],
)
def test_the_plate_is_a_part_wherever_it_can_be(
    tiny_bundle: Bundle, tmp_path: Path, changes: dict[str, Any], door: dict[str, Any]
) -> None:
    first, second = checks(tiny_bundle, tmp_path, changes, door)
    assert not isinstance(first.answer, str), first.answer
    points = first.answer["points"]
    height, width = first.inputs["rgb"].shape[:2]
    assert len(points) == pytest.approx((0.3 * min(224, 224 * width / height)) ** 2 * height / width, rel=0.1)
    size = np.linalg.norm(np.ptp(points, axis=0)[:2])
    assert size == pytest.approx(changes.get("extent_m", 0.1), rel=0.3)
    assert not isinstance(second.answer, str)
    defects = json.loads(second.answer["defects"].item())
    assert second.answer["verdict"].tolist() == [2]
    assert defects
    assert defects[0]["peak"] == pytest.approx(second.inputs["anomaly_map"].max(), rel=0.01)


def test_a_plate_that_a_line_cannot_see_has_to_be_refused(tiny_bundle: Bundle, tmp_path: Path) -> None:
    corner = np.zeros((100, 100), np.bool_)
    corner[:9, :9] = True
    first, _ = checks(tiny_bundle, tmp_path, {"regions": asdict(Regions.of(corner))})
    assert isinstance(first.answer, str)
    assert first.inputs["rgb"].shape == (100, 100, 3)
    assert first.difference(first.answer) is None
    assert first.difference("INTERNAL") == f"gives INTERNAL, expected the refusal: {first.answer}"
    assert str(first.difference({})).startswith("gives an answer, expected the refusal: ")


def test_what_differs_is_told(fused_repository: Path) -> None:
    repository = Repository.open(fused_repository)
    gate, first, second = frame_checks(repository, Golden.read(repository.path, repository.manifest))
    assert gate.model == "other_gate"
    assert gate.difference({"place": np.zeros(1, np.int32)}) is None
    assert (
        gate.difference({"place": np.ones(1, np.int32)}) == "`place` is not what m3ad makes of the same frame"
    )
    assert first.model == "other_prepare"
    assert second.model == "other_judge"
    assert not isinstance(first.answer, str)
    assert not isinstance(second.answer, str)
    assert first.difference(first.answer) is second.difference(second.answer) is None
    for check, name, changed in (
        (first, "points", first.answer["points"] * np.float32(1.001)),
        (first, "points", first.answer["points"][1:]),
        (first, "image", first.answer["image"] + np.float32(np.nan)),
        (first, "point_pixel", first.answer["point_pixel"] + 1),
        (second, "frame_map", second.answer["frame_map"].T),
        (second, "is_anomalous", ~second.answer["is_anomalous"]),
        (second, "defects", np.array([b"[]"], object)),
    ):
        assert not isinstance(check.answer, str)
        told = check.difference({**check.answer, name: changed})
        assert told == f"`{name}` is not what m3ad makes of the same frame"
    padded = np.array([second.answer["defects"].item() + b"   "], object)
    assert second.difference({**second.answer, "defects": padded}) is None
    assert second.difference("no room") == "refuses a frame that is good: no room"
    moved = json.loads(second.answer["defects"].item())
    moved[0]["peak"] *= 1.01
    assert second.difference({**second.answer, "defects": np.array([json.dumps(moved).encode()], object)})
