"""Metrics equal sklearn, a pixel-by-pixel reading of MVTec's formula, and a brute-force curve."""

from itertools import pairwise

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from m3ad.errors import FrameError
from m3ad.metrics import aupro, evaluate, image_auroc, pixel_auroc, pro_curve, rank_correlation
from scipy import ndimage
from sklearn.metrics import roc_auc_score


def toy(seed=0, count=6, size=32, levels=None, separation=1.0):
    """Random maps with blobs of several sizes, one of which touches another only by a corner; ties when `levels`."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, size, size), bool)
    masks[0, 2:8, 3:9] = masks[0, 8:10, 9:12] = True  # joined by a corner: one 8-connected region
    masks[1, 20:22, 20:30] = masks[1, 5:6, 5:6] = True
    masks[2, 10:25, 10:12] = True
    masks[3, 10:25, 10:12] = True  # same place in the next frame: a region of its own
    maps = rng.normal(size=masks.shape) + separation * masks
    maps[:, size // 2 :] *= rng.random((count, 1, 1)) < 0.7  # zeroed background
    return (np.round(maps * levels) / levels if levels else maps).astype(np.float32), masks


def regions(masks):
    for index, mask in enumerate(masks):
        labels, num = ndimage.label(mask, np.ones((3, 3)))
        yield from ((index, labels == k + 1) for k in range(num))


def pro_at(maps, masks, threshold):
    return np.mean([(maps[i][region] > threshold).mean() for i, region in regions(masks)])


def area_to(fpr, pro, limit):
    """Integrate the piecewise linear curve on a grid that holds every vertex and the limit."""
    grid = np.unique(np.concatenate([fpr[fpr < limit], [limit]]))
    total = 0.0
    for a, b in pairwise(grid):
        # Where the curve rises at one rate, an interval starts at the top of the step and ends at its foot.
        left = pro[np.flatnonzero(fpr == a)[-1]]
        after = np.flatnonzero(fpr >= b)[0]
        before = after - 1
        right = pro[before] + (pro[after] - pro[before]) * (b - fpr[before]) / (fpr[after] - fpr[before])
        total += (b - a) * (left + right) / 2
    return total / limit


@pytest.mark.parametrize("levels", [None, 4])
@pytest.mark.parametrize("limit", [0.3, 0.1, 0.05, 0.01])
def test_mvtec99_equals_the_published_formula(levels, limit):
    maps, masks = toy(levels=levels)
    good = np.sort(maps[~masks])
    points = [(1.0, 1.0)]
    for k in range(99):
        position = int(k * (len(good) - 1) / 98)
        points.append((1 - (position + 1) / len(good), pro_at(maps, masks, good[position])))
    fpr, pro = np.array(points[::-1]).T
    assert aupro(maps, masks, limit) == pytest.approx(area_to(fpr, pro, limit), abs=1e-12)


@pytest.mark.parametrize("levels", [None, 4])
@pytest.mark.parametrize("limit", [0.3, 0.1, 0.05, 0.01, 1.0])
def test_exact_equals_brute_force_over_every_threshold(levels, limit):
    maps, masks = toy(levels=levels, count=4, size=20, seed=3) if levels is None else toy(levels=levels)
    masks = masks & (np.arange(masks.shape[1]) < 18)[:, None]
    thresholds = np.unique(maps)[::-1]
    fpr = [0.0, *[(maps[~masks] >= t).mean() for t in thresholds], 1.0]
    at_least = [np.mean([(maps[i][r] >= t).mean() for i, r in regions(masks)]) for t in thresholds]
    expected = area_to(np.array(fpr), np.array([0.0, *at_least, 1.0]), limit)
    assert aupro(maps, masks, limit, "exact") == pytest.approx(expected, abs=1e-9)


def test_one_trapezoid_is_all_that_mvtec99_sees_of_one_percent():
    """With a near-perfect map the two modes differ by far at 1 % and hardly at 30 % (systems.md, finding 4)."""
    rng = np.random.default_rng(0)
    masks = np.zeros((10, 128, 128), bool)
    masks[:5, 30:60, 30:60] = True
    maps = rng.normal(size=masks.shape) + 5 * masks
    maps[rng.random(masks.shape) < 2e-5] = 9.0  # a few hot good pixels hold the last threshold up
    assert aupro(maps, masks, 0.01, "exact") > 0.98
    assert aupro(maps, masks, 0.01, "mvtec99") < 0.6
    assert aupro(maps, masks, 0.3, "exact") == pytest.approx(aupro(maps, masks, 0.3, "mvtec99"), abs=0.03)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=60).filter(
        lambda rows: len({positive for _, positive in rows}) == 2
    )
)
def test_auroc_equals_sklearn_with_ties(values):
    scores, labels = (np.array(column) for column in zip(*values, strict=True))
    scores = scores.astype(np.float32)
    assert image_auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))


def test_every_metric_is_named_with_its_mode_and_matches_its_own_function():
    maps, masks = toy()
    labels = masks.any(axis=(1, 2))
    scores = maps.max(axis=(1, 2))
    metrics = evaluate(maps, scores, masks, labels)
    assert metrics["pixel_auroc"] == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()))
    assert metrics["pixel_auroc"] == pixel_auroc(maps, masks)
    assert metrics["image_auroc"] == pytest.approx(roc_auc_score(labels, scores))
    named = {
        f"aupro_{p}_{mode}": aupro(maps, masks, p / 100, mode)
        for mode in ("mvtec99", "exact")
        for p in (30, 10, 5, 1)
    }
    assert {k: v for k, v in metrics.items() if k.startswith("aupro")} == named
    assert list(metrics) == ["image_auroc", "pixel_auroc", *named]


@pytest.mark.parametrize("seed", [0, 6])
def test_a_useless_map_is_worth_plain_zero(seed):
    """The weights 1/size of some regions miss 1 by rounding; the area does not turn negative for it."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((2, 16, 16), bool)
    for mask in (masks[0], masks[0], masks[0], masks[1], masks[1], masks[1]):
        (y, x), (height, width) = rng.integers(0, 12, 2), rng.integers(1, 4, 2)
        mask[y : y + height, x : x + width] = True
    maps = np.where(masks, 0.0, 1.0) + 0.1 * rng.random(masks.shape)
    area = aupro(maps, masks, 0.01, "mvtec99")
    assert area == 0
    assert not np.signbit(area)


