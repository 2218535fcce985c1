"""Several cameras at one bundle or server: what each of them gets, and whether every answer is its own frame's.

One stream and K streams are measured in turn, block by block, so that what else the machine does meets both alike.
"""

import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from m3ad.errors import BusyError
from m3ad.frames import Frame
from m3ad_runtime.frame_queue import Answer, FrameQueue
from m3ad_runtime.pipeline import Inspection

from m3ad_client.bench import latency, percentile, ratio

ROUNDS = 5
SINGLE, CLOSED, OPEN = "one stream", "closed", "open"
LOST_AFTER_S = 300.0
SAME_SCORE = 1e-4  # of the score: what threads and servers round differently is less, another frame's is more
SEED = 0
Known = tuple[Frame, float]  # a frame and its score alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """What the cameras send frames to.

    Attributes:
        queues: where each camera's frames go; several may have the same.
        alone: inspects one frame while nothing else is asked.
        conditions: JSON-able; what a figure measured on it stands on.
        queued_ns: what frames have waited in a server's own queues so far, all together; None in process.
    """

    queues: Sequence[FrameQueue]
    alone: Callable[[Frame], Inspection]
    conditions: Mapping[str, Any]
    queued_ns: Callable[[], int] | None = None


@dataclass(slots=True)
class Tally:
    """One camera's frames in one block, counted as their answers come.

    Attributes:
        order: the numbers of the frames that were answered, in the order of the answers.
        wrong: answers whose score is not that of the frame alone.
        largest_difference: between those two, in parts of the score.
        error: why a frame has no answer.
    """

    sent: int = 0
    refused: int = 0
    wrong: int = 0
    largest_difference: float = 0.0
    order: list[int] = field(default_factory=list)
    latencies_ms: list[float] = field(default_factory=list)
    waits_ms: list[float] = field(default_factory=list)
    error: BaseException | None = None

    def send(self, queue: FrameQueue, known: Known, came: float) -> threading.Event:
        """Send a frame that was there at `came` (`time.perf_counter`); the event is set once it is counted."""
        number, self.sent = self.sent, self.sent + 1
        counted = threading.Event()
        try:
            future = queue.submit(known[0])
        except BusyError:
            self.refused += 1
            counted.set()
        else:
            future.add_done_callback(partial(self._answered, number, known[1], came, counted))
        return counted

    def _answered(
        self, number: int, score: float, came: float, counted: threading.Event, future: Future[Answer]
    ) -> None:
        error = future.exception()
        if error is None:
            answer = future.result()
            self.count(number, answer.inspection.score, score, came, answer.waited_ms)
        elif isinstance(error, BusyError):  # a server's own queue is full
            self.refused += 1
        else:
            self.error = self.error or error
        counted.set()

    def count(self, number: int, found: float, score: float, came: float, waited_ms: float = 0.0) -> None:
        """Count the answer to frame `number`, whose score alone is `score`."""
        self.latencies_ms.append((time.perf_counter() - came) * 1e3)
        self.waits_ms.append(waited_ms)
        self.order.append(number)
        difference = abs(found - score) / (abs(score) or 1.0)
        self.largest_difference = max(self.largest_difference, difference)
        self.wrong += difference > SAME_SCORE

    @property
    def lost(self) -> int:
        """Frames that were neither answered nor refused."""
        return self.sent - self.refused - len(set(self.order))

    @property
    def reordered(self) -> int:
        """Answers that came after a later frame's, or a second time."""
        latest = [-1, *itertools.accumulate(self.order, max)]
        return sum(number <= before for number, before in zip(self.order, latest, strict=False))


