"""Disturbances do what their names say, and a limit is where verdicts still hold: against NumPy and by hand."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from m3ad.bundle import Bundle
from m3ad.errors import FrameError
from m3ad.frames import Frame
from m3ad.holes import measured
from m3ad_calibrate.cli import app
from m3ad_calibrate.disturb import DISTURBANCES, Disturbance
from m3ad_calibrate.robustness import Found, Level, _limit, measure
from m3ad_runtime.pipeline import Inspector
from scipy import ndimage
from serving import make_frame
from typer.testing import CliRunner

KINDS = {each.name: each for each in DISTURBANCES}


def disturbed(name: str, frame: Frame, level: float) -> Frame:
    return KINDS[name].change(frame, level, np.random.default_rng(0))


@pytest.mark.parametrize("kind", DISTURBANCES, ids=lambda each: each.name)
def test_a_disturbance_touches_one_modality_keeps_holes_and_repeats(kind: Disturbance) -> None:
    frame = make_frame()
    before = frame.rgb.copy(), frame.xyz.copy()
    first, again = (kind.change(frame, kind.levels[-1], np.random.default_rng(3)) for _ in range(2))
    assert np.array_equal(frame.rgb, before[0])
    assert np.array_equal(frame.xyz, before[1], equal_nan=True)
    assert np.array_equal(first.rgb, again.rgb)
    assert np.array_equal(first.xyz, again.xyz, equal_nan=True)
    is_cloud = kind.name in ("missing points", "depth noise", "tilt")
    assert np.array_equal(first.rgb, frame.rgb) is is_cloud
    assert np.array_equal(first.xyz, frame.xyz, equal_nan=True) is not is_cloud
    assert not (measured(first.xyz) & ~measured(frame.xyz)).any()


def test_levels_are_in_the_units_they_name() -> None:
    frame = make_frame()
    there, rgb = measured(frame.xyz), frame.rgb.astype(float)
    assert np.array_equal(disturbed("less light", frame, 0.5).rgb, np.rint(rgb * 0.5))
    cast = disturbed("colour cast", frame, 10).rgb.astype(float).mean(axis=(0, 1)) / rgb.mean(axis=(0, 1))
    np.testing.assert_allclose(cast, [1.1, 1, 0.9], atol=0.005)
    noisy = disturbed("image noise", frame, 5).rgb - rgb
    assert noisy.std() == pytest.approx(5, rel=0.02)
    lost = there & ~measured(disturbed("missing points", frame, 15).xyz)
    assert lost.sum() / there.sum() == pytest.approx(0.15, abs=0.001)
    _, blobs = ndimage.label(lost)
    assert lost.sum() / blobs > 20  # a sensor loses places, not single points
    depth = disturbed("depth noise", frame, 0.2).xyz[there] - frame.xyz[there]
    assert depth[:, 2].std() == pytest.approx(2e-4, rel=0.02)
    assert not depth[:, :2].any()
    shifted = disturbed("misregistration", frame, 4).rgb
    assert np.array_equal(shifted[:, 4:], frame.rgb[:, :-4])
    half = disturbed("misregistration", frame, 0.5).rgb[:, 1:]
    assert np.abs(half - (rgb[:, 1:] + rgb[:, :-1]) / 2).max() <= 0.5


@given(st.floats(-20, 20))
def test_a_tilt_turns_the_cloud_about_its_centre(degrees: float) -> None:
    frame = make_frame(size=40)
    there = measured(frame.xyz)
    was, now = (f.xyz[there].astype(np.float64) for f in (frame, disturbed("tilt", frame, degrees)))
    np.testing.assert_allclose(now.mean(axis=0), was.mean(axis=0), atol=1e-6)
    was, now = was - was.mean(axis=0), now - now.mean(axis=0)
    np.testing.assert_allclose(np.linalg.norm(now, axis=1), np.linalg.norm(was, axis=1), atol=1e-6)
    cross, dot = was[:, 1] * now[:, 2] - was[:, 2] * now[:, 1], was[:, 1:] * now[:, 1:]
    angle = np.degrees(np.arctan2(cross.sum(), dot.sum()))
    assert angle == pytest.approx(degrees, abs=0.01)


def level(
    value: float, auroc: float | None = 1.0, missed: int = 0, alarms: int = 0, refused: int = 0
) -> Level:
    return Level(value, auroc, missed, alarms, refused)


@pytest.mark.parametrize(
    ("levels", "limit", "said"),
    [
        ([level(0.5), level(1.5), level(4, missed=1)], 1.5, "misregistration: up to 1.5 px"),
        ([level(0.5), level(1.5, 0.985), level(4)], 0.5, "misregistration: up to 0.5 px"),
        ([level(0.5, 0.99), level(1.5), level(4)], 4, "up to 4 px, the strongest that was tried"),
        ([level(0.5, alarms=1), level(1.5), level(4)], None, "not even 0.5 px, the weakest that was tried"),
        ([level(0.5), level(1.5, refused=1), level(4)], 0.5, "up to 0.5 px"),
        ([level(0.5, None), level(1.5), level(4)], None, "not even 0.5 px"),
    ],
)  # fmt: skip
def test_a_limit_is_the_last_level_before_the_first_that_fails(
    levels: list[Level], limit: float | None, said: str
) -> None:
    found = _limit(levels, level(0), 0.01)
    assert found == limit
    assert said in Found(KINDS["misregistration"], levels, found).sentence()
    assert "down to" in Found(KINDS["jpeg"], [], 70).sentence()


def test_a_frame_that_is_refused_is_counted_and_ends_the_limit(tiny_bundle: Bundle) -> None:
    frames = [(make_frame(seed, size=40), seed == 0) for seed in range(2)]
    lost = Disturbance("missing points", "%", (1, 99), KINDS["missing points"].change)
    told: list[str] = []
    base, (found,) = measure(Inspector(tiny_bundle), frames, [lost], 1.0, told.append)
    assert [x.refused for x in found.levels] == [0, 2]
    assert found.levels[1].image_auroc is None
    assert base.refused == 0
    assert "image AUROC none, 0 missed, 0 false alarms, 2 refused" in told[1]
    with pytest.raises(FrameError, match="on good and on defective frames; one of the two is missing"):
        measure(Inspector(tiny_bundle), frames[:1], [lost], 1.0, told.append)


def test_the_command_writes_a_report(tiny_bundle: Bundle, category: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle.path, tmp_path / "bundle")
    options = ["--frames", "2", "--only", "jpeg", "--only", "misregistration", "--json"]
    done = CliRunner().invoke(
        app, ["robustness", str(tmp_path / "bundle"), "--data", str(category), *options]
    )
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert json.loads((tmp_path / "robustness.json").read_text()) == report
    assert report["frames"] == {"good": 2, "defective": 2}
    assert [each["name"] for each in report["disturbances"]] == ["jpeg", "misregistration"]
    assert (tmp_path / "robustness.png").stat().st_size > 10_000
    page = (tmp_path / "robustness.md").read_text()
    assert all(each["told"] in page for each in report["disturbances"])
    assert "Mentor3AD" in page or "mentor3ad" in page
    assert page.count("| misregistration |") == 3
    refused = CliRunner().invoke(
        app, ["robustness", str(tmp_path / "bundle"), "--data", str(category), "--only", "x"]
    )
    assert refused.exit_code == 2
    assert "--only x is unknown, expected one of less light, more light" in refused.output
