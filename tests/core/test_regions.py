"""What lies outside of the regions is nothing to a frame's tensors, whichever way the regions were drawn."""

import base64
import json
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from m3ad.errors import ArtifactError, FrameError
from m3ad.frame_settings import Preprocessing
from m3ad.frames import Frame
from m3ad.limits import Limits
from m3ad.overlay import BANNER_PX, IGNORED, REGION, SIDE_PX, Inspected, overlay
from m3ad.preprocess import prepare
from m3ad.regions import Regions, read_regions, with_regions
from PIL import Image
from serving import make_frame

SIZE = 120


def half(top: int = 0, bottom: int = 60, left: int = 0, right: int = SIZE) -> np.ndarray:
    mask = np.zeros((SIZE, SIZE), bool)
    mask[top:bottom, left:right] = True
    return mask


def png(path: Path, mask: np.ndarray) -> Path:
    Image.fromarray(mask.astype(np.uint8) * 255).save(path)
    return path


@pytest.mark.parametrize("without", [None, "rgb", "xyz"])
def test_what_lies_outside_changes_no_tensor(without):
    kept = half(10, 100, 15, 90)
    chosen = Preprocessing(regions=Regions.of(kept), without=without)
    frame, rng = make_frame(0), np.random.default_rng(1)
    found = prepare(frame, chosen)
    noise = Frame(frame.rgb.copy(), frame.xyz.copy(), frame.name)
    noise.rgb[~kept] = rng.integers(0, 256, (np.count_nonzero(~kept), 3))
    noise.xyz[~kept] = rng.normal(size=(np.count_nonzero(~kept), 3))
    for a, b in zip(found, prepare(noise, chosen), strict=True):
        np.testing.assert_array_equal(a, b)
    rows, cols = np.divmod(found.point_pixel, 224)
    assert kept[rows * SIZE // 224, cols * SIZE // 224].all()
    every = prepare(frame, replace(chosen, regions=None))
    inside = kept[np.ix_(*[np.arange(224) * SIZE // 224] * 2)].ravel()[every.point_pixel]
    np.testing.assert_array_equal(found.point_pixel, every.point_pixel[inside])
    if without != "xyz":
        np.testing.assert_array_equal(found.points, every.points[inside])


def test_regions_of_the_whole_frame_change_nothing():
    everything = Preprocessing(regions=Regions.of(np.ones((SIZE, SIZE), bool)))
    for a, b in zip(prepare(make_frame(2), everything), prepare(make_frame(2), Preprocessing()), strict=True):
        np.testing.assert_array_equal(a, b)


@settings(max_examples=25, deadline=None)
@given(height=st.integers(1, 70), width=st.integers(1, 70), seed=st.integers(0, 99))
def test_a_record_keeps_every_pixel(height, width, seed):
    mask = np.random.default_rng(seed).random((height, width)) < 0.4
    mask[0, 0] = True
    record = json.loads(json.dumps(Preprocessing(regions=Regions.of(mask)).to_json()))
    regions = Preprocessing.from_json(record).regions
    np.testing.assert_array_equal(regions.mask(), mask)


def test_masks_and_polygons_are_drawn_together(tmp_path):
    top, left = png(tmp_path / "top.png", half()), png(tmp_path / "left.png", half(0, SIZE, 0, 20))
    np.testing.assert_array_equal(read_regions([top], [left], None).mask(), half() & ~half(0, SIZE, 0, 20))
    np.testing.assert_array_equal(
        read_regions([], [top, left], None).mask(), ~(half() | half(0, SIZE, 0, 20))
    )
    np.testing.assert_array_equal(read_regions([top, left], [], None).mask(), half() | half(0, SIZE, 0, 20))
    box = [[30, 10], [79, 10], [79, 49], [30, 49]]
    drawing = {"width": SIZE, "height": SIZE, "include": [box], "ignore": [[[0, 0], [50, 0], [0, 50]]]}
    (tmp_path / "drawn.json").write_text(json.dumps(drawing))
    kept = read_regions([], [], tmp_path / "drawn.json").mask()
    v, u = np.indices((SIZE, SIZE))
    np.testing.assert_array_equal(kept, half(10, 50, 30, 80) & ~(u + v <= 50))
    with pytest.raises(FrameError, match=r"the regions of .*top.png leave no pixel to look at"):
        read_regions([top], [top], None)
    with pytest.raises(FrameError, match="no region is drawn; give --include or --ignore"):
        read_regions([], [], None)
    small = png(tmp_path / "small.png", np.ones((50, 60), bool))
    with pytest.raises(FrameError, match=r"small.png is 60x50 pixels but .*top.png 120x120; draw regions"):
        read_regions([top, small], [], None)
    for change, message in (
        ({"width": "wide"}, "Expected `int`, got `str` - at `\\$.width`"),
        ({"width": 1 << 20, "height": 1 << 20}, "too many for a frame"),
        ({"include": [[[0, 0], [1, 1]]]}, "length >= 3"),
        ({"include": [[[0, 0], [1, 1], [1e300, 2]]]}, "<= 100000.0"),
        ({"exclude": []}, "unknown field `exclude`"),
    ):
        (tmp_path / "drawn.json").write_text(json.dumps({**drawing, **change}))
        with pytest.raises(ArtifactError, match=message):
            read_regions([], [], tmp_path / "drawn.json")


def test_a_frame_of_another_size_is_refused():
    chosen = Preprocessing(regions=Regions.of(np.ones((100, 120), bool)))
    with pytest.raises(
        FrameError, match=r"is 120x120 pixels but the bundle's regions are for 120x100; draw them"
    ):
        prepare(make_frame(0), chosen)


@pytest.mark.parametrize(
    "kept",
    ["?", "AAAA", Regions.of(half()).kept[:-8], base64.b64encode(zlib.compress(bytes(10**6))).decode(),
     base64.b64encode(zlib.compress(bytes(SIZE * SIZE // 8))).decode()],
)  # fmt: skip
def test_a_damaged_record_is_refused(kept):
    record = Preprocessing(regions=Regions.of(half())).to_json()
    record["regions"]["kept"] = kept
    with pytest.raises(ArtifactError, match=r"preprocessing settings is damaged: .*[Rr]egions"):
        Preprocessing.from_json(record)


def test_the_overlay_shows_them():
    frame = Frame(np.full((SIZE, SIZE, 3), 128, np.uint8), np.ones((SIZE, SIZE, 3), np.float32), "part")
    item = Inspected(frame, np.zeros((224, 224), np.float32), 0.0)
    plain, shown = (
        np.array(overlay(i, Limits(1.0)))[BANNER_PX:, :SIDE_PX] for i in (item, replace(item, kept=half()))
    )
    assert (plain == 128).all()
    middle = SIDE_PX // 2
    assert (shown[: middle - 4] == 128).all()
    assert (shown[middle - 1] == REGION).all()
    dimmed = 128 + 0.6 * (np.array(IGNORED) - 128)
    assert np.abs(shown[middle + 2 :] - dimmed).max() <= 1


def test_the_colour_outside_is_the_mean_inside():
    kept, frame = half(), make_frame(0)
    shown = with_regions(frame, Regions.of(kept))
    np.testing.assert_array_equal(shown.rgb[kept], frame.rgb[kept])
    assert np.abs(shown.rgb[~kept] - frame.rgb[kept].mean(axis=0)).max() <= 0.5
    assert (shown.xyz[~kept] == 0).all()
