"""What is wrong at the moment, by its place: shown to people, said once when it comes and once when it goes."""

import threading
import time
from collections.abc import Callable


class Faults:
    """Faults by place (`camera left`, `sink plant`).

    Args:
        say: where a line for the log goes; it raises nothing, as whoever tells a fault must go on.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self._lock = say, threading.Lock()
        self._now: dict[str, tuple[str, float]] = {}
        self.count = 0

    def set(self, place: str, why: str) -> None:
        """Tell a fault."""
        with self._lock:
            known = self._now.get(place)
            if known and known[0] == why:
                return
            self._now[place] = (why, time.time())
            self.count += 1
        self.say(f"{place}: {why}")

    def clear(self, place: str) -> None:
        """Tell that it is over, if there was one."""
        with self._lock:
            known = self._now.pop(place, None)
        if known:
            self.say(f"{place}: well again")

    def now(self) -> dict[str, tuple[str, float]]:
        """Place -> what is wrong, and since when (seconds since 1970)."""
        with self._lock:
            return dict(self._now)
