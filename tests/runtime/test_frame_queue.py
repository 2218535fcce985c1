"""Frames of several cameras at one inspector: in order, none lost, a bounded queue."""

import threading

import numpy as np
import pytest
from m3ad.bundle import Bundle
from m3ad.errors import BusyError, FrameError
from m3ad.frames import Frame
from m3ad_runtime.frame_queue import FrameQueue, parts_of
from m3ad_runtime.pipeline import Inspector
from numbered_frames import LONG_S, SlowInspector, scored, small_frame
from serving import make_frame


def test_the_next_frame_is_prepared_while_the_stages_of_one_run() -> None:
    prepared: dict[str, threading.Event] = {f"frame {n}": threading.Event() for n in range(4)}

    def prepare(frame: Frame) -> Frame:
        prepared[frame.name].set()
        return frame

    def run(frame: Frame) -> Frame:
        following = prepared.get(f"frame {frame.rgb[0, 0, 0] + 1}")
        assert following is None or following.wait(LONG_S)  # a queue without overlap would wait for ever
        return frame

    with FrameQueue([prepare, run, scored], room=4) as queue:
        answers = [queue.submit(small_frame(n)) for n in range(4)]
        assert [a.result(LONG_S).inspection.score for a in answers] == [1, 2, 3, 4]


def test_oldest_first_and_a_full_queue_says_so() -> None:
    slow = SlowInspector()
    answered: list[int] = []
    with FrameQueue([slow.inspect], room=3) as queue:
        first = queue.submit(small_frame(0))
        assert slow.begun.wait(LONG_S)  # it waits no more, so three others can
        futures = [first, *(queue.submit(small_frame(n)) for n in (1, 2, 3))]
        for number, future in enumerate(futures):
            future.add_done_callback(lambda _, n=number: answered.append(n))
        for _ in range(2):
            with pytest.raises(
                BusyError, match=r"^3 frames wait already, so there is no room for frame frame 9; send fewer"
            ):
                queue.submit(small_frame(9))
        slow.go_on.set()
        found = [future.result(LONG_S) for future in futures]
    assert slow.given == ["frame 0", "frame 1", "frame 2", "frame 3"]
    assert answered == [0, 1, 2, 3]
    assert [answer.inspection.score for answer in found] == [1, 2, 3, 4]
    assert all(answer.waited_ms >= 0 for answer in found)
    assert found[3].waited_ms >= found[1].waited_ms  # it came later by less than the frame before it took


def test_a_frame_that_fails_keeps_its_place_and_the_next_is_answered() -> None:
    slow, order = SlowInspector(), []

    def prepare(frame: Frame) -> Frame:
        if frame.name == "frame 1":
            raise FrameError("frame 1 is all background")
        return frame

    with FrameQueue([prepare, slow.inspect], room=3) as queue:
        futures = [queue.submit(small_frame(n)) for n in range(3)]
        for number, future in enumerate(futures):
            future.add_done_callback(lambda _, n=number: order.append(n))
        assert slow.begun.wait(LONG_S)
        slow.go_on.set()
        with pytest.raises(FrameError, match="frame 1 is all background"):
            futures[1].result(LONG_S)
        assert futures[2].result(LONG_S).inspection.score == 3
    assert order == [0, 1, 2]


def test_what_waits_when_a_queue_is_closed_is_answered() -> None:
    slow = SlowInspector()
    queue = FrameQueue([lambda frame: frame, slow.inspect], room=5)
    futures = [queue.submit(small_frame(n)) for n in range(5)]
    slow.go_on.set()
    queue.close()
    assert [future.result(0).inspection.score for future in futures] == [1, 2, 3, 4, 5]
    queue.close()
    with pytest.raises(ValueError, match="closed and takes no frames"):
        queue.submit(small_frame(6))
    with pytest.raises(ValueError, match="room for at least 1 frame, got 1 and 0"):
        FrameQueue([scored], room=0)


def test_many_threads_get_their_own_frames_answers(tiny_bundle: Bundle) -> None:
    inspector = Inspector(tiny_bundle, "fused", threads=1)
    frames = [make_frame(seed) for seed in range(3)]
    want = [inspector.inspect(frame) for frame in frames]
    assert len({found.score for found in want}) == 3
    with FrameQueue(parts_of(inspector), room=9) as queue:
        futures = [queue.submit(frames[n % 3]) for n in range(9)]
        got = [future.result(LONG_S).inspection for future in futures]
    for number, found in enumerate(got):
        alone = want[number % 3]
        assert (found.score, found.verdict, found.defects) == (alone.score, alone.verdict, alone.defects)
        np.testing.assert_array_equal(found.anomaly_map, alone.anomaly_map)
        assert found.score_maps is None


def test_a_frame_that_was_given_up_is_not_run_and_holds_nobody_up() -> None:
    """An answer to it once ended the thread that gives answers, and with it every camera's."""
    slow = SlowInspector()
    with FrameQueue([slow.inspect, lambda found: found], room=3) as queue:
        begun = queue.submit(small_frame(0))
        assert slow.begun.wait(LONG_S)
        given_up, last = queue.submit(small_frame(1)), queue.submit(small_frame(2))
        assert given_up.cancel()
        assert not begun.cancel()  # its answer comes
        slow.go_on.set()
        assert [f.result(LONG_S).inspection.score for f in (begun, last)] == [1, 3]
    assert slow.given == ["frame 0", "frame 2"]
