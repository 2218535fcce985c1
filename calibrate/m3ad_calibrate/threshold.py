"""The verdict's limits from the scores of good validation parts, and what can honestly be said of their error rates."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from m3ad.errors import FrameError
from scipy import stats

CONFIDENCE = 0.95
Kernel = Literal["linear", "rbf"]
SvmInput = Literal["product", "terms"]


@dataclass(frozen=True, slots=True)
class Threshold:
    """A threshold, how it was chosen, and the interval its false-alarm rate lies in."""

    value: float
    rule: str
    frames: int
    false_alarms: int
    false_alarm_rate_low: float
    false_alarm_rate_high: float
    confidence: float = CONFIDENCE


def fit_threshold(scores: Sequence[float], false_alarm_rate: float | None = None) -> Threshold:
    """The smallest threshold that good parts exceed no more often than asked.

    k = ceil((n + 1) (1 - rate));  threshold = k-th smallest score   (split conformal prediction, Vovk et al. 2005)

    Args:
        scores: of good parts, one a part; a part is anomalous when its score lies above the threshold.
        false_alarm_rate: wanted share of good parts that are called anomalous, 0..1; None lets all of them pass.

    Returns:
        The threshold with the exact binomial (Clopper-Pearson) interval of its rate on parts like these.

    Raises:
        FrameError: there are too few parts for the rate.
        ValueError: the rate is not between 0 and 1.
    """
    n = len(scores)
    if n == 0:
        raise FrameError(
            "there are no validation parts; the threshold needs good parts that were not trained on"
        )
    ordered = np.sort(np.asarray(scores, np.float64))
    if false_alarm_rate is None:
        value, rule = float(ordered[-1]), "largest score of the good validation parts"
    else:
        if not 0 < false_alarm_rate < 1:
            raise ValueError(f"false_alarm_rate must lie between 0 and 1, got {false_alarm_rate}")
        k = math.ceil((n + 1) * (1 - false_alarm_rate))
        if k > n:
            needed = math.ceil(1 / false_alarm_rate) - 1
            raise FrameError(
                f"{n} validation parts cannot show a false-alarm rate of {false_alarm_rate:g}, at least {needed} are "
                f"needed; add good parts to the validation split or ask for {1 / (n + 1):.3f} or more"
            )
        value, rule = float(ordered[k - 1]), f"false-alarm rate {false_alarm_rate:g}"
    alarms = int((ordered > value).sum())
    low, high = interval(alarms, n)
    return Threshold(value, rule, n, alarms, low, high)


def at_limit(value: float, scores: Sequence[float]) -> Threshold:
    """A limit that somebody set, with the rate at which good parts exceed it, where their scores are known."""
    alarms = sum(score > value for score in scores)
    low, high = interval(alarms, len(scores)) if scores else (0.0, 1.0)
    return Threshold(value, "set by hand", len(scores), alarms, low, high)


def interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % Clopper-Pearson interval of a rate."""
    tail = (1 - CONFIDENCE) / 2
    low = float(stats.beta.ppf(tail, successes, trials - successes + 1)) if successes else 0.0
    high = float(stats.beta.ppf(1 - tail, successes + 1, trials - successes)) if successes < trials else 1.0
    return low, high


def reliability(scores: Sequence[float]) -> list[tuple[float, float, float, float]]:
    """How often the rule alarms on a good part it has not seen, for every rate that so many parts can show.

    Each part in turn is left out, the threshold is fitted to the others and tried on it.

    Returns:
        Rows of (rate asked, rate found, low, high), the last two the 95 % interval of the rate; none for one part.
    """
    n = len(scores)
    rows = []
    for k in range(1, n):
        rate = k / n
        others = [[*scores[:i], *scores[i + 1 :]] for i in range(n)]
        alarms = sum(s > fit_threshold(rest, rate).value for s, rest in zip(scores, others, strict=True))
        rows.append((rate, alarms / n, *interval(alarms, n)))
    return rows


def save_score_plot(scores: dict[str, Sequence[float]], threshold: float, path: Path) -> None:
    """Rows of dots, one per group of parts, with the threshold; beside them the rule's reliability on the first."""
    from matplotlib.figure import Figure

    checked = reliability(next(iter(scores.values())))
    figure = Figure(figsize=(11, 3.5), layout="constrained")
    axes, curve = figure.subplots(1, 2, width_ratios=(3, 2))
    for row, (name, values) in enumerate(scores.items()):
        axes.plot(values, [row] * len(values), "o", alpha=0.6, label=name)
    axes.axvline(threshold, color="black", linewidth=1)
    axes.set_yticks(range(len(scores)), list(scores))
    axes.set_ylim(-0.6, len(scores) - 0.4)
    axes.set_xlabel(f"score; above {threshold:.4g} a part is anomalous")
    curve.plot([0, 1], [0, 1], color="black", linewidth=0.8)
    if checked:
        asked, found, low, high = zip(*checked, strict=True)
        curve.plot(asked, found, "o-", markersize=3)
        curve.fill_between(asked, low, high, alpha=0.2)
    curve.set_xlabel("false-alarm rate asked")
    curve.set_ylabel("found, each part left out once")
    figure.savefig(path, dpi=120)
