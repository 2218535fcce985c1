"""Defects against frames whose defects are known in millimetres, seen by a pinhole camera; no detector takes part.

The map is the defect's own footprint, smoothed as a detector's score maps are, on the 224 x 224 grid.
"""

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from m3ad.defects import LEAST_GRID_PX, find_defects
from m3ad.frame_settings import Preprocessing
from m3ad.grid import prepare_mask
from m3ad.judge import defects_of
from m3ad.limits import Limits, verdict
from m3ad.surface import area_mm2, deviation
from scipy import ndimage

DISTANCE_MM, FIELD_MM = 400.0, 128.0
SIZES = [(224, 224), (480, 640), (1200, 1944)]


@dataclass
class Scene:
    xyz: np.ndarray
    x: np.ndarray
    y: np.ndarray

    @property
    def grid_px(self) -> float:
        return max(self.xyz.shape[:2]) / 224


def scene(
    size=(224, 224),
    height=lambda x, y: 0 * x,
    noise_mm=0.0,
    tilt=(0.0, 0.0),
    curvature=0.0,
    holes=0.0,
    seed=0,
):
    """A surface seen from DISTANCE_MM: `height` [mm] towards the camera over a tilted, curved plate."""
    rng = np.random.default_rng(seed)
    rows, columns = size
    pitch = FIELD_MM / max(size)
    y, x = np.mgrid[:rows, :columns].astype(np.float64)
    x, y = (x - columns / 2 + 0.5) * pitch, (y - rows / 2 + 0.5) * pitch
    plate = DISTANCE_MM + tilt[0] * x + tilt[1] * y + curvature * x**2
    depth = plate - height(x, y) + rng.normal(0, noise_mm, size) if noise_mm else plate - height(x, y)
    ray = np.stack([x, y, np.full_like(x, DISTANCE_MM)], axis=-1) / DISTANCE_MM
    xyz = (ray * depth[..., None] / 1000).astype(np.float32)
    xyz[rng.random(size) < holes] = 0
    return Scene(xyz, x, y)


def plateau(radius, height, flank=1.0, at=(0.0, 0.0)):
    """A round stud or hole with a flank: `height` inside, 0 beyond the radius."""
    return lambda x, y: height * np.clip((radius - np.hypot(x - at[0], y - at[1])) / flank, 0, 1)


def seen(xyz):
    return (xyz != 0).any(axis=-1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("tilt", "noise_mm"), [((0.0, 0.0), 0.0), ((0.5, -0.3), 0.2)])
def test_area_is_the_surface_s_and_not_the_pixels_(size, tilt, noise_mm):
    s = scene(size, tilt=tilt, noise_mm=noise_mm, holes=0.02)
    region = np.hypot(s.x, s.y) < 10
    exact = np.pi * 100 * np.sqrt(1 + tilt[0] ** 2 + tilt[1] ** 2)
    assert area_mm2(s.xyz, region, seen(s.xyz), s.grid_px) == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("height", "noise_mm"), [(-3.0, 0.0), (-3.0, 0.2), (-0.6, 0.2), (0.5, 0.05), (0.5, 0.2), (2.0, 0.05)]
)
def test_height_within_a_tenth_or_a_tenth_of_a_millimetre(size, height, noise_mm):
    s = scene(size, plateau(7, height), noise_mm, tilt=(0.1, 0.1), curvature=5e-4, holes=0.01)
    region = np.hypot(s.x, s.y) < 7
    found = deviation(s.xyz, region, region, seen(s.xyz), region, s.grid_px)
    along_normal = height / math.sqrt(1 + 0.1**2 + 0.1**2)
    assert found.height_mm == pytest.approx(along_normal, rel=0.10, abs=0.10)
    assert found.noise_mm == pytest.approx(noise_mm, rel=0.2, abs=0.005)


@pytest.mark.parametrize("edge", [8, 10, 12])
def test_what_lies_beside_the_part_does_not_bend_the_surface(edge):
    """The support 40 mm below takes up to a third of the ring around the defect; least squares would follow it."""
    s = scene(height=lambda x, y: plateau(5, 1.0)(x, y) - 40.0 * (x > edge))
    region = np.hypot(s.x, s.y) < 5
    found = deviation(s.xyz, region, region, seen(s.xyz), region, s.grid_px)
    assert found.height_mm == pytest.approx(1.0, rel=0.10)


def test_another_defect_beside_is_no_surface_around():
    both = lambda x, y: plateau(5, 1.0)(x, y) + plateau(9, -4.0, at=(18.0, 0.0))(x, y)  # noqa: E731
    s = scene(height=both)
    first, second = np.hypot(s.x, s.y) < 5, np.hypot(s.x - 18, s.y) < 9
    found = deviation(s.xyz, first, first, seen(s.xyz), first | second, s.grid_px)
    assert found.height_mm == pytest.approx(1.0, rel=0.10)


