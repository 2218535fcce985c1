"""What people said of a station's parts: which ones a refit may learn from, and which ones judge it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from m3ad.bundle import MANIFEST, Bundle, sha256_of
from m3ad.errors import FrameError
from m3ad.frames import Frame
from m3ad.kept import kept_frame
from m3ad.ledger import Ledger, Part
from m3ad.limits import Limits
from m3ad.preprocess import prepare
from m3ad_runtime.pipeline import Inspector

LEAST_FIT, LEAST_HELD_OUT = 4, 2  # good parts; what so few show, the intervals say


@dataclass(frozen=True, slots=True, kw_only=True)
class Reviewed:
    """The reviewed parts of a camera, each content once, divided.

    Attributes:
        fit: good parts that a refit learns from.
        held_out: good parts that it never sees.
        defects: none of them is ever learned from.
        disputed: parts whose content was called good once and defect another time: neither.
        unusable: reviewed parts that could not be inspected.
    """

    fit: list[Part]
    held_out: list[Part]
    defects: list[Part]
    disputed: int
    unusable: int


def divided(parts: Sequence[Part], share: float, seed: int, where: str) -> Reviewed:
    """Divide reviewed parts; the same parts, share and seed give the same division.

    Args:
        parts: of one camera, in order, each with what a person said last.
        share: of the good parts that are held out.
        seed: of the permutation.
        where: the ledger, for messages.

    Raises:
        FrameError: there are too few good parts.
    """
    judged = [part for part in parts if part.score is not None]
    by_content: dict[tuple[str, str], list[Part]] = {}
    for part in judged:
        by_content.setdefault((part.rgb_sha256, part.xyz_sha256), []).append(part)
    agreed = [same[-1] for same in by_content.values() if len({part.said for part in same}) == 1]
    good = [part for part in agreed if part.said == "good"]
    held_out = max(LEAST_HELD_OUT, round(share * len(good)))
    if len(good) - held_out < LEAST_FIT:
        raise FrameError(
            f"{where} has {len(good)} good parts that somebody reviewed, a refit needs {LEAST_FIT} to learn from "
            f"beside those that are held out ({held_out}); review more parts on the station's page"
        )
    picked = {int(i) for i in np.random.default_rng(seed).permutation(len(good))[:held_out]}
    return Reviewed(
        fit=[part for i, part in enumerate(good) if i not in picked],
        held_out=[part for i, part in enumerate(good) if i in picked],
        defects=[part for part in agreed if part.said == "defect"],
        disputed=len(by_content) - len(agreed),
        unusable=len(parts) - len(judged),
    )


@dataclass
class Scorer:
    """Scores of reviewed parts by a bundle: the ledger's where it judged them, else its frames are inspected.

    Attributes:
        gone: parts whose frames would be needed and are not there any more.
    """

    bundle: Bundle
    ledger: Ledger
    gone: set[int] = field(default_factory=set)
    _inspector: Inspector | None = None
    _judged_by: dict[int, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._digest = sha256_of(self.bundle.path / MANIFEST)

    @property
    def inspector(self) -> Inspector:
        """Opened when a frame is first needed."""
        if self._inspector is None:
            self._inspector = Inspector(self.bundle)
        return self._inspector

    def frame(self, part: Part) -> Frame | None:
        """A part's frame; None where it is gone or cannot be read."""
        try:
            frame = kept_frame(self.ledger.path.parent, part, self.bundle.preprocessing.camera)
        except FrameError:
            frame = None
        if frame is None:
            self.gone.add(part.id)
        return frame

    def setup(self, part: Part) -> dict[str, Any]:
        """What judged a part in the station."""
        if part.setup is None:
            return {}
        if part.setup not in self._judged_by:
            self._judged_by[part.setup] = self.ledger.setup(part.setup)
        return self._judged_by[part.setup]

    def score(self, part: Part) -> float | None:
        """The score of a part; None where its frame is gone."""
        if self.setup(part).get("bundle_sha256") == self._digest:
            return part.score
        frame = self.frame(part)
        if frame is None:
            return None
        return self.inspector.inspect_prepared(prepare(frame, self.bundle.preprocessing)).score

    def scores(self, parts: Sequence[Part]) -> dict[int, float]:
        """Scores by part, those whose frames are gone left out."""
        return {part.id: score for part in parts if (score := self.score(part)) is not None}

    def frames(self, parts: Sequence[Part]) -> Iterator[Frame]:
        """The frames of parts, those that are gone left out."""
        return (frame for part in parts if (frame := self.frame(part)) is not None)

    def moved_limits(self, parts: Sequence[Part]) -> Limits | None:
        """Limits that a station's configuration sets for these parts itself, over those of the bundle."""
        threshold = self.bundle.manifest.threshold
        own = threshold.limits
        for part in parts:
            setup = self.setup(part)
            if setup.get("bundle_sha256") == self._digest and Limits(**setup["limits"]) != own:
                return Limits(**setup["limits"])
        return None
