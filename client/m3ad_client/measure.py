"""Run a benchmark: candidates interleaved frame by frame, then memory, beside the paper's table."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from m3ad.bundle import Bundle
from m3ad.engines import Engines, engine_folders
from m3ad.frames import Sample
from m3ad_runtime.worker import END_TO_END, INFERENCE_ONLY

from m3ad_client.bench import OWN_ENCODER, latency, ratio
from m3ad_client.busy import busy_processes
from m3ad_client.candidates import Candidate, distinct_names
from m3ad_client.memory import PeakMemory, tree_rss
from m3ad_client.power import energy_of

GROWTH_FROM = 20  # arenas have settled by then
REGIONS = {INFERENCE_ONLY: "tensors ready -> map", END_TO_END: "files -> verdict"}


def run_bench(
    candidates: Sequence[Candidate],
    samples: Sequence[Sample],
    frames: int,
    warmup: int,
    say: Callable[[str], None] = lambda _: None,
    beside: int = 0,
) -> dict[str, Any]:
    """Measure candidates on the same frames in turn, one frame at a time.

    Frame 0 through every candidate, then frame 1 and so on: what else happens on the machine meets all alike, and a
    ratio is taken frame by frame. Memory is read in a pass of its own, because reading it takes time.

    Args:
        candidates: the first is the reference of the ratios.
        samples: where the frames lie; they are repeated as often as needed.
        frames: how many are measured in each region.
        warmup: how many go before, unmeasured; the first of them makes the cold start.
        say: is told what is being done.
        beside: processes that each keep a core busy while frames are measured.

    Returns:
        `rows` (one a candidate and region, each with its conditions), `ratios` and `ratio_spread` of inference only (of
        a server's door for frames: end to end, over its door for tensors), `stages`, `memory`, `energy`, `paper`; every
        candidate under a name of its own.
    """
    load = os.getloadavg()[0]
    reference = candidates[0]
    names = distinct_names(candidates)
    named = dict(zip(names, candidates, strict=True))
    times: dict[tuple[str, str], list[float]] = {}
    rgb_share: list[float] = []
    points: list[int] = []
    resident: dict[str, list[int]] = {name: [] for name in names}
    stages = []
    for region in REGIONS:
        taking_part = {name: c for name, c in named.items() if region in c.regions}
        say(f"{region}: {REGIONS[region]}, {', '.join(taking_part)} ...")
        cold = [candidate for candidate in taking_part.values() if candidate.regions[0] == region]
        for number in range(max(warmup, 1)):
            for candidate in cold:
                candidate.measure(samples[number % len(samples)], region)
        for candidate in taking_part.values():
            candidate.start_stages()
        with busy_processes(beside):
            for number in range(frames):
                sample = samples[number % len(samples)]
                for name, candidate in taking_part.items():
                    measured = candidate.measure(sample, region)
                    times.setdefault((name, region), []).append(measured.ms)
                    points.append(measured.points)
                    if (
                        candidate is reference
                        and region == INFERENCE_ONLY
                        and "rgb_extractor" in measured.stage_ms
                    ):
                        rgb_share.append(measured.ms / measured.stage_ms["rgb_extractor"])
                    if candidate.pid is not None:
                        resident[name].append(tree_rss(candidate.pid))
        if region == INFERENCE_ONLY:
            stages = [
                {"run": name, **s.to_json()} for name, c in taking_part.items() for s in c.stages(frames)
            ]
    say("maps and memory ...")
    errors, largest = map_errors(named, samples[0])
    memory = {name: _memory(c, samples, resident[name]) for name, c in named.items()}
    energy: dict[str, Any] = {}
    not_measured = None
    for name, candidate in named.items():
        measured_energy = energy_of(partial(candidate.measure, samples[0], candidate.regions[0]), frames)
        if isinstance(measured_energy, str):
            not_measured = measured_energy
            break
        energy[name] = asdict(measured_energy)
    ratios, spread = {}, {}
    for before, other in pairwise(names):
        # A server's door for frames stands behind its door for tensors, and has no inference only to compare.
        region = named[other].regions[0]
        than = names[0] if region == INFERENCE_ONLY else before
        name = f"{other}/{than}"
        ratios[name], spread[name] = ratio(times[other, region], times[than, region])
    if rgb_share:
        name = f"{names[0]}{OWN_ENCODER}"
        ratios[name], spread[name] = ratio(rgb_share, [1.0] * len(rgb_share))
    return {
        "rows": [
            {
                "name": name,
                "region": f"{region}: {REGIONS[region]}",
                **latency(times[name, region]).to_json(),
                **c.conditions,
                "cold_start_ms": c.cold_start_ms and round(c.cold_start_ms, 1),
                "map_max_error": errors[name],
                "map_largest": largest,
                "load_before": round(load, 1),
                "beside": beside,
                "warmup_frames": max(warmup, 1),
                "mean_points": round(sum(points) / len(points)),
            }
            for region in REGIONS
            for name, c in named.items()
            if region in c.regions
        ],
        "ratios": {name: round(value, 4) for name, value in ratios.items()},
        "ratio_spread": spread,
        "stages": stages,
        "memory": memory,
        "energy": energy,
        "energy_not_measured": not_measured,
        "paper": efficiency_table(),
    }


def map_errors(candidates: Mapping[str, Candidate], sample: Sample) -> tuple[dict[str, float | None], float]:
    """How far each one's anomaly map of a frame is from the reference's, and the reference's largest value.

    None stands for another method's map.
    """
    reference = next(iter(candidates.values())).conditions.get("method")

    def is_other(conditions: Mapping[str, Any]) -> bool:
        return conditions["layout"] == "cfm" or (
            None not in (reference, conditions.get("method")) and conditions["method"] != reference
        )

    with tempfile.TemporaryDirectory() as folder:
        maps = {name: c.anomaly_map(sample, Path(folder)) for name, c in candidates.items()}
    expected = next(iter(maps.values()))
    errors = {
        name: None if is_other(c.conditions) else float(np.abs(maps[name] - expected).max())
        for name, c in candidates.items()
    }
    return errors, float(np.abs(expected).max())


def artefacts(bundle: Bundle) -> dict[str, Any]:
    """What making the bundle took and what it weighs: seconds to export and build, bytes of models and engines."""
    entries = bundle.manifest.files.items()
    engines = {}
    for folder in engine_folders(bundle.path):
        found = Engines.open(folder, "Build engines again: m3ad-export build-engine")
        plans = found.manifest["files"].values()
        engines[found.target] = {
            "precision": found.precision,
            "build_s": round(sum(p["build_s"] for p in plans), 1),
            "bytes": sum(p["bytes"] for p in plans),
        }
    return {
        "export_s": bundle.manifest.export_s,
        "onnx_bytes": sum(e.bytes for name, e in entries if name.startswith("onnx/")),
        "engines": engines,
    }


def efficiency_table() -> dict[str, Any]:
    """The paper's efficiency table with what must be known to read it."""
    text = files("m3ad_client").joinpath("efficiency_table.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def _memory(candidate: Candidate, samples: Sequence[Sample], resident: Sequence[int]) -> dict[str, Any]:
    """Parameters, peak of the process or server tree, growth after the first frames, peak of the device."""
    found: dict[str, Any] = {
        "parameter_bytes": candidate.conditions["parameter_bytes"],
        "device_bytes": candidate.device_bytes,
        "peak": None,
    }
    if candidate.pid is not None:
        with PeakMemory([candidate.pid]) as peak:
            candidate.measure(
                samples[0], candidate.regions[0]
            )  # after the first frames the peak is the same in every one
        found["peak"] = asdict(peak.peaks[candidate.pid])
    if len(resident) > GROWTH_FROM:
        found["growth"] = {"frames": len(resident), "bytes": resident[-1] - resident[GROWTH_FROM - 1]}
    return found
