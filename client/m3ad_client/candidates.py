"""What a benchmark holds side by side: runners in processes of their own, and pipelines served by Triton."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from m3ad.errors import MissingDependencyError, ServerError
from m3ad.frames import Sample, read_sample
from m3ad.preprocess import prepare
from m3ad_runtime.worker import END_TO_END, INFERENCE_ONLY

from m3ad_client.bench import StageTime, mean_stage_times, stage_times
from m3ad_client.memory import hardware, server_pid
from m3ad_client.triton import Door, TritonInspector

Map = npt.NDArray[np.float32]


@dataclass(slots=True)
class Measured:
    """What was read of one frame: its time, its foreground points, its stages' times."""

    ms: float
    points: int
    stage_ms: dict[str, float] = field(default_factory=dict)


class Candidate(Protocol):
    """One form of the pipeline under measurement.

    Attributes:
        name: in the tables.
        traits: what tells it apart from another of the same name, the most telling first.
    """

    name: str
    traits: tuple[str, ...]
    conditions: dict[str, Any]
    pid: int | None
    regions: tuple[str, ...]
    cold_start_ms: float | None
    device_bytes: int | None

    def measure(self, sample: Sample, region: str) -> Measured:
        """Run one frame, the clock around inference only or end to end."""

    def anomaly_map(self, sample: Sample, folder: Path) -> Map:
        """The map of one frame [224, 224]; `folder` is there to pass it through."""

    def start_stages(self) -> None:
        """Forget the stage times read so far."""

    def stages(self, frames: int) -> list[StageTime]:
        """Time per stage and frame since `start_stages`."""

    def close(self) -> None:
        """Close it."""