def test_what_was_not_measured_has_no_height_and_no_area():
    s = scene()
    region, nothing = np.hypot(s.x, s.y) < 5, np.zeros(s.x.shape, bool)
    assert deviation(s.xyz, region, region, nothing, region, 1.0) is None
    assert area_mm2(s.xyz, region, nothing, 1.0) is None
    hole = ~(np.hypot(s.x, s.y) < 6)
    assert deviation(s.xyz, np.hypot(s.x, s.y) < 2, np.hypot(s.x, s.y) < 2, hole, region, 0.5) is None


def map_of(mask, peak=1.0, sigma=3.0):
    """What a detector's head makes of a footprint: smoothed on the grid."""
    return (peak * ndimage.gaussian_filter(prepare_mask(mask).astype(np.float32), sigma)).astype(np.float32)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("radius", "height", "noise_mm"), [(8.0, 1.5, 0.0), (8.0, -1.5, 0.2), (14.0, -3.0, 0.2), (11.0, 0.5, 0.2)]
)
def test_a_defect_of_known_size_through_the_map(size, radius, height, noise_mm):
    """Area within 15 %, height within 10 % or 0.1 mm, place within a pixel of the grid."""
    at = (12.0, -7.0)
    s = scene(size, plateau(radius, height, at=at), noise_mm, tilt=(0.2, 0.0), holes=0.01)
    mask = np.hypot(s.x - at[0], s.y - at[1]) < radius
    # The level of the region's edge, half of the threshold above the map's median 0, is half of the map's height.
    (defect,) = find_defects(map_of(mask), 0.999, s.xyz)
    scale = (1 + 0.2 * at[0] / DISTANCE_MM) ** 2
    exact = np.pi * radius**2 * np.sqrt(1 + 0.2**2) * scale
    assert defect.area_mm2 == pytest.approx(exact, rel=0.15)
    assert defect.height_mm == pytest.approx(height / math.sqrt(1.04), rel=0.10, abs=0.10)
    pitch = FIELD_MM / max(size)
    centre = (at[0] / pitch + size[1] / 2, at[1] / pitch + size[0] / 2)
    assert defect.centroid_px == pytest.approx(centre, abs=1.5 * s.grid_px)
    assert defect.centroid_m == pytest.approx((0.012, -0.007, 0.4024), abs=0.004)
    left, top, right, bottom = defect.box_px
    assert (left + right) / 2 == pytest.approx(centre[0], abs=1.5 * s.grid_px)
    assert (right - left) * pitch == pytest.approx(2 * radius, rel=0.15)
    (low, high) = defect.box_m
    assert high[0] - low[0] == pytest.approx(2 * radius / 1000, rel=0.15)
    assert bottom - top == pytest.approx(right - left, abs=3 * s.grid_px)


def test_a_narrow_defect_is_as_wide_as_the_smoothing_lets_it_be():
    """Where the area cannot hold: a crack of 1.5 mm, narrower than the smoothing, is marked wider than it is."""
    s = scene(height=lambda x, y: -2.0 * ((np.abs(x) < 0.75) & (np.abs(y) < 12)))
    mask = (np.abs(s.x) < 0.75) & (np.abs(s.y) < 12)
    anomaly_map = map_of(mask)
    (defect,) = find_defects(anomaly_map, float(anomaly_map.max()) * 0.99, s.xyz)
    assert defect.area_mm2 > 1.5 * 36
    assert defect.height_mm == pytest.approx(-2.0, rel=0.10)


def two_spots(gap_value):
    """Two hot squares joined by a bridge of a lower value, on a map whose median is 0."""
    grid = np.zeros((224, 224), np.float32)
    grid[100:110, 50:60] = 2.0
    grid[100:110, 90:100] = 1.5
    grid[104:106, 60:90] = gap_value
    return grid


@pytest.mark.parametrize(("bridge", "count"), [(0.4, 2), (0.6, 1)])
def test_regions_are_joined_by_what_lies_above_the_lower_level(bridge, count):
    found = find_defects(two_spots(bridge), 1.0, scene().xyz)
    assert [d.peak for d in found] == [2.0, 1.5][:count]


def test_specks_are_left_out_unless_one_is_all_there_is():
    grid = np.zeros((224, 224), np.float32)
    grid[10, 10] = 3.0
    (speck,) = find_defects(grid, 1.0, scene().xyz)
    assert speck.area_px < LEAST_GRID_PX
    grid[100:110, 50:60] = 2.0
    assert [d.peak for d in find_defects(grid, 1.0, scene().xyz)] == [2.0]
    assert find_defects(grid, 3.0, scene().xyz) == []


def test_a_peak_that_the_frame_s_pixels_smooth_away_is_a_defect_all_the_same():
    grid = np.zeros((224, 224), np.float32)
    grid[100, 100] = 1.0
    small = scene((60, 60)).xyz
    (defect,) = find_defects(grid, 0.9, small)
    assert defect.peak < 0.9
    assert defect.centroid_px == pytest.approx((100.5 * 60 / 224 - 0.5, 100.5 * 60 / 224 - 0.5), abs=0.5)


