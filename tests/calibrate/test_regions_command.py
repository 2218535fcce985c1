"""Regions go into a bundle with the threshold that follows, and every later frame is looked at through them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from m3ad.bundle import Bundle
from m3ad.errors import FrameError, M3adError
from m3ad.frames import Frame, find_samples, read_sample
from m3ad.preprocess import prepare
from m3ad.scale import extent
from m3ad_calibrate.cli import app
from m3ad_client.infer import find_inputs, inspect_samples
from m3ad_runtime.pipeline import Inspector
from PIL import Image
from serving import make_frame, write_frame
from typer.testing import CliRunner


@pytest.fixture
def place(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    """A bundle, three validation parts, and a mask of their left part."""
    shutil.copytree(tiny_bundle.path, tmp_path / "bundle")
    for number in range(3):
        write_frame(tmp_path / "data/validation/good", f"{number:03}", make_frame(number))
    mask = np.zeros((120, 120), np.uint8)
    mask[:, :60] = 255
    Image.fromarray(mask).save(tmp_path / "left.png")
    return tmp_path


def run(place: Path, *options: str) -> dict:
    arguments = ["regions", str(place / "bundle"), "--data", str(place / "data"), *options, "--json"]
    done = CliRunner().invoke(app, arguments)
    if done.exception:
        raise done.exception
    return json.loads(done.stdout)


def test_regions_are_kept_with_a_threshold_of_their_own(place: Path) -> None:
    before = Bundle.open(place / "bundle")
    told = run(place, "--include", str(place / "left.png"))
    bundle = Bundle.open(place / "bundle")
    inspector = Inspector(bundle)
    frames = [read_sample(s) for s in find_samples(place / "data", "validation")]
    scores = [inspector.inspect(frame).score for frame in frames]
    assert (told["kept"], told["value"]) == (0.5, max(scores))
    assert bundle.manifest.threshold.value == max(scores) != before.manifest.threshold.value
    extents = [extent(prepare(f, bundle.preprocessing).points) for f in frames]
    assert bundle.preprocessing.extent_m == pytest.approx(np.median(extents))
    # What changes on the right is nothing to the verdict; on the left it is.
    other = Frame(frames[0].rgb.copy(), frames[0].xyz.copy(), "other")
    other.rgb[:, 60:], other.xyz[:, 60:, 2] = 255, other.xyz[:, 60:, 2] + 0.05
    assert inspector.inspect(other).score == scores[0]
    other.rgb[40:60, 20:40] = (255, 0, 0)
    assert inspector.inspect(other).score != scores[0]
    (result,) = inspect_samples(
        inspector, find_inputs([place / "data/validation/good"], "test")[:1], place / "out"
    )
    assert result.overlay is not None
    drawn = np.array(Image.open(result.overlay))
    assert (drawn[34 + 448 - 20, 448 - 20] > 100).all()  # the dark corner of the frame, dimmed
    told = run(place, "--clear")
    cleared = Bundle.open(place / "bundle")
    assert (told["kept"], cleared.preprocessing.regions) == (1.0, None)
    assert cleared.manifest.threshold.value == max(Inspector(before).inspect(f).score for f in frames)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give regions by --include, --ignore or --polygons, or take them away by --clear"),
        (["--clear", "--ignore", "left.png"], "or take them away by --clear"),
        (["--include", "small.png"], "is 120x120 pixels but the bundle's regions are for 60x60"),
        (["--include", "narrow.png"], "expected at least 1024"),
        (["--include", "left.png", "--false-alarm-rate", "2"], "--false-alarm-rate must lie between 0 and 1"),
    ],
)
def test_what_cannot_be_done_leaves_the_bundle_as_it_was(
    place: Path, options: list[str], message: str
) -> None:
    Image.new("L", (60, 60), 255).save(place / "small.png")
    Image.fromarray(np.pad(np.full((10, 10), 255, np.uint8), 55)).save(place / "narrow.png")
    before = (place / "bundle/manifest.json").read_bytes()
    named = [str(place / option) if option.endswith("png") else option for option in options]
    with pytest.raises((FrameError, M3adError), match=message):
        run(place, *named)
    assert (place / "bundle/manifest.json").read_bytes() == before
