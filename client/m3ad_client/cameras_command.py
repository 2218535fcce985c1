"""`m3ad-client bench --cameras K`: its options, what the cameras send to, its table."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import typer
from m3ad import cli as shared
from m3ad.errors import M3adError
from m3ad.frames import Frame, Sample, read_sample
from m3ad_runtime.frame_queue import FrameQueue, parts_of
from m3ad_runtime.pipeline import Inspector

from m3ad_client.busy import busy_processes
from m3ad_client.cameras import CLOSED, OPEN, SEED, Service, measure_cameras
from m3ad_client.candidates import Served
from m3ad_client.memory import hardware
from m3ad_client.options import print_tables
from m3ad_client.report import Table, setting
from m3ad_client.runner import conditions_of
from m3ad_client.triton import TritonInspector

MOST_FRAMES = 16  # different ones, kept in memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What the cameras do.

    Attributes:
        cameras: how many.
        frames: that each sends in each loop.
        warmup: frames before, unmeasured.
        rate: frames a second and camera in the open loop; None for no such loop.
        room: frames that may wait, of all cameras together.
        beside: processes that each keep a core busy meanwhile.

    Raises:
        BadParameter: the options do not go together.
    """

    cameras: int
    frames: int
    warmup: int
    rate: float | None
    room: int
    beside: int

    def __post_init__(self) -> None:
        if self.rate is not None and not (math.isfinite(self.rate) and self.rate > 0):
            raise typer.BadParameter(
                f"--rate {self.rate:g} is no rate, expected frames a second, more than 0"
            )
        if self.room < self.cameras:
            raise typer.BadParameter(
                f"--room {self.room} is less than --cameras {self.cameras}; in the closed loop a frame of each may wait"
            )


@contextmanager
def service_of(
    inspectors: Sequence[Inspector] | Sequence[TritonInspector], load: Load, frame: Frame
) -> Iterator[Service]:
    """All cameras' frames in one queue at the inspector of this process, or a queue and a connection for each camera.

    Args:
        inspectors: one of this process, or for each camera one of the same server; it has one frame at a time.
        load: how many frames may wait.
        frame: goes through the server's door that the others go through.
    """
    first = inspectors[0]
    with ExitStack() as stack:
        if isinstance(first, Inspector):
            queue = stack.enter_context(FrameQueue(parts_of(first), load.room))
            conditions = {"how": "in process", "hardware": hardware(), **conditions_of(first)}
            yield Service(queues=[queue] * load.cameras, alone=first.inspect, conditions=conditions)
            return
        door, room = first.door(frame), -(-load.room // load.cameras)

        def queued_ns() -> int:
            return sum(stage.queue_ns for stage in first.counters(door).values())

        yield Service(
            queues=[stack.enter_context(FrameQueue([each.inspect], room)) for each in inspectors],
            alone=first.inspect,
            conditions=Served(first, door).conditions,
            queued_ns=queued_ns,
        )


def bench_cameras(
    inspectors: Sequence[Inspector] | Sequence[TritonInspector],
    samples: Sequence[Sample],
    load: Load,
    as_json: bool,
    markdown: bool,
) -> None:
    """Measure, print, and say where an answer was not what it must be; inspectors as in `service_of`.

    Raises:
        M3adError: a frame was lost, overtaken by a later one, or answered with another's score.
    """
    before, camera = os.getloadavg()[0], inspectors[0].preprocessing.camera
    frames = [read_sample(sample, camera) for sample in samples[: min(load.frames, MOST_FRAMES)]]
    shared.talk.print(f"{load.cameras} cameras and one stream, in turn ...")
    with service_of(inspectors, load, frames[0]) as service, busy_processes(load.beside):
        result = measure_cameras(service, frames, load.frames, load.warmup, load.rate)
    result["conditions"] |= {"load_before": round(before, 1), "beside": load.beside}
    print_tables(result, [cameras_table(result)], as_json, markdown)
    if bad := faults(result):
        raise M3adError(f"{bad}; please report it with this command's --json")


def faults(result: Mapping[str, Any]) -> str:
    """How many answers were not what they must be, in words; empty where all were."""
    total = {
        name: sum(row[name] for row in result["rows"] if row["camera"] is None)
        for name in ("lost", "reordered", "wrong")
    }
    if not any(total.values()):
        return ""
    return (
        f"{total['lost']} frames were lost, {total['reordered']} answers came out of order, "
        f"{total['wrong']} had another score than their frame alone"
    )


def cameras_table(result: Mapping[str, Any]) -> Table:
    """One stream, then each loop in all and each camera."""
    keys = ("p50_ms", "p99_ms", "wait_p50_ms", "wait_p99_ms")
    rows = [
        [
            row["loop"] if row["camera"] is None else "",
            "all" if row["camera"] is None else str(row["camera"]),
            str(row["frames"]),
            f"{row['frames_per_second']:.3f}",
            *(f"{row[key]:.1f}" if key in row else "" for key in keys),
            str(row["refused"]),
        ]
        for row in result["rows"]
    ]
    return Table(
        f"{result['cameras']} cameras and one stream in turn, {result['blocks']} blocks each; frame -> verdict",
        ["loop", "camera", "frames", "frames/s", "p50 ms", "p99 ms", "wait p50", "wait p99", "refused"],
        rows,
        notes_of(result),
    )


def notes_of(result: Mapping[str, Any]) -> list[str]:
    """The ratios, what the loops are, what was found of the answers, and the conditions."""
    cameras, spread, conditions = result["cameras"], result["throughput_spread"], result["conditions"]
    asked = result["server_queue_ms"]
    notes = [
        f"{CLOSED}: each camera sends its next frame once the last is answered; frames/s over one stream's: "
        f"{result['throughput_over_one_stream']:.2f} ({spread['low']:.2f} .. {spread['high']:.2f}); p99 is "
        f"{result['p99_over_cameras_times_p50']:.2f} times {cameras} x one stream's p50"
    ]
    if result["rate"]:
        notes.append(
            f"{OPEN}: frames come by themselves, {result['rate']:g} a second and camera on average (Poisson, seed "
            f"{SEED}); latency counts from then"
        )
    queue = "each camera's queue" if asked else "the queue"
    notes += [
        "wait: of a frame's time, what none of its parts ran",
        f"{queue} holds {result['room']}, oldest first, and refuses a further one",
        *(f"{name}: a frame waited {ms:.1f} ms in queues of the server" for name, ms in asked.items()),
        faults(result)
        or "every frame taken was answered once, in its camera's order, with its score alone (differs by up to "
        f"{result['largest_score_difference']:.0e} of it; {result['distinct_frames']} different frames)",
        f"{setting(conditions)}; {conditions['weights']}",
    ]
    return notes
