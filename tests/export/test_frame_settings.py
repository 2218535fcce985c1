"""What training fixes about frames: declared holes, the rule for zeros, and how large the part is."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from m3ad.errors import FrameError, M3adError
from m3ad.frames import find_pairs, read_sample
from m3ad.preprocess import Preprocessing, prepare
from m3ad_export import training
from m3ad_export.cli import app
from m3ad_export.training import with_extent
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


def test_a_hole_that_is_no_number_is_refused(category: Path, tmp_path: Path, seen: dict[str, Any]) -> None:
    refused = CliRunner().invoke(app, ["train", str(category), str(tmp_path / "out"), "--hole", "nan"])
    assert isinstance(refused.exception, M3adError)
    assert "--hole must be a finite number, got nan" in str(refused.exception)
    assert not seen
