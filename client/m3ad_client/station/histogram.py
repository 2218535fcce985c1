"""The scores of a camera as a histogram with both limits, drawn as SVG."""

from collections.abc import Sequence

import numpy as np
from m3ad.limits import Limits, verdict

WIDTH, HEIGHT, BARS = 640, 180, 40


def bars(scores: Sequence[float], limits: Limits) -> list[dict[str, object]]:
    """Bars from the least to the largest of scores and limits: x, y, width and height in pixels, count, verdict."""
    low, high = _range(scores, limits)
    counts, edges = np.histogram(scores, BARS, (low, high))
    width = WIDTH / BARS
    tallest = max(1, int(counts.max()))
    return [
        {
            "x": round(i * width, 2),
            "y": round(HEIGHT * (1 - count / tallest), 2),
            "width": round(width - 1, 2),
            "height": round(HEIGHT * count / tallest, 2),
            "count": int(count),
            "verdict": verdict(float(edges[i] + edges[i + 1]) / 2, limits),
        }
        for i, count in enumerate(counts)
    ]


def place(value: float, scores: Sequence[float], limits: Limits) -> float:
    """Where a value lies, pixels from the left."""
    low, high = _range(scores, limits)
    return round(float(np.clip((value - low) / (high - low), 0, 1)) * WIDTH, 2)


def _range(scores: Sequence[float], limits: Limits) -> tuple[float, float]:
    values = [*scores, limits.reject, limits.lowest]
    low, high = min(values), max(values)
    return (low, high * 1.02) if high > low else (low - 0.5, high + 0.5)
