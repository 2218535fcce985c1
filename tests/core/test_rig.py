import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from m3ad.bundle import Bundle
from m3ad.errors import ArtifactError, FrameError, M3adError
from m3ad.frames import Frame, find_pairs, read_sample
from m3ad.rig import Rig, drift, fit_rig, read_rig
from m3ad_calibrate.cli import app
from PIL import Image
from typer.testing import CliRunner

NORMAL = np.array([0.05, -0.1, 1.0]) / np.linalg.norm([0.05, -0.1, 1.0])
DISTANCE_M = 0.6


def tilted(normal: np.ndarray, degrees: float) -> np.ndarray:
    axis = np.cross(normal, [1.0, 0.0, 0.0])
    axis /= np.linalg.norm(axis)
    angle = math.radians(degrees)
    return normal * math.cos(angle) + np.cross(axis, normal) * math.sin(angle)


def view_of(
    seed: int,
    normal: np.ndarray = NORMAL,
    distance_m: float = DISTANCE_M,
    missing: float = 0.05,
    part: bool = True,
) -> Frame:
    """A pinhole camera 0.6 m above a plane with a box on it, 0.3 mm of noise, and holes."""
    rng = np.random.default_rng(seed)
    v, u = np.mgrid[:90, :120]
    rays = np.stack([(u - 59.5) / 150, (v - 44.5) / 150, np.ones_like(u, float)], axis=2)
    depth = distance_m / (rays @ normal)
    if part:
        depth[30:60, 40:80] -= 0.03
    xyz = (rays * depth[..., None] + rng.normal(scale=3e-4, size=rays.shape)).astype(np.float32)
    xyz[rng.random(u.shape) < missing] = 0
    return Frame(np.zeros((90, 120, 3), np.uint8), xyz, f"view {seed}")


def test_the_plane_of_a_rig_is_found_beneath_parts() -> None:
    rig = fit_rig([view_of(seed) for seed in range(5)])
    np.testing.assert_allclose(rig.plane[:3], NORMAL, atol=1e-3)
    assert rig.distance_m == pytest.approx(DISTANCE_M, abs=3e-4)
    assert 1e-4 < rig.residual_m < 4e-4  # the median of 0.3 mm of noise along the normal
    assert (len(rig.frames), rig.left_out) == (5, [])
    assert rig.coverage == pytest.approx(0.95, abs=0.01)


def test_a_nudged_frame_is_left_out_and_most_must_agree() -> None:
    views = [view_of(seed) for seed in range(4)]
    rig = fit_rig([*views, view_of(9, tilted(NORMAL, 5))])
    assert rig.left_out == ["view 9"]
    np.testing.assert_allclose(rig.plane[:3], NORMAL, atol=1e-3)
    moved = [view_of(10 + i, tilted(NORMAL, 6 * i)) for i in range(5)]
    with pytest.raises(FrameError, match=r"only 1 of 5 frames show one plane within 4 mm .*`ransac`"):
        fit_rig(moved)
    with pytest.raises(FrameError, match="there are no frames to calibrate the rig with"):
        fit_rig([])
    blind = view_of(8)
    blind.xyz[:30] = blind.xyz[60:] = blind.xyz[:, :40] = blind.xyz[:, 80:] = 0
    with pytest.raises(FrameError, match="frame view 8 shows no support at its border"):
        fit_rig([blind])
    assert fit_rig([blind, *views]).left_out == ["view 8"]


def test_a_rim_without_points_moves_the_border_and_another_rim_is_named() -> None:
    def dead(seed: int) -> Frame:
        frame = view_of(seed)
        frame.xyz[:11] = frame.xyz[-11:] = frame.xyz[:, :18] = frame.xyz[:, -12:] = np.nan
        return frame

    full, rim = fit_rig([view_of(s) for s in range(5)]), fit_rig([dead(s) for s in range(5)])
    assert (len(rim.frames), rim.left_out) == (5, [])
    at = np.append(NORMAL * DISTANCE_M, 1)
    assert abs((np.array(full.plane) - rim.plane) @ at) < 1e-4
    np.testing.assert_allclose(rim.plane[:3], NORMAL, atol=1e-3)
    mixed = fit_rig([*(view_of(s) for s in range(4)), dead(4)])
    assert (len(mixed.frames), mixed.left_out) == (4, ["view 4"])


@pytest.mark.parametrize(
    ("later", "words"),
    [
        (view_of(20), None),
        (view_of(21, part=False), None),
        (view_of(22, distance_m=DISTANCE_M + 0.006), r"its plane lies 6\.\d mm off, 2\.5 mm is usual"),
        (view_of(23, tilted(NORMAL, 1.5)), r"turned by 1\.[45]\d degrees, 0\.50 is usual"),
        (view_of(24, missing=0.5), r"only 50% of its pixels have a point, 7\d% is the least"),
    ],
)
def test_drift_says_what_changed(later: Frame, words: str | None) -> None:
    rig = fit_rig([view_of(seed) for seed in range(5)])
    found = drift(rig, later)
    if words is None:
        assert found == []
    else:
        import re

        assert re.search(words, "\n".join(found)), found