@dataclass(slots=True)
class Loop:
    """What was read of one loop: of each block the cameras' tallies and the seconds, and the server's queueing."""

    blocks: list[list[Tally]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    queued_ns: int = 0

    def add(self, tallies: list[Tally], seconds: float) -> None:
        """A block that ended.

        Raises:
            M3adError: a frame could not be inspected, or the server does not answer.
        """
        for tally in tallies:
            if tally.error is not None:
                raise tally.error
        self.blocks.append(tallies)
        self.seconds.append(seconds)

    @property
    def tallies(self) -> list[Tally]:
        """Of every block and camera."""
        return [tally for block in self.blocks for tally in block]

    @property
    def latencies_ms(self) -> list[float]:
        """Of every answer."""
        return [value for tally in self.tallies for value in tally.latencies_ms]

    @property
    def rates(self) -> list[float]:
        """Answers a second of each block."""
        answers = (sum(len(tally.order) for tally in block) for block in self.blocks)
        return [count / seconds for count, seconds in zip(answers, self.seconds, strict=True)]

    def row(self, loop: str, camera: int | None = None) -> dict[str, Any]:
        """The figures of one camera, or of all."""
        tallies = self.tallies if camera is None else [block[camera] for block in self.blocks]
        times = [value for tally in tallies for value in tally.latencies_ms]
        waits = [value for tally in tallies for value in tally.waits_ms]
        figures: dict[str, Any] = {"frames": len(times)}
        if times:
            figures = latency(times).to_json()
            figures |= {f"wait_p{p}_ms": round(percentile(waits, p), 4) for p in (50, 99)}
        figures["frames_per_second"] = round(len(times) / sum(self.seconds), 4)
        counts = ("sent", "refused", "lost", "reordered", "wrong")
        return {
            "loop": loop,
            "camera": None if camera is None else camera + 1,
            **figures,
            **{name: sum(getattr(tally, name) for tally in tallies) for name in counts},
        }


def measure_cameras(
    service: Service,
    frames: Sequence[Frame],
    count: int,
    warmup: int,
    rate: float | None = None,
    lost_after_s: float = LOST_AFTER_S,
) -> dict[str, Any]:
    """Measure one stream, then all cameras in a closed loop, then in an open one, and so on in turn.

    Args:
        service: what they send to.
        frames: different ones, sent again and again; each camera begins at another.
        count: of frames, for each camera and loop.
        warmup: of frames before, unmeasured.
        rate: of the open loop, frames a second and camera; None leaves it out.
        lost_after_s: a frame that has no answer by then is lost.

    Returns:
        `rows` (each loop in all, then each camera), the closed loop's `throughput_over_one_stream` (median, spread) and
        `p99_over_cameras_times_p50`, and what was found of the answers.

    Raises:
        FrameError: a frame cannot be inspected.
        ServerError: the server does not answer.
    """
    cameras = len(service.queues)
    known = [(frame, service.alone(frame).score) for frame in frames]
    closed_block(service, known, -(-warmup // cameras), lost_after_s)
    loops = {SINGLE: Loop(), CLOSED: Loop(), **({OPEN: Loop()} if rate else {})}
    start = 0
    for block, part in enumerate(np.array_split(range(count), min(ROUNDS, count))):
        given = [known[(start + i) % len(known)] for i in range(len(part))]
        start += len(part)
        loops[SINGLE].add(*single_block(service, given))
        for name in (CLOSED, OPEN) if rate else (CLOSED,):
            before = service.queued_ns() if service.queued_ns else 0
            if name == CLOSED:
                found = closed_block(service, given, len(part), lost_after_s)
            else:
                found = open_block(service, given, len(part), float(rate or 0), block, lost_after_s)
            loops[name].add(*found)
            loops[name].queued_ns += service.queued_ns() - before if service.queued_ns else 0
    over, spread = ratio(loops[CLOSED].rates, loops[SINGLE].rates)
    slowest = percentile(loops[CLOSED].latencies_ms, 99)
    usual = percentile(loops[SINGLE].latencies_ms, 50)
    tallies = [tally for loop in loops.values() for tally in loop.tallies]
    return {
        "cameras": cameras,
        "blocks": len(loops[SINGLE].blocks),
        "rate": rate,
        "room": service.queues[0].room,
        "distinct_frames": len({score for _, score in known}),
        "rows": [
            row
            for name, loop in loops.items()
            for row in (
                loop.row(name),
                *(loop.row(name, camera) for camera in range(cameras) if name != SINGLE),
            )
        ],
        "throughput_over_one_stream": round(over, 4),
        "throughput_spread": spread,
        "p99_over_cameras_times_p50": round(slowest / (cameras * usual), 4),
        "server_queue_ms": {
            name: round(loop.queued_ns / 1e6 / max(len(loop.latencies_ms), 1), 4)
            for name, loop in loops.items()
            if name != SINGLE and service.queued_ns
        },
        "largest_score_difference": max(tally.largest_difference for tally in tallies),
        "conditions": dict(service.conditions),
    }


def single_block(service: Service, given: Sequence[Known]) -> tuple[list[Tally], float]:
    """One frame after the other, with no queue; returns the tally and the seconds."""
    tally, started = Tally(), time.perf_counter()
    for number, (frame, score) in enumerate(given):
        came = time.perf_counter()
        tally.sent += 1
        tally.count(number, service.alone(frame).score, score, came)
    return [tally], time.perf_counter() - started


def closed_block(
    service: Service, given: Sequence[Known], count: int, lost_after_s: float
) -> tuple[list[Tally], float]:
    """Each camera sends its next frame once the last was answered; it ends where one is lost or failed."""
    tallies = [Tally() for _ in service.queues]

    def camera(k: int) -> None:
        for number in range(count):
            came = time.perf_counter()
            counted = tallies[k].send(service.queues[k], given[(k + number) % len(given)], came)
            if not counted.wait(lost_after_s) or tallies[k].error:
                return

    return tallies, _together(camera, len(tallies))


def open_block(
    service: Service, given: Sequence[Known], count: int, rate: float, block: int, lost_after_s: float
) -> tuple[list[Tally], float]:
    """Frames come by themselves, by a Poisson process of `rate` a second for each camera, whatever was answered."""
    tallies = [Tally() for _ in service.queues]

    def camera(k: int) -> None:
        gaps = np.random.default_rng((SEED, block, k)).exponential(1 / rate, count)
        due = time.perf_counter() + np.cumsum(gaps)
        counted = []
        for number, came in enumerate(due.tolist()):
            time.sleep(max(0.0, came - time.perf_counter()))
            counted.append(tallies[k].send(service.queues[k], given[(k + number) % len(given)], came))
        deadline = time.perf_counter() + lost_after_s
        for each in counted:
            each.wait(max(0.0, deadline - time.perf_counter()))

    return tallies, _together(camera, len(tallies))


def _together(camera: Callable[[int], None], count: int) -> float:
    """Run the cameras side by side; the seconds until the last has ended."""
    started = time.perf_counter()
    with ThreadPoolExecutor(count, "camera") as pool:
        list(pool.map(camera, range(count)))
    return time.perf_counter() - started
