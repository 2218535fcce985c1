"""A server that is watched and healed: its processes every second, and every category by its golden frame.

What is dead, stopped, hung or wrong is ended with the whole server, which is started again on the same ports and
models: Triton never replaces a stage process.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from m3ad.errors import ServerError
from m3ad.systemd import tell_systemd
from tritonclient.utils import InferenceServerException

from m3ad_triton.golden import Golden
from m3ad_triton.line import Line
from m3ad_triton.server import LocalServer

TRIES = 3  # starts for one fault, before it is left to whoever started us
FRAMES, SOONEST_S = 50, 2.0  # between two golden frames of a category
SLOWEST, PATIENT_S = 20, 5.0  # golden frames' time that one may take
BUSY = ("Exceeds maximum queue size", "Request timeout expired")  # a full queue is no fault


@dataclass(slots=True)
class Watch:
    """Watches a running server, and heals it.

    Attributes:
        server: that runs.
        say: takes a line for whoever looks on.
        period_s: between two golden frames of a category; of None, 50 times what one takes, at least 2 s.
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
    _takes: dict[str, float] = field(default_factory=dict)  # seconds of a category's golden frame
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
            usual = self._takes.get(category, 0.0)
            allowed = timeout_s or self.timeout_s or max(PATIENT_S, SLOWEST * usual)
            started = time.monotonic()
            with self.server.line() as line:
                problem = _fault(line, served.golden, served.last, allowed)
            took = time.monotonic() - started
            self._takes[category] = min(took, usual or took)
            period = self.period_s or max(SOONEST_S, FRAMES * self._takes[category])
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
                if error.status() != "StatusCode.UNAVAILABLE":
                    return True
                self.say(
                    "warning: the server does not take its own certificate as a client's, so no golden frames are "
                    f"asked for and its processes alone are watched ({error.message()})"
                )
                return False
        return True


def _fault(line: Line, golden: Golden, last: str, timeout_s: float) -> str | None:
    """What is wrong with a category; a server that is busy with others' frames is well."""
    try:
        before = line.answered(last)
        return line.difference(golden, timeout_s)
    except (InferenceServerException, ServerError) as error:
        status = error.status() if isinstance(error, InferenceServerException) else ""
        told = error.message() if isinstance(error, InferenceServerException) else str(error)
    if any(text in told for text in BUSY):
        return None
    if status != "StatusCode.DEADLINE_EXCEEDED":
        return f"its golden frame is not answered: {told}"
    try:
        if line.answered(last) > before:
            return None
    except ServerError:
        pass
    return f"its golden frame is not answered in {timeout_s:.3g} s, nor is any other"
