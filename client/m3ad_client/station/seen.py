"""What a line says of a part it is done with, and the clock of the steps that led there."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from m3ad.limits import Limits, Verdict


@dataclass(frozen=True, slots=True)
class Seen:
    """A part that is in the ledger.

    Attributes:
        camera: its name.
        verdict: or `fault`, and then there are no score and no limits.
        score: of the part.
        limits: what it was held against.
        step_s: seconds of the station's own steps: read, inspect, save, write.
        stage_ms: milliseconds of the detector's stages; empty where a server runs them.
    """

    camera: str
    verdict: Verdict | Literal["fault"]
    score: float | None = None
    limits: Limits | None = None
    step_s: Mapping[str, float] = field(default_factory=dict)
    stage_ms: Mapping[str, float] = field(default_factory=dict)


class Steps:
    """Times steps by their names, in `seconds`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the block."""
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started
