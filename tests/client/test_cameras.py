"""`bench --cameras`: what it counts, and that it would notice a frame that is lost, out of order or wrong."""

import json
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from m3ad.bundle import Bundle
from m3ad.errors import BusyError, FrameError
from m3ad.frames import Frame
from m3ad_client.cameras import (
    CLOSED,
    OPEN,
    SINGLE,
    Loop,
    Service,
    Tally,
    closed_block,
    measure_cameras,
    open_block,
)
from m3ad_client.cameras_command import cameras_table, faults
from m3ad_client.cli import app
from m3ad_runtime.frame_queue import Answer, FrameQueue
from m3ad_runtime.pipeline import Inspection
from m3ad_triton.server import LocalServer
from numbered_frames import LONG_S, SlowInspector, scored, small_frame
from rich.console import Console
from typer.testing import CliRunner


class GatedQueue(FrameQueue):
    """Lets its slow inspector go on once `expected` frames of an open loop were sent to it."""

    def __init__(self, slow: SlowInspector, room: int, expected: int) -> None:
        self.slow, self.expected, self.sent = slow, expected, 0
        super().__init__([slow.inspect], room)

    def submit(self, frame: Frame) -> Future[Answer]:
        self.sent += 1
        try:
            return super().submit(frame)
        finally:
            if self.sent == 1:
                assert self.slow.begun.wait(LONG_S)
            if self.sent == self.expected:
                self.slow.go_on.set()


def service(queues: Sequence[Any], alone: Callable[[Frame], Inspection] = scored) -> Service:
    conditions = {
        **dict.fromkeys(("how", "hardware", "runtime", "device", "precision", "weights"), "x"),
        "threads": 1,
        "load_before": 0.0,
    }
    return Service(queues=queues, alone=alone, conditions=conditions)


def known(count: int) -> list[tuple[Frame, float]]:
    """Frames with their scores."""
    return [(small_frame(n), scored(small_frame(n)).score) for n in range(count)]


def test_what_comes_while_the_queue_is_full_is_counted_as_refused() -> None:
    slow = SlowInspector()
    with GatedQueue(slow, room=2, expected=7) as queue:
        (tally,), _ = open_block(service([queue]), known(3), 7, rate=1e4, block=0, lost_after_s=LONG_S)
    assert (tally.sent, tally.refused, len(tally.order)) == (7, 4, 3)  # one in work, two waiting
    assert slow.given == ["frame 0", "frame 1", "frame 2"]
    assert (tally.lost, tally.reordered, tally.wrong) == (0, 0, 0)
    assert (tally.order, tally.largest_difference) == ([0, 1, 2], 0.0)


class BadQueue:
    """A double of a queue that does what none may: it answers by `answer`, which gets every future so far."""

    room = 9

    def __init__(self, answer: Callable[[list[tuple[Frame, Future[Answer]]]], None]) -> None:
        self.answer, self.sent = answer, list[tuple[Frame, Future[Answer]]]()

    def submit(self, frame: Frame) -> Future[Answer]:
        self.sent.append((frame, Future()))
        self.answer(self.sent)
        return self.sent[-1][1]


def resolve(frame: Frame, future: Future[Answer]) -> None:
    future.set_result(Answer(scored(frame), 0.0))


def loses_the_second(sent: list[tuple[Frame, Future[Answer]]]) -> None:
    if len(sent) != 2:
        resolve(*sent[-1])


def gives_the_last_score(sent: list[tuple[Frame, Future[Answer]]]) -> None:
    resolve(sent[max(0, len(sent) - 2)][0], sent[-1][1])


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (loses_the_second, {"lost": 1, "reordered": 0, "wrong": 0}),
        (gives_the_last_score, {"lost": 0, "reordered": 0, "wrong": 3}),
    ],
)
def test_the_benchmark_notices_what_no_queue_may_do(answer: Any, found: dict[str, int]) -> None:
    given = service([BadQueue(answer)])
    (tally,), _ = open_block(given, known(4), 4, rate=1e4, block=0, lost_after_s=0.01)
    assert {name: getattr(tally, name) for name in found} == found


def test_the_benchmark_notices_answers_out_of_order() -> None:
    tally, queue = Tally(), BadQueue(lambda _: None)
    counted = [tally.send(queue, each, came=0.0) for each in known(4)]  # type: ignore[arg-type]
    for number in (1, 0, 3, 2):
        resolve(*queue.sent[number])
    assert all(each.wait(LONG_S) for each in counted)
    assert tally.order == [1, 0, 3, 2]
    assert (tally.lost, tally.reordered, tally.wrong) == (0, 2, 0)
    tally.count(3, 4.0, 4.0, 0.0)  # answered twice
    assert (tally.lost, tally.reordered) == (0, 3)