@pytest.mark.parametrize("mode", ["mvtec99", "exact"])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_aupro_depends_only_on_order_and_stays_in_bounds(mode, seed):
    maps, masks = toy(seed, count=4, size=32, levels=6)
    value = aupro(maps, masks, 0.3, mode)
    assert 0 <= value <= 1
    assert aupro(np.exp(maps) * 3 - 7, masks, 0.3, mode) == pytest.approx(value, abs=1e-9)
    fpr, pro = pro_curve(maps, masks, mode)
    assert (np.diff(fpr) >= 0).all()
    assert (np.diff(pro) >= -1e-12).all()
    assert (fpr[-1], pro[-1]) == (1, 1)


def test_perfect_maps_reach_one_and_shuffled_truth_does_not():
    masks = toy()[1]
    perfect = masks.astype(np.float32) + np.linspace(0, 0.5, masks.size, dtype=np.float32).reshape(
        masks.shape
    )
    for limit in (0.3, 0.01):
        for mode in ("mvtec99", "exact"):
            assert aupro(perfect, masks, limit, mode) == pytest.approx(1)
            assert aupro(-perfect, masks, limit, mode) < 0.05


def test_splits_without_one_of_the_classes_are_explained():
    maps, masks = toy()
    with pytest.raises(
        FrameError, match="the test frames hold no defective pixels, so no metric can be computed"
    ):
        pixel_auroc(maps, np.zeros_like(masks))
    with pytest.raises(FrameError, match="hold no good parts"):
        image_auroc(maps.max(axis=(1, 2)), np.ones(len(maps), bool))
    with pytest.raises(ValueError, match=r"need a bool truth of the same shape, got uint8 \[6, 32, 32\]"):
        aupro(maps, masks.astype(np.uint8), 0.3)
    with pytest.raises(ValueError, match="scores must be finite"):
        aupro(np.where(masks, np.nan, maps), masks, 0.3)
    with pytest.raises(ValueError, match=r"limit must lie in \(0, 1\], got 30"):
        aupro(maps, masks, 30)
    with pytest.raises(ValueError, match="mode must be one of mvtec99, exact, got 'mvtec'"):
        aupro(maps, masks, 0.3, "mvtec")


@settings(max_examples=60, deadline=None)
@given(data=st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=3, max_size=50))
def test_rank_correlation_equals_scipy_with_ties(data):
    a, b = (np.array(column, np.float32) for column in zip(*data, strict=True))
    if len(set(a)) > 1 and len(set(b)) > 1:
        assert rank_correlation(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-12)
    assert rank_correlation(a, 3 * a + 1) == 1


def test_rank_correlation_of_a_constant_is_zero():
    assert rank_correlation(np.ones(5), np.arange(5.0)) == 0
    with pytest.raises(ValueError, match=r"needs equal shapes, got \[5\] and \[4\]"):
        rank_correlation(np.ones(5), np.ones(4))