def test_a_rig_survives_its_file_and_damage_is_said(tmp_path: Path) -> None:
    rig = fit_rig([view_of(seed) for seed in range(3)])
    rig.write(tmp_path / "rig.json")
    assert read_rig(tmp_path / "rig.json") == rig
    document = json.loads((tmp_path / "rig.json").read_text())
    with pytest.raises(ArtifactError, match="is not a m3ad-rig of this m3ad"):
        Rig.from_json({**document, "extra": 1}, "rig.json")
    with pytest.raises(ArtifactError, match=r"rig\.json is damaged: "):
        Rig.from_json({**document, "plane": [1, 2, 3]}, "rig.json")
    with pytest.raises(ArtifactError, match="does not exist; write it with: m3ad-calibrate rig"):
        read_rig(tmp_path / "none.json")
    (tmp_path / "half.json").write_text("{")
    with pytest.raises(ArtifactError, match="is not valid JSON"):
        read_rig(tmp_path / "half.json")


def write_frames(folder: Path, frames: list[Frame]) -> None:
    folder.mkdir(parents=True)
    for i, frame in enumerate(frames):
        Image.fromarray(frame.rgb).save(folder / f"{i:03}.png")
        np.save(folder / f"{i:03}.npy", frame.xyz)


def test_commands_from_frames_to_a_warning(tiny_bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle.path, tmp_path / "bundle")
    write_frames(tmp_path / "empty", [view_of(s, part=False) for s in range(3)])
    write_frames(tmp_path / "later", [view_of(30), view_of(31, tilted(NORMAL, 3))])
    bundle, out = str(tmp_path / "bundle"), str(tmp_path / "rig.json")
    result = CliRunner().invoke(app, ["drift", bundle, str(tmp_path / "later")])
    assert "holds no rig; calibrate one: m3ad-calibrate rig" in str(result.exception)
    result = CliRunner().invoke(
        app, ["rig", "--data", str(tmp_path / "empty"), "--out", out, "--bundle", bundle]
    )
    assert result.exit_code == 0, result.output
    assert "600.0 mm from the sensor" in result.stdout or "mm from the sensor" in result.stdout
    assert Bundle.open(tmp_path / "bundle").manifest.rig == json.loads(Path(out).read_text())
    result = CliRunner().invoke(app, ["drift", bundle, str(tmp_path / "empty")])
    assert result.exit_code == 0, result.output
    assert "3 frames fit the rig" in result.stdout
    result = CliRunner().invoke(app, ["drift", bundle, str(tmp_path / "later")])
    assert isinstance(result.exception, M3adError)
    assert "1 of 2 frames no longer fit the rig" in str(result.exception)


def test_training_takes_the_plane_of_a_rig(tmp_path: Path) -> None:
    from m3ad_export.cli import app as export

    result = CliRunner().invoke(export, ["train", str(tmp_path), str(tmp_path / "out"), "--plane", "fixed"])
    assert "--plane fixed and --rig go together" in str(result.exception)


def test_a_number_for_holes_is_declared_to_the_rig_as_to_training(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    views = [view_of(s, part=False) for s in range(3)]
    write_frames(tmp_path / "clean", views)
    holes = [(v.xyz == 0).all(axis=2, keepdims=True) for v in views]
    numbered = [
        Frame(v.rgb, np.where(h, np.float32(-9999), v.xyz), v.name) for v, h in zip(views, holes, strict=True)
    ]
    write_frames(tmp_path / "numbered", numbered)
    rig = ["rig", "--data", str(tmp_path / "numbered"), "--out", str(tmp_path / "rig.json")]
    refused = CliRunner().invoke(app, rig)
    assert isinstance(refused.exception, FrameError)
    assert "declare it with --hole -9999 in m3ad-export train" in str(refused.exception)
    shutil.copytree(tiny_bundle.path, tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    bundle.update(preprocessing={**bundle.document["preprocessing"], "hole": -9999.0})
    assert CliRunner().invoke(app, [*rig, "--hole", "-9999", "--bundle", str(bundle.path)]).exit_code == 0
    clean = fit_rig([read_sample(s) for s in find_pairs(tmp_path / "clean")])
    assert read_rig(tmp_path / "rig.json") == clean
    fits = CliRunner().invoke(app, ["drift", str(bundle.path), str(tmp_path / "numbered")])
    assert fits.exit_code == 0, fits.output