class WorkerProcess:
    """A `m3ad_runtime.worker` and the only way to talk to it.

    Args:
        name: in the tables.
        traits: what tells it apart from another of the same name.
        module: what python -m runs.
        arguments: of the module.
        regions: A, or A and B.

    Raises:
        ServerError: it could not load what it is to run.
    """

    def __init__(
        self,
        name: str,
        traits: tuple[str, ...],
        module: str,
        arguments: Sequence[str],
        regions: tuple[str, ...],
        threads: int,
    ) -> None:
        self.name, self.traits, self.regions = name, traits, regions
        self.cold_start_ms: float | None = None
        self.device_bytes: int | None = None
        self._readings: list[dict[str, float]] = []
        self._started = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # a resting worker's threads leave the cores to the one that is measured
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"},
        )
        self.pid: int | None = self._process.pid
        try:
            self.conditions: dict[str, Any] = {
                "how": "in process",
                "hardware": hardware(),
                **self._read()["ready"],
            }
        except BaseException:
            self.close()
            raise

    def measure(self, sample: Sample, region: str) -> Measured:
        """Run one frame; its own clock runs around the region only."""
        answer = self._ask(sample, region, None)
        if self.cold_start_ms is None:
            self.cold_start_ms = (time.perf_counter() - self._started) * 1e3
        self._readings.append(answer["stage_ms"])
        self.device_bytes = answer["device_bytes"]
        return Measured(answer["ms"], answer["points"], answer["stage_ms"])

    def anomaly_map(self, sample: Sample, folder: Path) -> Map:
        """The map of one frame [224, 224], saved by the worker."""
        path = folder / f"{self._process.pid}.npy"
        self._ask(sample, INFERENCE_ONLY, path)
        return np.asarray(np.load(path, allow_pickle=False), np.float32)

    def start_stages(self) -> None:
        """Forget the stage times read so far."""
        self._readings.clear()

    def stages(self, frames: int) -> list[StageTime]:
        """Time per stage and frame, as the runner read it."""
        return mean_stage_times(self._readings)

    def close(self) -> None:
        """End the process."""
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:
                continue
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, sample: Sample, region: str, map_path: Path | None) -> dict[str, Any]:
        request = {
            "region": region,
            "rgb": str(sample.rgb_path),
            "xyz": str(sample.xyz_path),
            "map": map_path and str(map_path),
        }
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise ServerError(f"{self.name}: its process ended with {self._process.wait()}") from error
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ServerError(
                f"{self.name}: its process ended with {self._process.wait()}; see above for why"
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ServerError(f"{self.name}: {answer['error']}")
        return answer


class Served:
    """A door of a category on a Triton server, asked over gRPC from this process.

    Through the door for frames there is no inference only: a frame goes in and a verdict comes out.
    """

    cold_start_ms: float | None = None  # the server was started by somebody else
    device_bytes: int | None = None

    def __init__(self, inspector: TritonInspector, door: Door) -> None:
        self.inspector, self.door = inspector, door
        by_frames = door == "frames"
        self.regions: tuple[str, ...] = (END_TO_END,) if by_frames else (INFERENCE_ONLY, END_TO_END)
        self.name = f"triton {inspector.record.layout}{', frames' if by_frames else ''}"
        self.traits: tuple[str, ...] = (inspector.url, inspector.doors[door])
        self.pid = server_pid(inspector.url)
        serving = inspector.serving
        self.conditions: dict[str, Any] = {
            "how": f"Triton at {inspector.url}",
            "hardware": hardware() if self.pid else f"server not seen; client: {hardware()}",
            "runtime": serving["runtime"],
            "device": "cpu" if serving["runtime"] == "onnxruntime" else "gpu",
            "precision": serving["precision"],
            "lattice": inspector.preprocessing.lattice,
            "refined": inspector.record.layout == "fused" and serving.get("refine") is not None,
            "layout": inspector.record.layout,
            "threads": len(os.sched_getaffinity(0)) if self.pid else None,
            "weights": inspector.record.weights,
            "parameter_bytes": serving["model_bytes"],
        }
        self._before = inspector.counters()

    def measure(self, sample: Sample, region: str) -> Measured:
        """Run one frame, the clock around inference only or end to end, which ends with a list of defects."""
        prepared = prepare(
            read_sample(sample, self.inspector.preprocessing.camera), self.inspector.preprocessing
        )
        started = time.perf_counter_ns()
        if region == INFERENCE_ONLY:
            self.inspector.inspect_prepared(prepared)
        elif self.door == "frames":
            self.inspector.inspect_frame(read_sample(sample, self.inspector.preprocessing.camera))
        else:
            self.inspector.inspect_by_tensors(read_sample(sample, self.inspector.preprocessing.camera))
        return Measured((time.perf_counter_ns() - started) / 1e6, len(prepared.points))

    def anomaly_map(self, sample: Sample, folder: Path) -> Map:
        """The map of one frame [224, 224]."""
        frame, by_frames = read_sample(sample, self.inspector.preprocessing.camera), self.door == "frames"
        inspect = self.inspector.inspect_frame if by_frames else self.inspector.inspect_by_tensors
        return inspect(frame).anomaly_map

    def start_stages(self) -> None:
        """Read the server's counters."""
        self._before = self.inspector.counters()

    def stages(self, frames: int) -> list[StageTime]:
        """Time per stage and frame, from Triton's statistics."""
        return stage_times(self._before, self.inspector.counters(), frames)

    def close(self) -> None:
        """Close the connection."""
        self.inspector.close()


class Candidates:
    """All of them, closed together; the first is the reference of every ratio."""

    def __init__(self) -> None:
        self.all: list[Candidate] = []

    def __enter__(self) -> "Candidates":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for candidate in self.all:
            candidate.close()

    def add_bundle(
        self, bundle: Path, layout: str, threads: int, runtime: str, name: str | None = None
    ) -> None:
        """The in-process runner of a bundle in one of its runtimes, called by its layout unless it is named."""
        arguments = (str(bundle), layout, str(threads), runtime)
        traits = ("in process", runtime, bundle.absolute().name, str(bundle.absolute()))
        self.all.append(
            WorkerProcess(
                name or layout, traits, "m3ad_client.runner", arguments, (INFERENCE_ONLY, END_TO_END), threads
            )
        )

    def add_server(self, inspector: TritonInspector) -> None:
        """A category on a server, through each of its doors."""
        self.all += [Served(inspector, door) for door in ("tensors", "frames") if door in inspector.doors]

    def add_baseline(self, form: str, detector: Path, threads: int, device: str) -> None:
        """A plain PyTorch form of a trained detector.

        Raises:
            MissingDependencyError: PyTorch is not installed here.
        """
        from importlib.util import find_spec

        if find_spec("torch") is None or find_spec("m3ad_export") is None:
            raise MissingDependencyError(
                f"baseline {form} runs in PyTorch, which is not installed here: pip install 'm3ad[export]'"
            )
        arguments = (form, str(detector), "--threads", str(threads), "--device", device)
        name = f"{form} on {device}" if device != "cpu" else form
        traits = ("PyTorch", detector.absolute().name, str(detector.absolute()))
        self.all.append(
            WorkerProcess(name, traits, "m3ad_export.baselines", arguments, (INFERENCE_ONLY,), threads)
        )


def distinct_names(candidates: Sequence[Candidate]) -> list[str]:
    """A name of its own for each one, in their order: its name, with the traits that tell it from its namesakes.

    Two that nothing tells apart are numbered: a form beside itself shows how far two measurements of one thing differ.
    """
    chosen: list[list[str]] = [[] for _ in candidates]

    def told(index: int) -> str:
        name = candidates[index].name
        return f"{name} ({', '.join(chosen[index])})" if chosen[index] else name

    for level in range(max((len(candidate.traits) for candidate in candidates), default=0)):
        namesakes: dict[str, list[int]] = {}
        for index, candidate in enumerate(candidates):
            if level < len(candidate.traits):
                namesakes.setdefault(told(index), []).append(index)
        for members in namesakes.values():
            traits = {index: candidates[index].traits[level] for index in members}
            if len({*traits.values()}) > 1:
                for index, trait in traits.items():
                    chosen[index].append(trait)
    names = [told(index) for index in range(len(candidates))]
    counts: dict[str, int] = {}
    numbered = []
    for name in names:
        counts[name] = counts.get(name, 0) + 1
        numbered.append(f"{name} #{counts[name]}" if names.count(name) > 1 else name)
    return numbered
