"""One camera's line: takes frames as they become whole, judges each once, keeps what was found.

Order of one frame: its files are hashed, written to the ledger, moved to the station's folder, inspected, pictures
saved, verdict and deliveries written in one transaction. Killed anywhere, the next start goes on from the ledger.
"""

import random
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from m3ad.atomic import NO_ROOM, file_beside
from m3ad.bundle import sha256_of
from m3ad.errors import FrameError, M3adError
from m3ad.frames import Frame, read_frame
from m3ad.ledger import Ledger, Part
from m3ad.overlay import save_png
from m3ad_runtime.pipeline import Inspection

from m3ad_client.infer import AnyInspector, picture
from m3ad_client.station import config, sources
from m3ad_client.station.drift import Drift
from m3ad_client.station.faults import Faults
from m3ad_client.station.judge import Judge
from m3ad_client.station.seen import Seen, Steps

MOST_STARTS = 3  # a frame that was being judged when the process died so often is no frame to judge
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0


def back_off(failures: int) -> float:
    """Seconds to wait after so many failures in a row: doubled each time, with jitter of a half."""
    return float(min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** min(failures, 10)) * random.uniform(0.5, 1.0))


@dataclass
class Line:
    """One camera's line; `run` is its thread.

    Args:
        camera: its configuration.
        folder: the station's.
        ledger: where everything is written.
        sinks: the names of those who are told.
        faults: where faults are told.
        told: called when there is something for the sinks.
        stop: set when the station ends.
        seen: called with each part that is done.
        drift: looks at its frames.

    Attributes:
        beat: when it last began something, seconds that only grow.
    """

    camera: config.Camera
    folder: Path
    ledger: Ledger
    sinks: Sequence[str]
    faults: Faults
    told: Callable[[], None]
    stop: threading.Event
    seen: Callable[[Seen], None]
    drift: Drift
    inbox: sources.Inbox = field(init=False)
    judge: Judge = field(init=False)
    wake: threading.Event = field(default_factory=threading.Event)
    failures: int = 0
    again: int = 0
    beat: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.inbox, self.judge = sources.Inbox(self.camera), Judge(self.camera, self.faults.say)
        self.place = f"camera {self.camera.name}"

    def begin(self) -> None:
        """Count starts, so that a frame that kills the process does not do so for ever; remove what it left half."""
        for part in self.ledger.unfinished(self.camera.name):
            kept = self.folder / part.rgb
            sources.remove(*kept.parent.glob(f".{part.id:09}.*"))
        if self.camera.bundle is not None:
            self.ledger.begin(self.camera.name)

    def step(self) -> int:
        """Judge what is whole; the number of frames that were.

        Raises:
            M3adError, OSError: nothing can be judged at the moment; nothing is lost, and the next step tries again.
        """
        left = self.ledger.unfinished(self.camera.name)
        for part in left:
            self.finish(part, again=True)
        found = self.inbox.settled()
        for frame in found:
            if self.stop.is_set():
                break
            self.finish_or_drop(frame)
        return len(left) + len(found)

    def attempt(self) -> float:
        """One step, whatever happens; the seconds to wait before the next, 0 where frames were judged."""
        self.beat = time.monotonic()
        try:
            done = self.step()
        except (M3adError, OSError) as error:
            why = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
            self.faults.set(self.place, f"{why} (frames are kept and tried again)")
        except Exception as error:
            self.faults.set(self.place, f"{_bug(error)}; please report it (frames are kept and tried again)")
        else:
            self.failures = 0
            if self.inbox.complaint:
                self.faults.set(self.place, self.inbox.complaint)
            else:
                self.faults.clear(self.place)
            return 0.0 if done else self.pause_s()
        self.failures += 1
        return back_off(self.failures)

    def pause_s(self) -> float:
        """How long nothing needs to be looked at: half a settling time while files settle, else up to a second."""
        is_settling = self.inbox.waiting and not self.camera.done_marker
        return min(1.0, self.camera.settle_s / 2) if is_settling else 1.0

    def finish_or_drop(self, found: sources.Found) -> None:
        """Take a frame and judge it; a frame that the ledger has already is removed, its kept files stay."""
        files = (found.rgb, found.xyz)
        part = self.ledger.take(
            camera=self.camera.name,
            name=found.name,
            sources=files,
            hashes=(sha256_of(found.rgb), sha256_of(found.xyz)),
            size=sum(path.stat().st_size for path in files),
        )
        if part.state == "taken":
            return self.finish(part)
        for path, kept in zip(files, (part.rgb, part.xyz), strict=True):
            if part.pictures:  # a power cut can undo the move
                sources.move(path, self.folder / kept)
            sources.remove(path)
        self.inbox.unmark(found.rgb)
        self.again += 1
        return None

    def finish(self, part: Part, *, again: bool = False) -> None:
        """Judge a part that was taken, once; `again` where it was taken before and its files may be anything now."""
        self.beat = time.monotonic()
        for source, kept, digest in (
            (Path(part.rgb_from), self.folder / part.rgb, part.rgb_sha256),
            (Path(part.xyz_from), self.folder / part.xyz, part.xyz_sha256),
        ):
            if again and not kept.exists() and (not source.exists() or sha256_of(source) != digest):
                return self._failed(part, f"{source} was removed or replaced before it was judged")
            sources.move(source, kept)
        self.inbox.unmark(Path(part.rgb_from))
        if part.starts >= MOST_STARTS:
            why = (
                f"the station ended {part.starts} times while it judged this frame, so it is not tried again"
            )
            return self._failed(part, why)
        steps = Steps()
        frame: Frame | None = None
        with self.judge.open() as inspector:
            try:
                with steps("read"):
                    frame = self._read(part, inspector)
                with steps("inspect"):
                    found = inspector.inspect(frame, with_maps=self.judge.has_maps())
            except FrameError as error:
                self._failed(part, str(error))
                return None if frame is None else self._look(frame, None)
            except (M3adError, OSError):
                raise
            except Exception as error:  # a bug of ours must cost one part, not the line
                return self._failed(part, f"{_bug(error)}; please report it")
        inspect_ms = round(sum(steps.seconds.values()) * 1e3, 3)
        with steps("save"):
            saved = self._saved(part, frame, found, inspector)
        with steps("write"):
            self.ledger.judged(
                part.id,
                setup=self.ledger.setup_id(self.judge.record | self._drifted()),
                score=found.score,
                verdict=found.verdict,
                defects=[defect.to_json() for defect in found.defects or ()],
                inspect_ms=inspect_ms,
                sinks=self.sinks,
                **saved,
            )
        self.told()
        camera, limits = self.camera.name, inspector.limits
        self.seen(Seen(camera, found.verdict, found.score, limits, steps.seconds, found.stage_ms))
        return self._look(frame, found.score)

    def _drifted(self) -> dict[str, Any]:
        """The reasons that are told at the moment, for the ledger and the sinks."""
        return {"drift": sorted(self.drift.alarms)} if self.drift.alarms else {}

    def _look(self, frame: Frame, score: float | None) -> None:
        try:
            self.drift.add(frame, score)
        except Exception as error:  # a bug of ours must not hold verdicts up
            self.faults.set(f"drift {self.camera.name}", f"{_bug(error)}; please report it")

    def _read(self, part: Part, inspector: AnyInspector) -> Frame:
        depth = self.inbox.depth_camera() or inspector.preprocessing.camera
        return read_frame(self.folder / part.rgb, self.folder / part.xyz, part.name, depth)

    def _failed(self, part: Part, why: str) -> None:
        self.ledger.failed(part.id, why, self.sinks)
        self.told()
        self.seen(Seen(self.camera.name, "fault"))

    def _saved(self, part: Part, frame: Frame, found: Inspection, inspector: AnyInspector) -> dict[str, Any]:
        """Overlay and maps on disk, as the ledger writes them; a verdict is told also where the disk is full."""
        stem = part.rgb.partition(".rgb")[0]
        overlay, maps = f"{stem}.overlay.png", f"{stem}.maps.npz"
        arrays: dict[str, Any] = {"anomaly_map": found.anomaly_map}
        if found.score_maps is not None:
            names = np.array(inspector.record.score_maps)
            arrays |= {"score_maps": found.score_maps.astype(np.float16), "names": names}
        content = BytesIO()
        np.savez_compressed(content, **arrays)
        try:
            save_png(picture(inspector, frame, found), self.folder / overlay)
            with file_beside(self.folder / maps) as temporary:
                temporary.write_bytes(content.getbuffer())
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            return {"not_saved": f"{self.folder}: {error.strerror}"}
        size = sum((self.folder / name).stat().st_size for name in (overlay, maps))
        return {"overlay": overlay, "maps": maps, "extra_bytes": size}


def _bug(error: Exception) -> str:
    """An exception that nobody expected, with its place."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
