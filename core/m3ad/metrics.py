"""Detection and localisation metrics; every AUPRO is named with its limit and the way it was computed.

`mvtec99`: 99 thresholds equally spaced in rank over the good pixels, as MVTec's and CFM's scripts do; this is what the
published tables hold. At a limit of 1 % it is a single trapezoid. `exact`: the whole sorted curve, as CRD does.
"""

from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from m3ad.errors import FrameError

AuproMode = Literal["mvtec99", "exact"]
AUPRO_LIMITS_PERCENT = (30, 10, 5, 1)
MVTEC_THRESHOLDS = 99

Floats = npt.NDArray[np.floating[Any]]
Bools = npt.NDArray[np.bool_]


def evaluate(maps: Floats, scores: Floats, masks: Bools, labels: Bools) -> dict[str, float]:
    """Compute every metric of a test split.

    Args:
        maps: [K, H, W], larger is more anomalous.
        scores: [K], one a frame.
        masks: [K, H, W], True where defective.
        labels: [K], True for a defective part.

    Returns:
        image_auroc, pixel_auroc, aupro_30_mvtec99, aupro_10_mvtec99, .., aupro_1_exact, all in 0..1.

    Raises:
        FrameError: the split has no good or no defective parts, or no defective pixels.
    """
    metrics = {"image_auroc": image_auroc(scores, labels), "pixel_auroc": pixel_auroc(maps, masks)}
    for mode in get_args(AuproMode):
        fpr, pro = pro_curve(maps, masks, mode)
        for percent in AUPRO_LIMITS_PERCENT:
            metrics[f"aupro_{percent}_{mode}"] = _area_to(fpr, pro, percent / 100)
    return metrics


def image_auroc(scores: Floats, labels: Bools) -> float:
    """Probability that a defective part scores above a good one, ties counting half; `scores` and `labels` are [K]."""
    return _auroc(scores, labels, "parts")


def pixel_auroc(maps: Floats, masks: Bools) -> float:
    """Probability that a defective pixel scores above a good one, over all frames; both are [K, H, W]."""
    return _auroc(maps, masks, "pixels")


def aupro(maps: Floats, masks: Bools, limit: float, mode: AuproMode = "mvtec99") -> float:
    """Area under the per-region overlap curve up to a false positive rate, divided by that rate.

    Args:
        maps: [K, H, W], larger is more anomalous.
        masks: [K, H, W], True where defective.
        limit: false positive rate in (0, 1].
        mode: see the module.

    Raises:
        FrameError: there are no defective or no good pixels.
    """
    if not 0 < limit <= 1:
        raise ValueError(f"limit must lie in (0, 1], got {limit}")
    return _area_to(*pro_curve(maps, masks, mode), limit)


def pro_curve(maps: Floats, masks: Bools, mode: AuproMode) -> tuple[Floats, Floats]:
    """Per-region overlap against false positive rate, both ascending and ending in (1, 1).

    PRO(t) = mean over the 8-connected regions C of all masks of |{p in C: map_p > t}| / |C|   (Bergmann et al. 2021)

    `mvtec99` takes the false positive rate from the rank of the threshold among the good pixels, not from the
    threshold; with ties (a background of zeros) several rates then share one overlap.
    """
    if mode not in get_args(AuproMode):
        raise ValueError(f"mode must be one of {', '.join(get_args(AuproMode))}, got {mode!r}")
    _check(maps, masks, "pixels")
    bad, weight = maps[masks], _region_weights(masks)
    if mode == "mvtec99":
        good = np.sort(maps[~masks])
        rank = np.linspace(0, len(good) - 1, MVTEC_THRESHOLDS).astype(np.intp)
        order = np.argsort(bad)
        at_most = np.searchsorted(bad[order], good[rank], side="right")
        above = np.maximum(1 - np.concatenate([[0.0], np.cumsum(weight[order])]), 0)[at_most]
        fpr = 1 - (rank + 1) / len(good)
        return np.append(fpr[::-1], 1.0), np.append(above[::-1], 1.0)
    scores = np.concatenate([maps[~masks], bad])
    num_good = len(scores) - len(bad)
    order = np.argsort(scores)[::-1]
    last = np.append(np.diff(scores[order]) != 0, True)  # a threshold takes all tied pixels at once
    fpr = np.cumsum(order < num_good)[last] / num_good
    pro = np.cumsum(np.concatenate([np.zeros(num_good), weight])[order])[last]
    return np.concatenate([[0.0], fpr, [1.0]]), np.concatenate([[0.0], np.minimum(pro, 1), [1.0]])


def rank_correlation(a: Floats, b: Floats) -> float:
    """Spearman's correlation of two arrays of one shape, ties averaged; equal rankings give 1, a constant one 0."""
    if a.shape != b.shape:
        raise ValueError(f"rank correlation needs equal shapes, got {list(a.shape)} and {list(b.shape)}")
    rank_a, rank_b = _ranks(a), _ranks(b)
    if np.array_equal(rank_a, rank_b):
        return 1.0
    rank_a, rank_b = rank_a - rank_a.mean(), rank_b - rank_b.mean()
    norm = np.sqrt((rank_a @ rank_a) * (rank_b @ rank_b))
    return float(rank_a @ rank_b / norm) if norm else 0.0


def _ranks(values: Floats) -> Floats:
    _, index, count = np.unique(values.ravel(), return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[index]


def _auroc(scores: Floats, positive: Bools, what: str) -> float:
    _check(scores, positive, what)
    bad, good = scores[positive], np.sort(scores[~positive])
    below = np.searchsorted(good, bad, side="left") + np.searchsorted(good, bad, side="right")
    return float(below.mean() / 2 / len(good))


def _check(scores: Floats, positive: Bools, what: str) -> None:
    if scores.shape != positive.shape or positive.dtype != np.bool_:
        raise ValueError(
            f"scores {list(scores.shape)} need a bool truth of the same shape, "
            f"got {positive.dtype} {list(positive.shape)}"
        )
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite")
    if positive.all() or not positive.any():
        missing = "good" if positive.all() else "defective"
        raise FrameError(
            f"the test frames hold no {missing} {what}, so no metric can be computed; "
            "evaluate a split with good and defective parts and their masks"
        )


def _region_weights(masks: Bools) -> Floats:
    """1 / (size of its region * number of regions) for each defective pixel, in the order of maps[masks]."""
    eight_in_plane = np.zeros((3, 3, 3), np.bool_)
    eight_in_plane[1] = True  # regions never reach into the next frame
    labels, num_regions = ndimage.label(masks, eight_in_plane)
    region = labels[masks]
    return 1 / (np.bincount(region)[region] * num_regions)


def _area_to(fpr: Floats, pro: Floats, limit: float) -> float:
    """Trapezoids up to `limit`, the last one cut by linear interpolation, divided by `limit`."""
    inside = int(np.searchsorted(fpr, limit, side="right"))
    x, y = fpr[:inside], pro[:inside]
    if inside < len(fpr):
        x, y = (
            np.append(x, limit),
            np.append(y, np.interp(limit, fpr[inside - 1 : inside + 1], pro[inside - 1 : inside + 1])),
        )
    return float(np.sum((y[1:] + y[:-1]) * np.diff(x)) / 2 / limit)