def test_a_frame_that_cannot_be_inspected_ends_the_measurement() -> None:
    def refuses(frame: Frame) -> Inspection:
        if frame.name == "frame 1" and threading.current_thread() is not threading.main_thread():
            raise FrameError("frame 1 is all background")
        return scored(frame)

    with (
        FrameQueue([refuses], room=4) as queue,
        pytest.raises(FrameError, match=r"^frame 1 is all background$"),
    ):
        measure_cameras(service([queue] * 2), [small_frame(n) for n in range(2)], 2, 0)


def test_a_server_that_is_busy_refuses_frames() -> None:
    def busy(frame: Frame) -> Inspection:
        raise BusyError("no room")

    with FrameQueue([busy], room=4) as queue:
        (tally,), _ = closed_block(service([queue]), known(2), 3, LONG_S)
    assert (tally.sent, tally.refused, tally.lost, tally.error) == (3, 3, 0, None)


def test_figures_of_the_loops() -> None:
    """Throughput and percentiles are those of the tallies, by NumPy's definition of nearest rank."""
    loop, rng = Loop(), np.random.default_rng(0)
    times = rng.uniform(1, 100, (2, 3, 4))  # blocks, cameras, frames
    for block in times:
        tallies = [
            Tally(sent=5, refused=1, order=[0, 1, 2, 3], latencies_ms=list(t), waits_ms=list(t / 2))
            for t in block
        ]
        loop.add(tallies, 2.0)
    everything, second = loop.row(CLOSED), loop.row(CLOSED, 1)
    assert loop.rates == [6.0, 6.0]
    assert (everything["camera"], everything["frames"], everything["frames_per_second"]) == (None, 24, 6.0)
    assert (second["camera"], second["frames"], second["frames_per_second"]) == (2, 8, 2.0)
    for row, values in ((everything, times), (second, times[:, 1])):
        for percent in (50, 99):
            want = np.percentile(values, percent, method="inverted_cdf")
            assert row[f"p{percent}_ms"] == pytest.approx(want, abs=1e-4)
            assert row[f"wait_p{percent}_ms"] == pytest.approx(want / 2, abs=1e-4)
    assert (everything["sent"], everything["refused"], everything["lost"], second["refused"]) == (30, 6, 0, 2)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def test_bench_of_cameras_in_process(tiny_bundle: Bundle, category: Path) -> None:
    loops = ("--cameras", 3, "--frames", 2, "--warmup", 1, "--threads", 1)
    done = run(category, "--bundle", tiny_bundle.path, *loops, "--rate", 50, "--room", 6, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["cameras"], told["blocks"], told["rate"], told["room"]) == (3, 2, 50, 6)
    assert told["distinct_frames"] == 2  # of the folder's five, as many as each camera sends
    assert [(row["loop"], row["camera"]) for row in told["rows"]] == [
        (SINGLE, None),
        *((loop, camera) for loop in (CLOSED, OPEN) for camera in (None, 1, 2, 3)),
    ]
    for row in told["rows"]:
        assert (row["lost"], row["reordered"], row["wrong"]) == (0, 0, 0)
        assert row["sent"] == row["frames"] + row["refused"]
        assert row["sent"] == 2 * (3 if row["camera"] is None and row["loop"] != SINGLE else 1)
        assert row["wait_p50_ms"] <= row["p50_ms"] <= row["p99_ms"]
    closed = {row["camera"]: row for row in told["rows"] if row["loop"] == CLOSED}
    assert closed[None]["refused"] == 0
    single = told["rows"][0]
    assert told["p99_over_cameras_times_p50"] == pytest.approx(
        closed[None]["p99_ms"] / (3 * single["p50_ms"]), rel=1e-3
    )
    assert told["throughput_over_one_stream"] > 0
    assert told["largest_score_difference"] < 1e-4
    assert told["server_queue_ms"] == {}
    assert told["conditions"]["layout"] == "fused"
    assert told["conditions"]["threads"] == 1


