"""Whether a camera's frames still look as its bundle's calibration frames did, and if they do not, in which way."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from m3ad.bundle import Bundle
from m3ad.errors import FrameError
from m3ad.frame_settings import Preprocessing
from m3ad.frames import Frame
from m3ad.reference import Band, Look, Reason, Reference, departures, look, score_band

from m3ad_client.station import config
from m3ad_client.station.faults import Faults

WINDOW, LEAST = 32, 16  # frames that are looked at together, and at least
EVERY_S = 1.0  # a look takes as long as a fast inspection, and drift is slow
GONE = 0.8  # of what is tolerated, below which an alarm goes: one that is on the edge does not come and go
PATIENCE = 8  # looks that a shift of scores must last without another reason: what moves both may show in scores first


@dataclass
class Drift:
    """Looks at a camera's frames after they are judged, and tells a fault for each reason that they drifted for.

    Args:
        camera: its name.
        faults: where alarms are told.
        reference: how the calibration frames look; nothing is looked at without.
        scores: those of the good validation parts.
        preprocessing: the bundle's.
        clock: seconds that only grow.

    Attributes:
        shares: how far the window lies off by each reason, over what is tolerated.
        alarms: the reasons that are told now.
    """

    camera: str
    faults: Faults
    reference: Reference | None = None
    scores: Band | None = None
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    clock: Callable[[], float] = time.monotonic
    shares: dict[Reason, float] = field(default_factory=dict)
    alarms: set[Reason] = field(default_factory=set)
    _window: deque[Look] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _next: float = 0.0
    _scores_off: int = 0

    @classmethod
    def of(cls, camera: config.Camera, faults: Faults) -> "Drift":
        """That of a camera; it is said where the bundle has no reference.

        Raises:
            ArtifactError: the bundle cannot be read, or its reference is damaged.
        """
        place = camera.bundle or camera.reference
        if place is None:
            faults.say(
                f"camera {camera.name}: drift is not watched; name the served bundle as its `reference`"
            )
            return cls(camera.name, faults)
        bundle = Bundle.read(place)
        if bundle.manifest.reference is None:
            faults.say(
                f"camera {camera.name}: drift is not watched, {place} does not say how its calibration frames look; "
                f"record it: m3ad-calibrate threshold {place} --data DATA"
            )
            return cls(camera.name, faults)
        reference = Reference.from_json(bundle.manifest.reference, f"the reference of {place}")
        known = bundle.document["threshold"].get("validation_scores", [])
        scores = score_band(known, bundle.manifest.threshold.value)
        return cls(camera.name, faults, reference, scores, bundle.preprocessing)

    def add(self, frame: Frame, score: float | None) -> None:
        """Look at a frame, if it is time to.

        Args:
            frame: as it came.
            score: of the part; None where it could not be inspected.
        """
        if self.reference is None or self.clock() < self._next:
            return
        self._next = self.clock() + EVERY_S
        try:
            self._window.append(look(frame, self.preprocessing, score))
        except FrameError:  # the part's own fault says so
            return
        if len(self._window) < LEAST:
            return
        found = departures(self.reference, self.scores, self._window)
        self.shares = {reason: each.share for reason, each in found.items()}
        is_explained = any(share > 1 for reason, share in self.shares.items() if reason != "score")
        is_explained |= bool(self.alarms - {"score"})
        self._scores_off = 0 if is_explained or self.shares.get("score", 0) <= 1 else self._scores_off + 1
        for reason, each in found.items():
            comes, goes = each.share > 1, each.share < GONE
            if reason == "score":
                comes, goes = self._scores_off > PATIENCE, goes or is_explained
            place = f"drift {self.camera} {reason}"
            if comes and reason not in self.alarms:
                self.alarms.add(reason)
                self.faults.set(place, f"{each.told} (median of {len(self._window)} frames)")
            elif goes and reason in self.alarms:
                self.alarms.remove(reason)
                self.faults.clear(place)
