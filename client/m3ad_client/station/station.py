"""The station: a thread a camera, a thread a sink, one ledger; it runs until it is told to end."""

import contextlib
import fcntl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from m3ad.errors import ArtifactError, M3adError
from m3ad.ledger import Ledger

from m3ad_client.station import config
from m3ad_client.station.deliver import Deliverer, open_sink
from m3ad_client.station.drift import Drift
from m3ad_client.station.faults import Faults
from m3ad_client.station.line import Line
from m3ad_client.station.needs import needed
from m3ad_client.station.retention import tidy
from m3ad_client.station.web import Web, open_metrics

LEDGER = "ledger.sqlite"
TIDY_S = 60.0
STUCK_S = 240.0  # in one frame: a server has a minute for each request


class Station:
    """An opened station.

    Args:
        settings: its configuration.
        say: where lines for the log go.

    Raises:
        ArtifactError: a folder is missing, a bundle cannot be used, or another station has this folder.
        MissingDependencyError: a package of the extra `station` is not installed.
    """

    def __init__(self, settings: config.Config, say: Callable[[str], None]) -> None:
        self.settings, self.faults, self.stop = settings, Faults(say), threading.Event()
        self.watchfiles = needed("watchfiles")
        self.folder = settings.store.folder
        for camera in settings.cameras:
            if not camera.folder.is_dir():
                raise ArtifactError(
                    f"camera {camera.name}: {camera.folder} is not a folder; make it, or name another"
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / "station.lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise ArtifactError(
                f"another station uses {self.folder}; end it, or give this one a folder of its own"
            ) from error
        self.ledger = Ledger(self.folder / LEDGER, create=True)
        names = [sink.name for sink in settings.sinks]
        self.deliverers = [
            Deliverer(sink.name, open_sink(sink, settings.store.name), self.ledger, self.faults, self.stop)
            for sink in settings.sinks
        ]
        metrics = open_metrics(settings, self.status)
        seen = metrics.seen if metrics else lambda _: None
        self.lines = [
            Line(
                camera,
                self.folder,
                self.ledger,
                names,
                self.faults,
                self.tell,
                self.stop,
                seen,
                Drift.of(camera, self.faults),
            )
            for camera in settings.cameras
        ]
        for line in self.lines:
            if line.camera.bundle is not None:
                with (
                    line.judge.open()
                ):  # a bundle that cannot be used ends the start, a server may come later
                    pass
            line.begin()
        self.threads: list[threading.Thread] = []
        self.web: Web | None = None
        if settings.page is not None:
            own = Ledger(self.folder / LEDGER)
            self.web = Web(settings, own, self.lines, self.status, self.stop, metrics)

    def is_alive(self) -> bool:
        """Whether every thread lives and none of the cameras' was lost in a frame: a process to start anew if not."""
        oldest = min(line.beat for line in self.lines)
        return all(thread.is_alive() for thread in self.threads) and time.monotonic() - oldest < STUCK_S

    def ended(self) -> list[str]:
        """The threads that ended although nobody told them to, by what they do; there should be none."""
        return [thread.name for thread in self.threads if not thread.is_alive() and not self.stop.is_set()]

    def tell(self) -> None:
        """Wake the sinks."""
        for deliverer in self.deliverers:
            deliverer.wake.set()

    def end(self) -> None:
        """Let every thread end after what it is doing."""
        self.stop.set()
        self.tell()
        for line in self.lines:
            line.wake.set()

    def once(self) -> None:
        """Judge what lies there now, deliver it, and end.

        Raises:
            M3adError, OSError: something cannot be judged or delivered now; nothing is lost.
        """
        for line in self.lines:
            line.step()
            while line.inbox.waiting and not line.camera.done_marker:
                self.stop.wait(line.pause_s())
                line.step()
        for deliverer in self.deliverers:
            while not deliverer.attempt():
                pass
        tidy(self.ledger, self.settings.store)
        for place, (why, _) in self.faults.now().items():
            raise ArtifactError(f"{place}: {why}")

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the threads while the block lasts."""
        threads = [
            threading.Thread(target=work, args=(line,), name=f"{does} {line.camera.name}")
            for does, work in (("camera", self._run), ("watching of camera", self._watch))
            for line in self.lines
        ]
        threads += [threading.Thread(target=d.run, name=f"sink {d.name}") for d in self.deliverers]
        threads.append(threading.Thread(target=self._tidy, name="retention"))
        self.threads = threads
        for thread in threads:
            thread.start()
        if self.web:
            self.web.start()
        try:
            yield
        finally:
            self.end()
            for thread in threads:
                thread.join()

    def close(self) -> None:
        """Close everything; the threads must have ended."""
        if self.web:
            self.web.end()
        for line in self.lines:
            line.judge.close()
        self.ledger.close()
        self._lock.close()

    def status(self) -> dict[str, Any]:
        """Faults, queues and what waits, for people and programs."""
        return {
            "faults": {
                place: {"why": why, "since": since} for place, (why, since) in self.faults.now().items()
            },
            "fault_count": self.faults.count,
            "queues": {name: {"waiting": w, "dead": d} for name, (w, d) in self.ledger.queues().items()},
            "cameras": {
                line.camera.name: {
                    "waiting": line.inbox.waiting,
                    "seen_again": line.again,
                    "drift": line.drift.shares,
                }
                for line in self.lines
            },
        }

    def _run(self, line: Line) -> None:
        """A camera's thread: one attempt after the other; a change in its folder ends the pause between them."""
        while not self.stop.is_set():
            line.wake.clear()
            if wait_s := line.attempt():
                (self.stop if line.failures else line.wake).wait(wait_s)

    def _watch(self, line: Line) -> None:
        """Wake a line when its folder changes; not every file system tells, so the line looks by itself, too."""
        while not self.stop.is_set():
            # The folder is gone, and the line says so; or inotify has no room, and the line looks by itself.
            with contextlib.suppress(OSError, RuntimeError):
                for _ in self.watchfiles.watch(
                    line.camera.folder,
                    watch_filter=None,
                    debounce=20,
                    step=5,
                    stop_event=self.stop,
                    rust_timeout=500,
                    raise_interrupt=False,
                ):
                    line.wake.set()
            self.stop.wait(1.0)

    def _tidy(self) -> None:
        while not self.stop.is_set():
            try:
                tidy(self.ledger, self.settings.store)
                self.faults.clear("retention")
            except (M3adError, OSError) as error:
                self.faults.set("retention", str(error))
            self.stop.wait(TIDY_S)
