"""The pictures mark what is above the threshold where it is in the frame, and say the verdict's colour."""

import subprocess
import sys

import numpy as np
import pytest
from m3ad.defects import find_defects
from m3ad.frames import Frame
from m3ad.limits import Limits
from m3ad.overlay import (
    BAD,
    BANNER_PX,
    DOUBT,
    GOOD,
    SIDE_PX,
    Inspected,
    contact_sheet,
    defect_line,
    overlay,
    save_png,
)
from PIL import Image


def inspected(height=300, width=300, spot=(60, 160), peak=2.0, score=None, mask=None):
    """A grey frame whose map holds one bright square, 20 grid pixels wide, centred at `spot` of the grid."""
    anomaly_map = np.full((224, 224), -0.5, np.float32)
    anomaly_map[spot[0] - 10 : spot[0] + 10, spot[1] - 10 : spot[1] + 10] = peak
    frame = Frame(
        np.full((height, width, 3), 128, np.uint8), np.ones((height, width, 3), np.float32), "part/007"
    )
    return Inspected(frame, anomaly_map, float(anomaly_map.max()) if score is None else score, mask)


def changed_pixels(item, threshold):
    """Pixels of the drawn frame that are no longer the frame's grey, in units of the drawn frame."""
    longer = max(item.frame.rgb.shape[:2])
    height, width = (round(side * SIDE_PX / longer) for side in item.frame.rgb.shape[:2])
    picture = np.array(overlay(item, Limits(threshold)))[BANNER_PX : BANNER_PX + height, :width]
    return np.abs(picture.astype(int) - 128).max(axis=2) > 2


@pytest.mark.parametrize("peak", [0.7, 20.0])
def test_heat_lies_exactly_where_the_map_is_above_the_threshold(peak):
    changed = changed_pixels(inspected(peak=peak), 0.5)
    rows, cols = np.nonzero(changed)
    # Grid 50..70 and 150..170 of 224 are drawn at twice the size; bilinear edges and the contour's halo may add 3.
    np.testing.assert_allclose([rows.min(), rows.max() + 1], [100, 140], atol=3)
    np.testing.assert_allclose([cols.min(), cols.max() + 1], [300, 340], atol=3)
    assert changed[104:136, 304:336].all()


def test_a_frame_that_is_not_square_is_marked_in_its_own_pixels():
    # 200 x 400: the square's upper and lower quarter are padding, so grid row 112 is the middle of the frame.
    changed = changed_pixels(inspected(200, 400, spot=(112, 56)), 0.5)
    assert changed.shape == (224, 448)
    rows, cols = np.nonzero(changed)
    assert (rows.mean(), cols.mean()) == pytest.approx((111.5, 111.5), abs=1)


def test_nothing_is_marked_below_the_threshold():
    assert not changed_pixels(inspected(), 2.5).any()


@pytest.mark.parametrize(("score", "colour"), [(1.001, BAD), (1.0, GOOD), (-3.0, GOOD)])
def test_the_banner_has_the_verdicts_colour(score, colour):
    assert overlay(inspected(score=score), Limits(1.0)).getpixel((2, 2)) == colour


def test_a_part_to_look_at_has_a_colour_of_its_own():
    assert overlay(inspected(score=0.7), Limits(1.0, 0.5)).getpixel((2, 2)) == DOUBT


def test_each_defect_has_a_box_and_a_line():
    item = inspected(200, 400, spot=(112, 56))
    frame = item.frame
    x, y = np.meshgrid(np.linspace(-0.1, 0.1, 400), np.linspace(-0.05, 0.05, 200))
    frame.xyz[...] = np.stack([x, y, np.full_like(x, 0.5)], axis=-1)
    defects = find_defects(item.anomaly_map, 0.5, frame.xyz, np.ones((1, 224, 224), np.float32), ["rgb"])
    marked = Inspected(frame, item.anomaly_map, item.score, None, defects)
    before, after = overlay(item, Limits(0.5)), overlay(marked, Limits(0.5))
    assert after.height - before.height > 20
    # Twenty grid pixels and half a pixel of edge on each side of a field of 200 mm.
    assert defects[0].area_mm2 == pytest.approx((20 * 200 / 224) ** 2, rel=0.15)
    assert defect_line(defects[0]).endswith("mm^2, 0.00 mm deep")
    rows = np.array(after)[before.height :]
    assert (rows < 100).any()
    left, top, right, bottom = (round(v * 448 / 400) for v in defects[0].box_px)
    box = np.array(after)[BANNER_PX:]
    assert (box[top - 3, left:right] == 255).all()
    assert (box[bottom + 2, left:right] == 255).all()


@pytest.mark.parametrize("threshold", [-10.0, -0.5, 0.0, 2.0, 1e6])
def test_any_threshold_can_be_drawn_even_over_a_flat_map(threshold):
    item = inspected(peak=-0.5)
    assert overlay(item, Limits(threshold)).size == contact_size_of_one(item, threshold)


def contact_size_of_one(item, threshold):
    contact_sheet([item], threshold)  # must draw, too
    return overlay(item, Limits(0.0)).size


def test_the_sheet_has_a_row_a_frame_and_shows_truth_only_where_known():
    mask = np.zeros((300, 300), bool)
    mask[80:95, 200:230] = True
    without, with_truth = inspected(), inspected(mask=mask)
    one, two = contact_sheet([without], 0.5), contact_sheet([without, with_truth], 0.5)
    assert two.height > one.height
    assert two.width - one.width > SIDE_PX // 2
    truth = np.array(two)[-250:, -330:-80]
    assert (truth == 255).all(axis=2).any()
    assert (truth == 0).all(axis=2).mean() > 0.5
    with pytest.raises(ValueError, match="needs at least one frame"):
        contact_sheet([], 0.5)


def test_saving_leaves_only_the_finished_file(tmp_path):
    picture = overlay(inspected(), Limits(0.5))
    save_png(picture, tmp_path / "out" / "part.png")
    save_png(picture, tmp_path / "out" / "part.png")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["part.png"]
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "out" / "part.png")), np.array(picture))


def test_drawing_needs_no_plotting_library():
    code = (
        "import sys; sys.modules['matplotlib'] = None; import m3ad.overlay; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
