"""How far frames may be disturbed before a bundle's verdicts change: measured level by level, limits named."""

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from m3ad.errors import FrameError
from m3ad.frames import Frame
from m3ad.metrics import image_auroc
from m3ad.preprocess import prepare
from m3ad_runtime.pipeline import Inspector

from m3ad_calibrate.disturb import Disturbance

FORMAT = "m3ad-robustness"


@dataclass(frozen=True, slots=True)
class Level:
    """What a bundle makes of frames at one level.

    `image_auroc` is over the frames that were inspected, None where only good or only defective ones were.
    """

    level: float | None
    image_auroc: float | None
    missed: int
    false_alarms: int
    refused: int

    def holds(self, undisturbed: "Level", drop: float) -> bool:
        """Whether no verdict is worse than undisturbed, no frame is refused, and AUROC falls by at most `drop`."""
        if self.image_auroc is None or undisturbed.image_auroc is None:
            return False
        no_worse = all(
            getattr(self, n) <= getattr(undisturbed, n) for n in ("missed", "false_alarms", "refused")
        )
        return no_worse and undisturbed.image_auroc - self.image_auroc <= drop + 1e-12


@dataclass(frozen=True, slots=True)
class Found:
    """The levels of a disturbance and the last one up to which all hold; None where not even the first does."""

    disturbance: Disturbance
    levels: list[Level]
    limit: float | None

    def sentence(self) -> str:
        """The limit in words: as in `misregistration: up to 1.5 px`."""
        unit, tried = self.disturbance.unit, self.disturbance.levels
        if self.limit is None:
            return f"{self.disturbance.name}: not even {tried[0]:g} {unit}, the weakest that was tried"
        beyond = ", the strongest that was tried" if self.limit == tried[-1] else ""
        way = "up to" if tried[-1] > tried[0] else "down to"
        return f"{self.disturbance.name}: {way} {self.limit:g} {unit}{beyond}"


def measure(
    inspector: Inspector,
    frames: Sequence[tuple[Frame, bool]],
    disturbances: Sequence[Disturbance],
    drop: float,
    say: Callable[[str], None],
) -> tuple[Level, list[Found]]:
    """Inspect every frame undisturbed and at every level.

    Args:
        inspector: of the bundle.
        frames: with whether each is good; their holes are declared ones (`with_holes`).
        disturbances: to try.
        drop: how far image AUROC may fall where a level still holds.
        say: told of each level.

    Raises:
        FrameError: an undisturbed frame cannot be inspected, or good or defective ones are missing.
    """
    goods = [good for _, good in frames]
    if len({*goods}) != 2:
        raise FrameError("robustness is measured on good and on defective frames; one of the two is missing")
    plain = [inspector.inspect_prepared(prepare(frame, inspector.preprocessing)).score for frame, _ in frames]
    undisturbed = _level(None, plain, goods, inspector.limits.reject)
    found = []
    for each in disturbances:
        levels = []
        for level in each.levels:
            scores = [_score(inspector, each, frame, level) for frame, _ in frames]
            levels.append(_level(level, scores, goods, inspector.limits.reject))
            say(f"{each.name} {level:g} {each.unit}: {told(levels[-1])}")
        found.append(Found(each, levels, _limit(levels, undisturbed, drop)))
    return undisturbed, found


def told(level: Level) -> str:
    """A level in one line."""
    auroc = "none" if level.image_auroc is None else f"{level.image_auroc:.3f}"
    return f"image AUROC {auroc}, {level.missed} missed, {level.false_alarms} false alarms, {level.refused} refused"


def document(
    bundle: dict[str, Any],
    threshold: float,
    drop: float,
    goods: Iterable[bool],
    undisturbed: Level,
    found: list[Found],
) -> dict[str, Any]:
    """The report as JSON."""
    counted = list(goods)
    return {
        "format": FORMAT,
        "bundle": bundle,
        "threshold": threshold,
        "auroc_drop": drop,
        "frames": {"good": sum(counted), "defective": len(counted) - sum(counted)},
        "undisturbed": asdict(undisturbed),
        "disturbances": [
            {
                "name": f.disturbance.name,
                "unit": f.disturbance.unit,
                "limit": f.limit,
                "told": f.sentence(),
                "levels": [asdict(level) for level in f.levels],
            }
            for f in found
        ],
    }


def _score(inspector: Inspector, each: Disturbance, frame: Frame, level: float) -> float | None:
    rng = np.random.default_rng(zlib.crc32(f"{each.name} {level} {frame.name}".encode()))
    try:
        return inspector.inspect_prepared(
            prepare(each.change(frame, level, rng), inspector.preprocessing)
        ).score
    except FrameError:
        return None


def _level(
    level: float | None, scores: Sequence[float | None], goods: Sequence[bool], reject: float
) -> Level:
    seen = [(score, good) for score, good in zip(scores, goods, strict=True) if score is not None]
    values, is_bad = np.array([s for s, _ in seen]), np.array([not good for _, good in seen], np.bool_)
    both = bool(is_bad.any() and not is_bad.all())
    return Level(
        level,
        image_auroc(values, is_bad) if both else None,
        int((is_bad & (values <= reject)).sum()) if seen else 0,
        int((~is_bad & (values > reject)).sum()) if seen else 0,
        len(scores) - len(seen),
    )


def _limit(levels: Sequence[Level], undisturbed: Level, drop: float) -> float | None:
    limit = None
    for level in levels:
        if not level.holds(undisturbed, drop):
            break
        limit = level.level
    return limit
