"""What training fixes about frames: declared holes, the rule for zeros, and how large the part is."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from m3ad.camera import Camera
from m3ad.errors import ArtifactError, FrameError, M3adError
from m3ad.frame_settings import Preprocessing
from m3ad.frames import find_pairs, read_sample
from m3ad.preprocess import prepare
from m3ad_export import bundle_writer, saved, training
from m3ad_export.cli import app
from m3ad_export.detector import Detector
from m3ad_export.training import with_extent
from PIL import Image
from serving import make_frame, write_frame
from typer.testing import CliRunner


@pytest.fixture
def category(tmp_path: Path) -> Path:
    for number in range(5):
        frame = make_frame(number)
        frame.xyz[...] *= 1 + number / 100
        for split in ("train", "validation"):
            write_frame(tmp_path / split / "good", f"{number:03}", frame)
    return tmp_path


def test_the_extent_is_the_training_frames_median(category: Path) -> None:
    samples = find_pairs(category / "train" / "good")
    settings = with_extent(samples, Preprocessing(hole=-1.0))
    middle = prepare(read_sample(samples[2]), Preprocessing()).points.astype(np.float64)
    low, high = np.quantile(middle, 0.05, axis=0), np.quantile(middle, 0.95, axis=0)
    assert settings.extent_m == pytest.approx(np.sqrt(((high - low) ** 2).sum()), rel=1e-5)
    assert settings == with_extent(samples, settings)  # an interrupted run goes on
    assert Preprocessing.from_json(settings.to_json()) == settings

    path = samples[4].xyz_path
    tifffile.imwrite(path, tifffile.imread(path) * 100, photometric="minisblack")
    settings = with_extent(samples, Preprocessing())
    with pytest.raises(FrameError, match=r"its part is 102 times as large .* divide it by 100$"):
        prepare(read_sample(samples[4]), settings)
    assert len(prepare(read_sample(samples[0]), settings).points) > 1024


class Stopped(Exception):  # noqa: N818  (not an error: the test has seen what it came for)
    pass


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the command hands to training, which is not run."""
    arguments: dict[str, Any] = {}

    def take(*_: object, **named: object) -> None:
        arguments.update(named)
        raise Stopped

    monkeypatch.setattr(training, "train", take)
    return arguments


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], Preprocessing()),
        (["--hole", "-9999"], Preprocessing(hole=-9999.0)),
        (
            ["--hole", "-1e+10", "--zero-rule", "any_coordinate"],
            Preprocessing(hole=-1e10, zero_rule="any_coordinate"),
        ),
    ],
)
def test_command_passes_the_holes_on(
    category: Path, tmp_path: Path, seen: dict[str, Any], options: list[str], expected: Preprocessing
) -> None:
    command = ["train", str(category), str(tmp_path / "out"), "--rgb-weights", "random", *options]
    assert isinstance(CliRunner().invoke(app, command).exception, Stopped)
    assert seen["preprocessing"] == expected


def test_the_camera_of_depth_images_goes_into_the_detector(
    category: Path, tmp_path: Path, seen: dict[str, Any]
) -> None:
    command = ["train", str(category), str(tmp_path / "out"), "--rgb-weights", "random"]
    document = {
        "width": 120,
        "height": 120,
        "fx": 100,
        "fy": 100,
        "cx": 59.5,
        "cy": 59.5,
        "depth_scale": 1e-4,
    }
    (tmp_path / "mine.json").write_text(json.dumps(document))
    assert isinstance(
        CliRunner().invoke(app, [*command, "--camera", str(tmp_path / "mine.json")]).exception, Stopped
    )
    assert seen["preprocessing"].camera == Camera(**document)
    for split in ("train", "validation"):
        for path in (category / split / "good/xyz").iterdir():
            depth = np.nan_to_num(tifffile.imread(path)[..., 2] * 1e4).round().astype(np.uint16)
            (category / split / "good/depth").mkdir(exist_ok=True)
            Image.fromarray(depth).save(category / split / "good/depth" / f"{path.stem}.png")
            path.unlink()
        (category / split / "good/xyz").rmdir()
    (category / "intrinsics.json").write_text(json.dumps(document))
    assert isinstance(CliRunner().invoke(app, command).exception, Stopped)
    assert seen["preprocessing"].camera == Camera(**document)


@pytest.mark.parametrize("name", ["Teil 7 (grün)", "Stück", ".part"])
def test_a_category_that_cannot_be_served_is_refused_before_training(
    category: Path, tmp_path: Path, seen: dict[str, Any], name: str
) -> None:
    folder, out = tmp_path / name, tmp_path / "out"
    folder.mkdir()
    for split in ("train", "validation"):
        (category / split).rename(folder / split)
    refused = CliRunner().invoke(app, ["train", str(folder), str(out)])
    assert isinstance(refused.exception, ArtifactError)
    assert f"category {name!r} cannot name a Triton model; expected" in str(refused.exception)
    assert "name one with --category" in str(refused.exception)
    assert not seen
    assert not out.exists()
    command = ["train", str(folder), str(out), "--rgb-weights", "random", "--category", "part-7"]
    assert isinstance(CliRunner().invoke(app, command).exception, Stopped)
    assert seen["category"] == "part-7"


def test_a_bundle_may_have_another_category(
    category: Path, tmp_path: Path, tiny_detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []

    def write(detector: Detector, *_: object, **__: object) -> list[object]:
        written.append(detector.record["category"])
        return []

    named = replace(tiny_detector, record={**tiny_detector.record, "category": "Teil 7"})
    monkeypatch.setattr(saved, "load_detector", lambda _: named)
    monkeypatch.setattr(bundle_writer, "write_bundle", write)
    command = ["bundle", str(tmp_path), str(tmp_path / "bundle"), "--data", str(category)]
    refused = CliRunner().invoke(app, command)
    assert "category 'Teil 7' cannot name a Triton model" in str(refused.exception)
    done = CliRunner().invoke(app, [*command, "--category", "part-7"])
    assert (done.exit_code, written) == (0, ["part-7"])


def test_a_refused_training_leaves_nothing(category: Path, tmp_path: Path, seen: dict[str, Any]) -> None:
    shutil.rmtree(category / "validation")
    command = ["train", str(category), str(tmp_path / "out"), "--rgb-weights", "random"]
    refused = CliRunner().invoke(app, command)
    assert "has no split 'validation'; expected validation/" in str(refused.exception)
    assert not seen
    assert not (tmp_path / "out").exists()


def test_a_hole_that_is_no_number_is_refused(category: Path, tmp_path: Path, seen: dict[str, Any]) -> None:
    refused = CliRunner().invoke(app, ["train", str(category), str(tmp_path / "out"), "--hole", "nan"])
    assert isinstance(refused.exception, M3adError)
    assert "--hole must be a finite number, got nan" in str(refused.exception)
    assert not seen
