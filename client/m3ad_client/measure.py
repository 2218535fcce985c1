"""Run a benchmark: both regions, time per stage, memory, and the conditions that make the figures mean something."""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from m3ad.frames import Sample, read_sample
from m3ad.pipeline import Inspector
from m3ad.preprocess import prepare
from m3ad.stages import CPU_FILES

from m3ad_client.bench import latency, mean_stage_times, run_frames, stage_times
from m3ad_client.memory import PeakMemory, hardware, server_pid
from m3ad_client.triton import TritonInspector

MEMORY_FRAMES = 3  # the first ones reach the peak


def run_bench(
    inspector: Inspector | TritonInspector,
    samples: Sequence[Sample],
    frames: int,
    warmup: int,
    clock_ns: Callable[[], int] = time.perf_counter_ns,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure one inspector on frames taken in turn, one at a time.

    Memory is read in a pass of its own, because reading it takes time.

    Args:
        inspector: in process or on a server.
        samples: where the frames lie; they are repeated as often as needed.
        frames: how many are measured in each region.
        warmup: how many go before, unmeasured.
        clock_ns: the clock.
        say: is told what is being done.

    Returns:
        `rows` (one a region, each with its conditions), `stages`, `memory`, `paper`.
    """
    samples = samples[: max(frames, warmup)]
    load = os.getloadavg()[0]
    say("reading and preparing the frames ...")
    prepared = [prepare(read_sample(sample), inspector.preprocessing) for sample in samples]
    readings: list[dict[str, float]] = []

    def region_a(number: int) -> None:
        readings.append(inspector.inspect_prepared(prepared[number % len(prepared)]).stage_ms)

    def region_b(number: int) -> bool:
        return inspector.inspect(read_sample(samples[number % len(samples)])).is_anomalous

    say("region A: tensors ready -> anomaly map ...")
    run_frames(region_a, warmup, clock_ns)
    readings.clear()
    before = inspector.counters() if isinstance(inspector, TritonInspector) else {}
    a = latency(run_frames(region_a, frames, clock_ns))
    if isinstance(inspector, TritonInspector):
        stages = stage_times(before, inspector.counters(), frames)
    else:
        stages = mean_stage_times(readings)
    say("region B: files -> verdict ...")
    run_frames(region_b, min(warmup, len(samples)), clock_ns)
    b = latency(run_frames(region_b, frames, clock_ns))
    say("memory ...")
    memory = _memory(inspector, region_b)
    conditions = {
        **_conditions(inspector),
        "load_before": round(load, 1),
        "warmup_frames": warmup,
        "mean_points": round(sum(len(p.points) for p in prepared) / len(prepared)),
        "weights": inspector.record.weights,
    }
    return {
        "rows": [
            {"region": "A: tensors ready -> map", **a.to_json(), **conditions},
            {"region": "B: files -> verdict", **b.to_json(), **conditions},
        ],
        "stages": [stage.to_json() for stage in stages],
        "memory": memory,
        "paper": efficiency_table(),
    }


def efficiency_table() -> dict[str, Any]:
    """The paper's efficiency table with what must be known to read it."""
    text = files("m3ad_client").joinpath("efficiency_table.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def _memory(inspector: Inspector | TritonInspector, region_b: Callable[[int], object]) -> dict[str, Any]:
    pids = {"client": os.getpid()}
    if isinstance(inspector, TritonInspector) and (pid := server_pid(inspector.url)) is not None:
        pids["server"] = pid
    with PeakMemory(list(pids.values())) as peak:
        for number in range(MEMORY_FRAMES):
            region_b(number)
    found: dict[str, Any] = {name: asdict(peak.peaks[pid]) for name, pid in pids.items()}
    if isinstance(inspector, TritonInspector):
        return {"model_bytes": inspector.serving["model_bytes"], "server": None, **found}
    return {"model_bytes": _model_bytes(inspector), **found}


def _conditions(inspector: Inspector | TritonInspector) -> dict[str, Any]:
    if isinstance(inspector, TritonInspector):
        here = server_pid(inspector.url) is not None
        return {
            "how": f"Triton at {inspector.url}",
            "hardware": hardware() if here else f"server not seen; client: {hardware()}",
            "threads": len(os.sched_getaffinity(0)) if here else None,
            "runtime": inspector.serving["runtime"],
            "precision": inspector.serving["precision"],
            "layout": inspector.record.layout,
        }
    return {
        "how": "in process",
        "hardware": hardware(),
        "threads": inspector.threads,
        "runtime": "onnxruntime",
        "precision": "fp32",
        "layout": inspector.record.layout,
    }


def _model_bytes(inspector: Inspector) -> int:
    used = {step.stage for step in inspector.pipeline.wiring}
    return sum((inspector.folder / file).stat().st_size for stage in used for file in CPU_FILES[stage])
