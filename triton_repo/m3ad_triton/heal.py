"""A server that is watched and healed: its processes every second, and every category by frames that are known.

What is dead, stopped, hung or wrong is ended with the whole server, which is started again on the same ports and
models: Triton never replaces a stage process.
"""

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from m3ad.errors import ServerError
from m3ad.systemd import tell_systemd
from tritonclient.utils import InferenceServerException

from m3ad_triton.line import Line
from m3ad_triton.server import LocalServer

TRIES = 3  # starts for one fault, before it is left to whoever started us
FRAMES, SOONEST_S = 50, 2.0  # between two golden frames of a category
SLOWEST, PATIENT_S = 20, 5.0  # golden frames' time that one may take
BUSY = ("Exceeds maximum queue size", "Request timeout expired")  # a full queue is no fault if it moves
GOLDEN = "its golden frame"
ROOM_S = 0.1  # before a full queue is asked again


@dataclass(slots=True)
class Watch:
    """Watches a running server, and heals it.

    Attributes:
        server: that runs.
        say: takes a line for whoever looks on.
        period_s: between two golden frames of a category; of None, 50 times what asking takes, at least 2 s.
        timeout_s: for an answer; of None, 20 times what one takes, at least 5 s.
        problem: what is wrong now, in a sentence; None while all is well.
        over_network: whether golden frames are asked for; not where TLS refuses a client with the server's certificate.
    """

    server: LocalServer
    say: Callable[[str], None]
    period_s: float | None = None
    timeout_s: float | None = None
    problem: str | None = None
    over_network: bool = True
    _takes: dict[str, tuple[float, float]] = field(
        default_factory=dict
    )  # seconds: golden frame, and all that is asked
    _due: dict[str, float] = field(default_factory=dict)

    def begin(self) -> None:
        """Ask for every golden frame once.

        Raises:
            ServerError: an answer is not the bundle's.
        """
        self.over_network = self.server.tls is None or self._reaches()
        if problem := self._probe_all(self.server.ready_timeout_s):
            raise ServerError(problem)

    def run(self) -> None:
        """Watch and heal for ever.

        Raises:
            ServerError: the same fault was there again after every start.
        """
        while True:
            tell_systemd("WATCHDOG=1")
            self.problem = self.look()
            if self.problem:
                self._heal(self.problem)
                self.problem = None

    def look(self) -> str | None:
        """What is wrong, after about a second; None when nothing is."""
        if problem := self.server.look():
            return problem
        now = time.monotonic()
        late = [category for category, due in self._due.items() if due <= now]
        return next(filter(None, map(self._probe, late)), None)

    def _heal(self, problem: str) -> None:
        started = time.monotonic()
        self.say(f"{problem}; starting the server again")
        for _ in range(TRIES):
            tell_systemd(f"EXTEND_TIMEOUT_USEC={int(self.server.ready_timeout_s * 1e6)}")
            try:
                self.server.restart()
            except ServerError as error:
                again: str | None = str(error)
            else:
                again = self._probe_all(self.server.ready_timeout_s)
            if again is None:
                self.say(f"served again, {time.monotonic() - started:.1f} s after that was noticed")
                return
            self.say(again)
        raise ServerError(f"the server was started {TRIES} times and is not well: {again}")

    def _probe_all(self, timeout_s: float) -> str | None:
        if not self.over_network:
            return None
        for category in self.server.models.categories:
            if problem := self._probe(category, timeout_s):
                return problem
        return None

    def _probe(self, category: str, timeout_s: float | None = None) -> str | None:
        served = self.server.models.categories.get(category)
        if served is None or not self.server.changing.acquire(blocking=False):  # a reload asks by itself
            return None
        try:
            usual, whole = self._takes.get(category, (math.inf, math.inf))
            patient = max(PATIENT_S, SLOWEST * usual) if usual < math.inf else PATIENT_S
            allowed = timeout_s or self.timeout_s or patient
            started = time.monotonic()
            with self.server.line() as line:
                problem = _fault(line, partial(line.difference, served.golden), served.last, allowed, GOLDEN)
                took = time.monotonic() - started
                for check in served.checks:
                    name = served.names[check.model]
                    ask = partial(line.frame_difference, check, model=name)
                    problem = problem or _fault(line, ask, name, allowed, f"`{name}`")
            whole = min(whole, time.monotonic() - started)
            self._takes[category] = min(usual, took), whole
            period = self.period_s or max(SOONEST_S, FRAMES * whole)
            self._due[category] = time.monotonic() + period
            return f"category {category}: {problem}" if problem else None
        finally:
            self.server.changing.release()

    def _reaches(self) -> bool:
        """Whether the server takes its own certificate as a client's."""
        golden = next(iter(self.server.models.categories.values())).golden
        with self.server.line() as line:
            try:
                line.difference(golden, self.server.ready_timeout_s)
            except InferenceServerException as error:
                if error.status() != "StatusCode.UNAVAILABLE" or _is_busy(error):
                    return True
                self.say(
                    "warning: the server does not take its own certificate as a client's, so no golden frames are "
                    f"asked for and its processes alone are watched ({error.message()})"
                )
                return False
        return True


def _fault(
    line: Line, ask: Callable[[float], str | None], last: str, timeout_s: float, asked: str
) -> str | None:
    """What is wrong with a category; a server that is busy with others' frames is well.

    Args:
        line: to the server.
        ask: for a frame that is known, in so many seconds.
        last: the model that the frame ends with, and others' frames too.
        timeout_s: for this frame, or any other.
        asked: what is asked, in words.
    """
    deadline = time.monotonic() + timeout_s
    try:
        before = line.answered(last)
    except ServerError as error:
        return f"{asked} is not answered: {error}"
    while True:
        try:
            return ask(max(deadline - time.monotonic(), ROOM_S))
        except InferenceServerException as error:
            if not _is_busy(error) and error.status() != "StatusCode.DEADLINE_EXCEEDED":
                return f"{asked} is not answered: {error.message()}"
        with suppress(ServerError):
            if line.answered(last) > before:
                return None
        if time.monotonic() >= deadline:
            return f"{asked} is not answered in {timeout_s:.3g} s, nor is any other frame"
        time.sleep(ROOM_S)


def _is_busy(error: InferenceServerException) -> bool:
    return any(text in error.message() for text in BUSY)
