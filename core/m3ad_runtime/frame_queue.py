"""Frames of several cameras at one inspector: oldest first, a bounded number of them waiting, their parts overlapping.

A frame is prepared on one core, its stages run on all, and it is judged on one. Each of these parts has a thread and
takes frames in the order they came: the next frame is prepared and the last one judged while a frame's stages run, no
frame overtakes another, and the stages keep all their threads.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from m3ad.errors import BusyError
from m3ad.frames import Frame
from m3ad.preprocess import ModelInput, prepare

from m3ad_runtime.pipeline import Inspection, Inspector

Part = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """A frame's inspection, and the milliseconds that it waited, before its first part and between parts."""

    inspection: Inspection
    waited_ms: float


@dataclass(slots=True)
class _Job:
    """A frame on its way: `value` is what the last part made of it, `error` why there is none."""

    value: Any
    future: Future[Answer] = field(default_factory=Future)
    came: float = field(default_factory=time.perf_counter)
    worked_s: float = 0.0
    error: Exception | None = None

    def answer(self) -> None:
        """Tell who waits for it."""
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            waited_s = time.perf_counter() - self.came - self.worked_s
            self.future.set_result(Answer(self.value, waited_s * 1e3))


def parts_of(inspector: Inspector) -> list[Part]:
    """`inspector.inspect` in three: prepare, run the stages, judge."""
    preprocessing, names = inspector.preprocessing, inspector.record.score_maps

    def prepared(frame: Frame) -> tuple[Frame, ModelInput]:
        return frame, prepare(frame, preprocessing)

    def run(given: tuple[Frame, ModelInput]) -> tuple[Frame, Inspection]:
        frame, tensors = given
        return frame, inspector.inspect_prepared(tensors, with_maps=True)

    def judged(given: tuple[Frame, Inspection]) -> Inspection:
        frame, found = given
        return found.with_defects(frame, names, preprocessing, inspector.limits, keep_maps=False)

    return [prepared, run, judged]


class FrameQueue:
    """Takes frames from any thread and answers them in the order they came; close it, or use it as a context manager.

    Args:
        parts: a frame's, each made from what the one before it returned; the last returns an `Inspection`.
        room: frames that may wait for their first part, at least 1.
    """

    def __init__(self, parts: Sequence[Part], room: int) -> None:
        if not parts or room < 1:
            raise ValueError(f"expected parts and room for at least 1 frame, got {len(parts)} and {room}")
        self.parts, self.room = parts, room
        self._lanes: list[deque[_Job | None]] = [deque() for _ in parts]
        self._changed = threading.Condition()
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._work, args=(index,), name=f"part {index}", daemon=True)
            for index in range(len(parts))
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, frame: Frame) -> Future[Answer]:
        """Let a frame wait for its turn; its answer, or why it has none, comes in the future.

        Whoever cancels the future while the frame waits gives it up; one that has begun is answered.

        Raises:
            BusyError: as many frames wait as there is room for.
            ValueError: the queue is closed.
        """
        job = _Job(frame)
        with self._changed:
            if self._is_closed:
                raise ValueError("the queue is closed and takes no frames; open another")
            if len(self._lanes[0]) >= self.room:
                raise BusyError(
                    f"{self.room} frames wait already, so there is no room for frame {frame.name}; send fewer frames "
                    "a second, or give the queue more room"
                )
            self._lanes[0].append(job)
            self._changed.notify_all()
        return job.future

    def close(self) -> None:
        """Answer the frames that wait, and end."""
        with self._changed:
            if not self._is_closed:
                self._is_closed = True
                self._lanes[0].append(None)
                self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> "FrameQueue":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _work(self, index: int) -> None:
        """A part's thread: one frame after the other until the mark that ends the lane."""
        lane, is_last = self._lanes[index], index + 1 == len(self.parts)
        following = deque[_Job | None]() if is_last else self._lanes[index + 1]
        while True:
            with self._changed:  # one frame is ready before each part, and the others wait in front
                self._changed.wait_for(lambda: lane and not following)
                job = lane.popleft()
                self._changed.notify_all()
            if job is not None:
                if index == 0 and not job.future.set_running_or_notify_cancel():
                    continue  # it was given up; an answer to it would end this thread
                self._run(job, self.parts[index])
            if not is_last:
                with self._changed:
                    following.append(job)
                    self._changed.notify_all()
            elif job is not None:
                job.answer()
            if job is None:
                return

    def _run(self, job: _Job, part: Part) -> None:
        """One part of a frame; a frame that failed keeps its place, so that answers stay in order."""
        if job.error is not None:
            return
        started = time.perf_counter()
        try:
            job.value = part(job.value)
        except Exception as error:  # a frame's failure is its answer, and the next frame is no worse for it
            job.error = error
        job.worked_s += time.perf_counter() - started
