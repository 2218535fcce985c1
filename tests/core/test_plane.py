"""The plane fit finds the true plane under outliers, repeats exactly, and says when there is none."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from m3ad.errors import FrameError
from m3ad.plane import border_points, distance_m, fit_plane


def points_on(normal, offset_m, rng, count=1000, outliers=0.0, noise_m=5e-4):
    normal = np.array(normal) / np.linalg.norm(normal)
    points = rng.uniform((-0.15, -0.15, 0.35), (0.15, 0.15, 0.65), (count, 3))
    points -= (points @ normal + offset_m)[:, None] * normal
    points += rng.normal(0, noise_m, (count, 1)) * normal
    off = rng.random(count) < outliers
    points[off] += rng.uniform(0.02, 0.15, (off.sum(), 1)) * normal
    return points, normal, off


@settings(max_examples=25, deadline=None)
@given(
    normal=st.tuples(*[st.floats(-1, 1)] * 3).filter(lambda n: np.linalg.norm(n) > 0.3),
    outliers=st.floats(0, 0.4),
    seed=st.integers(0, 1000),
)
def test_the_plane_is_found_under_outliers(normal, outliers, seed):
    points, normal, off = points_on(normal, 0.1, np.random.default_rng(seed), outliers=outliers)
    plane = fit_plane(points, seed)
    assert np.linalg.norm(plane[:3]) == pytest.approx(1)
    assert abs(np.dot(plane[:3], normal)) > np.cos(np.deg2rad(0.2))
    # Least squares over the true plane's own points, by singular values, is as good as it gets.
    own = points[~off]
    best = np.linalg.svd(own - own.mean(axis=0), full_matrices=False)[2][2]
    assert abs(np.dot(plane[:3], best)) > np.cos(np.deg2rad(0.05))
    assert np.abs(own @ plane[:3] + plane[3]).mean() < 6e-4
    assert fit_plane(points, seed) == plane


def test_distance_is_metric_for_any_scale_of_the_plane():
    points = np.array([[0.1, 0.2, 0.5], [0, 0, 0.4]], np.float32)
    np.testing.assert_allclose(distance_m(points, (0, 0, -3, 1.2)), [0.1, 0], atol=1e-7)


def test_border_is_ten_pixels_wide_on_all_sides():
    v, u = np.indices((60, 50))
    points = border_points(np.stack([u, v, np.ones_like(u)], axis=-1).astype(np.float32))
    expected = {(c, r, 1) for r in range(60) for c in range(50) if not (10 <= r < 50 and 10 <= c < 40)}
    assert len(points) == len(expected)
    assert set(map(tuple, points)) == expected


def floor_of(height=96, width=128, seed=0):
    """A pinhole camera's view of a tilted floor with 0.2 mm of noise."""
    v, u = np.indices((height, width))
    rays = np.stack([(u - width / 2) / 150, (v - height / 2) / 150, np.ones(u.shape)], axis=-1)
    depth = 0.5 / (rays @ (0.05, 0.1, 1)) + np.random.default_rng(seed).normal(0, 2e-4, u.shape)
    return (rays * depth[..., None]).astype(np.float32)


@settings(max_examples=15, deadline=None)
@given(
    rim=st.tuples(*[st.integers(0, 20)] * 4), hole=st.sampled_from([0.0, np.nan]), missing=st.floats(0, 0.2)
)
@example(rim=(8, 8, 8, 12), hole=0.0, missing=0.2)  # two of ten lines are left: just not dead
def test_a_dead_rim_of_any_width_leaves_the_plane(rim, hole, missing):
    top, bottom, left, right = rim
    xyz, inside = floor_of(160, 200), np.zeros((160, 200), bool)
    inside[top : 160 - bottom, left : 200 - right] = True
    expected = fit_plane(border_points(xyz))
    xyz[~inside | (np.random.default_rng(1).random(inside.shape) < missing)] = hole
    points = border_points(xyz)
    ring = (
        2 * 10 * 200 + 2 * 10 * 140
    )  # a side that is not dead has a tenth of its strip, a dead one has none in it
    assert len(points) >= ring / 10
    found = fit_plane(points)
    assert distance_m(np.float32([[0, 0, 0.5]]), found) == pytest.approx(
        distance_m(np.float32([[0, 0, 0.5]]), expected), abs=1e-4
    )
    assert abs(np.dot(found[:3], expected[:3])) > np.cos(np.deg2rad(0.1))


@pytest.mark.parametrize(
    "part",
    [
        lambda v, u: np.hypot((v - 48) / 37, (u - 64) / 53) < 1,
        lambda v, u: (abs(v - 48) < 33) & (abs(u - 64) < 53),
        lambda v, u: abs(v - 48) / 37 + abs(u - 64) / 53 < 1,
    ],
    ids=["round", "rectangular", "rhombic"],
)
def test_a_part_without_its_support_has_no_border(part):
    xyz = floor_of()
    xyz[~part(*np.indices((96, 128)))] = 0
    assert len(border_points(xyz)) == 0


def test_many_points_are_thinned_over_their_whole_range():
    rng = np.random.default_rng(0)
    points, normal, _ = points_on((0, 0, 1), -0.4, rng, count=50_000)
    points[:10_000, 2] += rng.uniform(0.02, 0.1, 10_000)
    plane = fit_plane(points)
    assert abs(np.dot(plane[:3], normal)) > np.cos(np.deg2rad(0.1))


def test_no_plane_is_said():
    with pytest.raises(
        FrameError, match="border holds 49 points, expected at least 50; use plane removal `none`"
    ):
        fit_plane(np.random.default_rng(0).normal(size=(49, 3)))
    line = np.linspace(0, 1, 200)[:, None] * np.array([0.1, 0.2, 0.3]) + (0, 0, 0.4)
    with pytest.raises(FrameError, match="the points at the frame's border lie on one line"):
        fit_plane(line)


@pytest.mark.parametrize("seed", range(5))
def test_a_noisy_plane_repeats_exactly_and_is_the_least_squares_plane_of_its_inliers(seed):
    points, _, _ = points_on((0.2, -0.1, 1), 0.1, np.random.default_rng(seed), outliers=0.3, noise_m=3e-3)
    plane = fit_plane(points, seed)
    assert all(fit_plane(points, seed) == plane for _ in range(3))
    inliers = points[distance_m(points, plane) < 0.004]
    best = np.linalg.svd(inliers - inliers.mean(axis=0), full_matrices=False)[2][2]
    assert abs(np.dot(plane[:3], best)) > np.cos(np.deg2rad(0.05))