def test_shares_are_those_of_the_logarithms():
    grid = two_spots(0.0)
    spot = grid > 1.9
    maps = np.full((4, 224, 224), 0.1, np.float32)
    maps[0][spot], maps[1][spot], maps[2][spot] = 0.4, 0.2, 0.05  # twice two, two, and less than usual
    names = ("map_rgb", "rec_xyz", "mentor", "vote rgb*xyz*mentor")
    strongest = find_defects(grid, 1.0, scene().xyz, maps, names)[0]
    assert strongest.shares == pytest.approx({"rgb": 2 / 3, "xyz": 1 / 3, "mentor": 0.0}, abs=0.02)
    assert find_defects(grid, 1.0, scene().xyz)[0].shares is None
    both = find_defects(grid, 1.0, scene().xyz, maps[[0, 0]], ("map_rgb", "rec_rgb"))[0]
    assert both.shares == {"rgb": 1.0}


def test_a_defect_in_json_is_plain_numbers():
    s = scene()
    s.xyz[:] = 0
    (defect, _) = find_defects(two_spots(0.0), 1.0, s.xyz)
    document = json.loads(json.dumps(defect.to_json(), allow_nan=False))
    assert document["box_px"] == [50, 100, 60, 110]
    assert document["area_px"] == 100
    assert document["centroid_px"] == pytest.approx([54.5, 104.5])
    assert document["area_mm2"] is document["height_mm"] is document["box_m"] is document["shares"] is None


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(30, 90),
    st.integers(30, 90),
    st.sampled_from([0.0, 0.3, 0.95, 1.0]),
)
def test_any_map_over_any_cloud_has_defects_inside_the_frame(seed, height, width, holes):
    rng = np.random.default_rng(seed)
    xyz = rng.normal(0, 0.1, (height, width, 3)).astype(np.float32)
    xyz[rng.random((height, width)) < holes] = np.nan
    grid = ndimage.gaussian_filter(rng.normal(size=(224, 224)), 4).astype(np.float32)
    found = find_defects(grid, float(np.percentile(grid, 99.5)), xyz, np.abs(grid)[None], ["rgb"])
    assert [d.peak for d in found] == sorted((d.peak for d in found), reverse=True)
    for defect in found:
        left, top, right, bottom = defect.box_px
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        assert left <= defect.centroid_px[0] < right
        assert top <= defect.centroid_px[1] < bottom
        json.dumps(defect.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("score", "said"), [(0.2, "good"), (0.3, "good"), (0.31, "review"), (0.5, "review"), (0.51, "defect")]
)
def test_three_verdicts(score, said):
    assert verdict(score, Limits(0.5, 0.3)) == said
    assert verdict(score, Limits(0.5)) == ("defect" if said == "defect" else "good")


def test_limits_out_of_order_or_not_finite_are_refused():
    with pytest.raises(ValueError, match=r"limit of review, 0\.6, lies above that of reject, 0\.5"):
        Limits(0.5, 0.6)
    with pytest.raises(ValueError, match="limits must be finite, got reject nan and review None"):
        Limits(math.nan)
    limits = Limits(0.5, 0.3)
    assert limits.moved(0.2) == Limits(0.2, 0.2)
    assert limits.moved(0.9) == Limits(0.9, 0.3)
    assert limits.moved(review=0.4) == Limits(0.5, 0.4)
    assert Limits(0.5).moved(0.4) == Limits(0.4)


def test_the_limit_is_brought_to_the_map_where_the_score_is_scaled():
    grid, maps = two_spots(0.0), np.ones((1, 224, 224), np.float32)
    arguments = (maps, ["rgb"], scene().xyz, Preprocessing())
    # A score of half the map's largest value: 0.8 of the score is 1.6 of the map, above the second spot.
    assert [d.peak for d in defects_of(grid, 1.0, *arguments, Limits(0.8))] == [2.0]
    assert len(defects_of(grid, 1.0, *arguments, Limits(0.9, 0.7))) == 2
    assert defects_of(grid, 1.0, *arguments, Limits(1.0)) == []


def test_a_cloud_that_is_masked_out_is_not_measured():
    grid, maps = two_spots(0.0), np.ones((1, 224, 224), np.float32)
    found = defects_of(grid, 2.0, maps, ["rgb"], scene().xyz, Preprocessing(without="xyz"), Limits(1.0))
    assert {d.area_mm2 for d in found} == {None}
    holed = scene().xyz
    holed[:, :55] = -9999
    found = defects_of(grid, 2.0, maps, ["rgb"], holed, Preprocessing(hole=-9999), Limits(1.0))
    assert found[0].box_m[0][0] > -0.1
