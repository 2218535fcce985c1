"""A runner in a process of its own, asked over stdin and answering over stdout, one JSON document a line.

A benchmark holds several forms of one network side by side. Each in a process of its own has its own memory, and its
threads rest while another one is measured. What a form can do is known here, who asks is not.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from m3ad.errors import M3adError
from m3ad.frame_settings import Preprocessing
from m3ad.frames import Sample, read_sample
from m3ad.preprocess import ModelInput, prepare

# What the clock runs around: tensors ready -> map, as CFM timed, or files -> verdict, what a line feels.
INFERENCE_ONLY, END_TO_END = "inference only", "end to end"
MapAndTimes = tuple[npt.NDArray[np.float32], dict[str, float]]


@dataclass(frozen=True, slots=True)
class Runner:
    """What a worker runs.

    Attributes:
        run: tensors ready -> anomaly map [224, 224] and milliseconds per stage; inference only is this call.
        preprocessing: of the frames it is given as files.
        conditions: JSON-able; what a figure measured on it stands on.
        device_bytes: the peak of device memory so far, where there is a device.
    """

    run: Callable[[ModelInput], MapAndTimes]
    preprocessing: Preprocessing
    conditions: dict[str, Any]
    device_bytes: Callable[[], int] | None = field(default=None)


def serve(load: Callable[[], Runner]) -> None:
    """Answer requests until stdin ends.

    The first line told is `{"ready": conditions}` or `{"error": text}`. Requests name a frame by its two files:
    `{"region": INFERENCE_ONLY | END_TO_END, "rgb": path, "xyz": path, "map": path or null}` -> `{"ms", "stage_ms",
    "points", "device_bytes"}`. The map is saved after the clock stopped.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints is no answer
    try:
        runner = load()
    except M3adError as error:
        print(json.dumps({"error": str(error)}), file=answers)
        return
    print(json.dumps({"ready": runner.conditions}), file=answers)
    for line in sys.stdin:
        try:
            answer = _answer(runner, json.loads(line))
        except (M3adError, ValueError) as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), file=answers)


def _answer(runner: Runner, request: dict[str, Any]) -> dict[str, Any]:
    rgb, xyz = Path(request["rgb"]), Path(request["xyz"])
    sample = Sample(rgb, xyz, None, "", "", rgb.stem)
    prepared = (
        None
        if request["region"] == END_TO_END
        else prepare(read_sample(sample, runner.preprocessing.camera), runner.preprocessing)
    )
    started = time.perf_counter_ns()
    if prepared is None:
        prepared = prepare(read_sample(sample, runner.preprocessing.camera), runner.preprocessing)
    anomaly_map, stage_ms = runner.run(prepared)
    milliseconds = (time.perf_counter_ns() - started) / 1e6
    if request.get("map"):
        np.save(request["map"], anomaly_map, allow_pickle=False)
    device = runner.device_bytes() if runner.device_bytes else None
    return {
        "ms": milliseconds,
        "stage_ms": stage_ms,
        "points": len(prepared.points),
        "device_bytes": device,
    }
