"""Samples of a split, progress shown over them, and rows drawn from their features."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from m3ad.errors import FrameError
from m3ad.frames import Sample
from torch import Tensor

from m3ad_export.train.features import FeatureExtractor

# Wraps an iterable of known length to show progress under a description; the command line hands in rich's.
Track = Callable[[Iterable[Any], str, int], Iterable[Any]]
Item = TypeVar("Item")
Pool = tuple[Tensor, Tensor]  # rgb_features [r, D], xyz_features [r, D]


def require_good(split: str, samples: Sequence[Sample]) -> None:
    """Refuse an empty split, and one that holds a defect.

    Raises:
        FrameError: see above.
    """
    bad = [s.name for s in samples if not s.is_good]
    if not samples or bad:
        raise FrameError(
            f"the {split} split holds {len(samples)} frames, {len(bad)} of them defective ({', '.join(bad[:3])}); "
            "training needs good frames only, at least one in each split"
        )


def sample_evenly(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` of the items, evenly spread."""
    return [items[int(i)] for i in torch.linspace(0, len(items) - 1, min(count, len(items)))]


def draw_pool(
    samples: Sequence[Sample], extract: FeatureExtractor, pool_rows: int, seed: int, track: Track
) -> Pool:
    """The same number of random rows from each frame, paired by pixel."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[Pool] = []
    for sample in track(samples, "features", len(samples)):
        frame = extract(sample)
        count = len(frame.scored_pixel)
        order = torch.randperm(count, generator=generator)
        rows.append(frame.rows(order[: math.ceil(pool_rows / len(samples))].sort().values))
    return torch.cat([rgb for rgb, _ in rows]), torch.cat([xyz for _, xyz in rows])