def cameras_result(**changed: Any) -> dict[str, Any]:
    """A result of a large line, as `measure_cameras` gives it."""
    figures = {f"{name}_ms": 123456.789 for name in ("p50", "p99", "wait_p50", "wait_p99")}
    counts = {"sent": 9999, "refused": 9999, "lost": 0, "reordered": 0, "wrong": 0, **changed}
    rows = [
        {"loop": loop, "camera": camera, "frames": 9999, "frames_per_second": 999.999, **figures, **counts}
        for loop, cameras in ((SINGLE, [None]), (CLOSED, [None, *range(1, 17)]), (OPEN, [None, 1]))
        for camera in cameras
    ]
    return {
        "cameras": 16,
        "blocks": 5,
        "rate": 2.5,
        "room": 32,
        "distinct_frames": 16,
        "rows": rows,
        "throughput_over_one_stream": 1.0321,
        "throughput_spread": {"low": 0.98, "q1": 1.0, "q3": 1.04, "high": 1.051},
        "p99_over_cameras_times_p50": 1.0849,
        "server_queue_ms": {CLOSED: 12.34, OPEN: 0.0},
        "largest_score_difference": 2e-7,
        "conditions": dict(service([]).conditions),
    }


def test_the_table_fits_100_columns_and_says_what_was_found() -> None:
    table = cameras_table(cameras_result())
    console = Console(width=100, markup=False, highlight=False)
    with console.capture() as captured:
        console.print(table.to_rich())
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= 100
    assert sum("999.999" in line and "123456.8" in line for line in lines) == 20  # no cell is folded
    text = " ".join(captured.get().split())
    assert "frames/s over one stream's: 1.03 (0.98 .. 1.05); p99 is 1.08 times 16 x one stream's p50" in text
    assert "2.5 a second and camera on average (Poisson, seed 0)" in text
    assert "closed: a frame waited 12.3 ms in queues of the server" in text
    assert "every frame taken was answered once, in its camera's order, with its score alone" in text
    assert "| closed | all | 9999 | 999.999 | 123456.8 |" in table.to_markdown()


def test_answers_that_are_not_what_they_must_be_are_told() -> None:
    bad = cameras_result(lost=1, wrong=2)
    assert faults(cameras_result()) == ""
    assert faults(bad) == (
        "3 frames were lost, 0 answers came out of order, 6 had another score than their frame alone"
    )
    assert faults(bad) in cameras_table(bad).notes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rate", "1"], "--rate and --room need --cameras"),
        (["--room", "4"], "--rate and --room need --cameras"),
        (["--cameras", "2", "--rate", "0"], "--rate 0 is no rate, expected frames a second, more than 0"),
        (["--cameras", "2", "--rate", "nan"], "--rate nan is no rate, expected frames a second, more than 0"),
        (
            ["--cameras", "4", "--room", "3"],
            "--room 3 is less than --cameras 4; in the closed loop a frame of each",
        ),
        (["--cameras", "2", "--table"], "--table measures bundles on the CPU, without .* --cameras"),
        (
            ["--cameras", "2", "--bundle", "a", "--bundle", "b"],
            "--cameras measures one bundle in one layout and runtime, or one server, and no --baseline",
        ),
        (["--cameras", "2", "--bundle", "a", "--url", "b"], "--cameras measures one bundle in one layout"),
        (
            ["--cameras", "2", "--bundle", "a", "--layout", "fused", "--layout", "chain"],
            "--cameras measures one bundle in one layout",
        ),
    ],
)
def test_options_that_make_no_sense(options: list[str], message: str, category: Path) -> None:
    done = run(category, *options)
    assert done.exit_code == 2
    assert re.search(message, " ".join(done.output.replace("│", " ").split()))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny", "other_tensors"])
def test_bench_of_cameras_at_a_server(server: LocalServer, category: Path, model: str) -> None:
    where = ("--url", server.grpc_url, "--model", model)
    done = run(category, *where, "--cameras", 2, "--frames", 2, "--warmup", 1, "--rate", 20, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["room"] == 2  # of each camera's own queue
    assert [(row["loop"], row["camera"]) for row in told["rows"]] == [
        (SINGLE, None),
        *((loop, camera) for loop in (CLOSED, OPEN) for camera in (None, 1, 2)),
    ]
    assert all((row["lost"], row["reordered"], row["wrong"]) == (0, 0, 0) for row in told["rows"])
    assert told["rows"][1]["frames"] == 4
    assert told["server_queue_ms"].keys() == {CLOSED, OPEN}
    assert min(told["server_queue_ms"].values()) >= 0
    assert told["conditions"]["how"] == f"Triton at {server.grpc_url}"
