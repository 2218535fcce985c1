"""Holes that carry a number, zeros that are measurements, and flat parts that are neither."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from m3ad.errors import FrameError
from m3ad.frame_settings import Preprocessing
from m3ad.frames import Frame
from m3ad.holes import holes_as_zeros, measured
from m3ad.preprocess import prepare, with_holes, without_modality
from m3ad.rig import fit_rig

LARGEST = float(np.finfo(np.float32).max)
SIDE = 120


def plate(z_m: float = 0.4, seed: int = 0, relief_m: float = 2e-3) -> np.ndarray:
    """A wavy plate of 0.2 m seen by a pinhole camera, or, at height 0, by a height sensor; [H, W, 3] float64."""
    rng = np.random.default_rng(seed)
    v, u = (np.indices((SIDE, SIDE)) - SIDE / 2 + 0.25) / SIDE
    z = z_m + relief_m * np.sin(25 * u) + 1e-4 * rng.normal(size=u.shape)
    scale = z / z_m if z_m else 1
    return np.stack([0.2 * u * scale, 0.2 * v * scale, z], axis=-1)


def frame_of(xyz: np.ndarray) -> Frame:
    rgb = np.random.default_rng(1).integers(0, 256, (*xyz.shape[:2], 3), dtype=np.uint8)
    with np.errstate(over="ignore"):
        return Frame(rgb, xyz.astype(np.float32), "holed")


def filled(xyz: np.ndarray, where: np.ndarray, value: float, form: str) -> np.ndarray:
    """The cloud with `value` at the points `where`: in all coordinates, in z only, or as a depth through a pinhole."""
    holed = xyz.copy()
    if form == "all":
        holed[where] = value
    elif form == "z":
        holed[where, 2] = value
    else:
        holed[where] *= (value / holed[where, 2])[:, None]
        holed[where, 2] = value
    return holed


def holes_of(share: float, seed: int = 3) -> np.ndarray:
    if share > 0.5:  # the whole background around a part
        v, u = np.indices((SIDE, SIDE))
        return np.hypot(v - SIDE / 2, u - SIDE / 2) > SIDE * 0.35
    return np.random.default_rng(seed).random((SIDE, SIDE)) < share


@pytest.mark.parametrize("share", [0.004, 0.03, 0.6])
@pytest.mark.parametrize(
    ("value", "form"),
    [
        *((v, "all") for v in (-9999.0, -32768.0, -1e10, 65.535, LARGEST, -LARGEST, -1.0, 99.0)),
        *((v, "z") for v in (-9999.0, -32768.0, -1e10, LARGEST, 0.0, 10.0)),
        *((v, "pinhole") for v in (65.535, 65535.0, 25.0)),
    ],
)
def test_a_number_for_holes_is_named_and_once_declared_equals_nan(value: float, form: str, share: float):
    xyz, where = plate(), holes_of(share)
    frame = frame_of(filled(xyz, where, value, form))
    with pytest.raises(
        FrameError, match=r"frame holed: \d+ of \d+ points have [xyz] = .* declare it with"
    ) as refused:
        prepare(frame, Preprocessing())
    (named,) = re.findall(r"--hole (\S+) in m3ad-export train", str(refused.value))
    assert np.float32(named) == np.float32(value)
    found = prepare(frame, Preprocessing(hole=float(named)))
    expected = prepare(frame_of(filled(xyz, where, np.nan, "all")), Preprocessing())
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_declared_value_survives_a_unit_s_factor_and_other_values_are_still_told():
    xyz, where = plate(), holes_of(0.03)
    beside = float(
        np.nextafter(np.float32(65.535), np.float32(np.inf))
    )  # as 65535 * 0.001 may come out in float32
    frame = frame_of(filled(xyz, where, beside, "z"))
    settings_ = Preprocessing(hole=65.535)
    grid = where[np.ix_(*[np.arange(224) * SIDE // 224] * 2)]
    np.testing.assert_array_equal(prepare(frame, settings_).point_pixel, np.flatnonzero(~grid))
    frame.xyz[~where & holes_of(0.03, 4)] = -1e10
    with pytest.raises(FrameError, match=r"--hole -1e\+10 in m3ad-export train"):
        prepare(frame, settings_)


def test_scattered_values_beyond_any_sensor_are_counted():
    xyz, where = plate(), holes_of(0.03)
    xyz[where] *= np.random.default_rng(2).uniform(1e3, 1e5, np.count_nonzero(where))[:, None]
    with pytest.raises(
        FrameError, match=r"holed: \d+ of 50176 foreground points lie farther than 100 m .*--hole VALUE"
    ):
        prepare(frame_of(xyz), Preprocessing())


@settings(max_examples=60, deadline=None)
@given(
    step_m=st.sampled_from([1e-6, 1e-4, 1e-3, 5e-3]),
    height_m=st.floats(0.001, 0.15),
    share=st.floats(0.05, 0.95),
    standoff_m=st.sampled_from([0.0, 0.3, -0.3]),
    relief_m=st.sampled_from([0.0, 1e-3, 8e-3]),
    tilt=st.floats(-0.3, 0.3),
)
def test_flat_and_quantised_parts_are_no_holes(step_m, height_m, share, standoff_m, relief_m, tilt):
    """A box on a floor of one exact height, in steps of the sensor: every point of it was measured."""
    xyz = plate(0.0, relief_m=relief_m)
    u = np.indices((SIDE, SIDE))[1] / SIDE
    xyz[..., 2] = np.where(u < share, 0.0, height_m + tilt * xyz[..., 0] + xyz[..., 2])
    xyz[..., 2] = np.round(xyz[..., 2] / step_m) * step_m + standoff_m
    frame = frame_of(xyz)
    prepared = prepare(frame, Preprocessing())
    np.testing.assert_array_equal(prepared.point_pixel, np.arange(224 * 224))
    assert with_holes(frame, Preprocessing()) is frame


def test_a_wall_at_one_depth_behind_the_part_is_measured():
    xyz = plate(0.4)
    v, u = (np.indices((SIDE, SIDE)) - SIDE / 2 + 0.25) / SIDE
    boundary = np.abs(u) > 0.3
    xyz[boundary] = np.stack([0.5 * u, 0.5 * v, np.ones_like(u)], axis=-1)[boundary]  # the same rays at 1 m
    assert len(prepare(frame_of(xyz), Preprocessing()).points) == 224 * 224


def test_zero_coordinates_are_measured_wherever_the_origin_lies():
    """z counted from the part's most common height in steps of 0.1 mm: what is at z = 0 stays in the cloud."""
    steps = np.round(plate()[..., 2] * 1e4).astype(int)
    common = np.bincount(steps.ravel()).argmax()
    part = holes_of(0.6) == 0
    found = []
    for origin in (0.0, 0.4):
        xyz = plate()
        xyz[..., 2] = (steps - common) * 1e-4 + origin
        xyz[~part] = 0
        found.append(prepare(frame_of(xyz), Preprocessing()))
        cfm = prepare(frame_of(xyz), Preprocessing(zero_rule="any_coordinate"))
        assert (len(cfm.points) < len(found[-1].points)) is (origin == 0)
    np.testing.assert_array_equal(found[0].point_pixel, found[1].point_pixel)
    grid = part[np.ix_(*[np.arange(224) * SIDE // 224] * 2)]
    np.testing.assert_array_equal(found[0].point_pixel, np.flatnonzero(grid))


@given(
    st.lists(
        st.lists(st.sampled_from([0.0, -0.0, 1.0, -9999.0, np.nan, np.inf]), min_size=3, max_size=3),
        min_size=1,
        max_size=8,
    )
)
def test_both_rules_point_by_point(points):
    xyz = np.array(points, np.float32)
    for hole in (None, -9999.0):
        for rule in ("point", "any_coordinate"):
            expected = [
                all(map(np.isfinite, p)) and any(p) and hole not in p and (rule == "point" or all(p))
                for p in points
            ]
            np.testing.assert_array_equal(measured(holes_as_zeros(xyz, hole, rule)), expected)


def test_declared_holes_stay_out_of_a_masked_cloud_and_a_rig():
    xyz, where = plate(), holes_of(0.03)
    settings_ = Preprocessing(hole=-9999)
    holed = with_holes(frame_of(filled(xyz, where, -9999, "z")), settings_)
    clean = frame_of(filled(xyz, where, np.nan, "all"))
    flat, expected = without_modality(holed, "xyz"), without_modality(clean, "xyz")
    np.testing.assert_array_equal(flat.xyz[~where], expected.xyz[~where])
    np.testing.assert_array_equal(measured(flat.xyz), ~where)
    assert fit_rig([holed]) == fit_rig([clean])
    for undeclared in (
        lambda f: with_holes(f, Preprocessing()),
        lambda f: prepare(f, Preprocessing(without="xyz")),
    ):
        with pytest.raises(FrameError, match="--hole -9999"):
            undeclared(frame_of(filled(xyz, where, -9999, "z")))


def test_holes_that_are_declared_leave_nothing():
    frame = frame_of(np.full((SIDE, SIDE, 3), -9999.0))
    with pytest.raises(FrameError, match=r"frame holed is all background: every point is a hole"):
        prepare(frame, Preprocessing(hole=-9999))


@pytest.mark.parametrize("settings_", [{"hole": -9999}, {"zero_rule": "any_coordinate"}])
def test_the_fitted_plane_knows_the_declared_holes(settings_):
    """A floor tilted by 1 : 10 with a block on it; most of the border is holes."""
    v, u = (np.indices((SIDE, SIDE)) - SIDE / 2 + 0.25) / SIDE * 0.2
    block = (np.abs(u) < 0.04) & (np.abs(v) < 0.04)
    xyz = np.stack([u, v, 0.4 + 0.1 * u - 0.02 * block], axis=-1)
    clean = xyz.copy()
    holes = holes_of(0.03) | ((v > 0) & (np.abs(u) > 0.06)) | (v > 0.06)
    clean[holes], xyz[holes, 2] = 0, settings_.get("hole", 0)
    found = prepare(frame_of(xyz), Preprocessing(plane="ransac", **settings_))
    expected = prepare(frame_of(clean), Preprocessing(plane="ransac"))
    np.testing.assert_array_equal(found.point_pixel, expected.point_pixel)
    assert len(found.points) == pytest.approx(0.16 * 224**2, rel=0.1)
