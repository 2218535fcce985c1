"""The pipeline in one process: frame -> preprocessing -> stages of a layout -> score, verdict and anomaly map.

The wiring is the contract's; the stages are whatever runtime hands in. Nothing here knows a server.
"""

import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from m3ad.bundle import Bundle
from m3ad.contract import Layout, Step, mismatch
from m3ad.defects import Defect
from m3ad.engines import engine_folders
from m3ad.errors import FrameError
from m3ad.frame_settings import Preprocessing
from m3ad.frames import Frame
from m3ad.judge import defects_of
from m3ad.limits import Limits, Verdict, verdict
from m3ad.method import PIPELINE_OUTPUTS
from m3ad.preprocess import ModelInput, prepare
from m3ad.serving import ServingRecord

from m3ad_runtime.engine_choice import RUNTIMES, Runtime
from m3ad_runtime.onnx_graph import Arrays, version
from m3ad_runtime.stages import StageFunction, cpu_stage
from m3ad_runtime.tensorrt_pipeline import TensorRtPipeline, engines_that_run, open_engines

Say = Callable[[str], None]
warn: Say = logging.getLogger("m3ad").warning


@dataclass(frozen=True, slots=True)
class Inspection:
    """What an inspected part comes back as.

    Attributes:
        score: of the part, whatever the limits.
        verdict: what the limits make of it; `is_anomalous` where it is `defect`.
        anomaly_map: [224, 224].
        stage_ms: milliseconds of each stage, in process.
        score_maps: [maps, 224, 224], only where they were asked for.
        defects: of a frame; None where only tensors were inspected.
    """

    score: float
    is_anomalous: bool
    verdict: Verdict
    anomaly_map: npt.NDArray[np.float32]
    stage_ms: dict[str, float] = field(default_factory=dict)
    score_maps: npt.NDArray[np.float32] | None = None
    defects: list[Defect] | None = None

    @classmethod
    def judged(
        cls,
        score: npt.NDArray[np.float32],
        limits: Limits,
        anomaly_map: npt.NDArray[np.float32],
        stage_ms: dict[str, float],
        score_maps: npt.NDArray[np.float32] | None,
    ) -> "Inspection":
        """The inspection that a score [1] and the limits make.

        Raises:
            FrameError: the score is not a number, so that there is no verdict.
        """
        value = float(score[0])
        found = verdict(value, limits)
        return cls(value, found == "defect", found, anomaly_map, stage_ms, score_maps)

    def with_defects(
        self,
        frame: Frame,
        names: Sequence[str],
        preprocessing: Preprocessing,
        limits: Limits,
        keep_maps: bool,
    ) -> "Inspection":
        """The same with the frame's defects; the score maps, which they need, are dropped unless they are kept."""
        assert self.score_maps is not None
        found = defects_of(
            self.anomaly_map, self.score, self.score_maps, names, frame.xyz, preprocessing, limits
        )
        return replace(self, defects=found, score_maps=self.score_maps if keep_maps else None)


class Pipeline:
    """The steps of a layout run one after the other; a value is dropped after its last use."""

    def __init__(self, wiring: tuple[Step, ...], functions: dict[str, StageFunction]) -> None:
        self.wiring, self.functions = wiring, functions
        last_use = {name: i for i, step in enumerate(wiring) for name in step.inputs.values()}
        self.dropped_after = [
            [n for n, last in last_use.items() if last == i and n not in PIPELINE_OUTPUTS]
            for i in range(len(wiring))
        ]

    def run(
        self, inputs: Arrays, *, keep_all: bool = False
    ) -> tuple[dict[str, npt.NDArray[Any]], dict[str, float]]:
        """Run every step; return the pipeline's outputs (or every value) and the milliseconds of each step."""
        values = dict(inputs)
        step_ms: dict[str, float] = {}
        for step, dropped in zip(self.wiring, self.dropped_after, strict=True):
            started = time.perf_counter()
            results = self.functions[step.stage]({name: values[v] for name, v in step.inputs.items()})
            values.update({value: results[name] for name, value in step.outputs.items()})
            label = step.stage if step.stage not in step_ms else f"{step.stage} again"
            step_ms[label] = (time.perf_counter() - started) * 1e3
            if not keep_all:
                for name in dropped:
                    del values[name]
        return values if keep_all else {name: values[name] for name in PIPELINE_OUTPUTS}, step_ms


class Inspector:
    """An opened bundle that inspects frames in this process; close it to give a GPU's memory back.

    Attributes:
        record: what a client must know of the bundle.
        limits: what scores are held against.
        precision: of what runs: of the engines, or of the bundle's graphs.
        runtime: what runs it, with its version.
        device: the GPU's name, or `cpu`.
        refined: whether a lattice's high places are scored in full, in a second pass.
        model_files: graphs and weights, or plans.
        device_bytes: of the GPU's memory, taken when it was opened; None on a CPU.
    """

    def __init__(
        self,
        bundle: Bundle,
        layout: Layout | None = None,
        threads: int | None = None,
        *,
        runtime: Runtime = "onnxruntime",
        say: Say = warn,
        is_verified: bool = True,
    ) -> None:
        """Load every stage of the layout.

        Args:
            bundle: verified.
            layout: the bundle's last if left out, which is the one to ship.
            threads: the cores this process may use if left out.
            runtime: `onnxruntime`, the CPU; `tensorrt` or `tensorrt_rtx`, engines on the first visible GPU; `auto`,
                engines if the bundle has some that run here, or else the CPU, and why is said.
            say: is told that, in one line.
            is_verified: if not, every file of the bundle is verified meanwhile, a stage's before they are loaded.

        Raises:
            ArtifactError: the bundle has no such layout, or no engines that run here; or a file was changed.
            MissingDependencyError: ONNX Runtime, TensorRT, pycuda or the plugin library is not installed.
            DeviceError: the GPU cannot be reached or has too little memory.
            ValueError: there is no such runtime.
        """
        if runtime not in RUNTIMES:
            raise ValueError(f"unknown runtime {runtime!r}, expected one of {', '.join(RUNTIMES)}")
        if not is_verified and engine_folders(bundle.path):
            bundle.verify()
            is_verified = True
        layout = bundle.layout(layout)
        self.record = ServingRecord.of(bundle, layout)
        self.preprocessing = Preprocessing.from_json(self.record.preprocessing)
        self.limits = self.record.limits
        self.threads = threads or len(os.sched_getaffinity(0))
        self.tensors = bundle.contract.inputs
        engines: TensorRtPipeline | None = None
        if runtime == "auto":
            engines = engines_that_run(bundle, layout, self.threads, say)
        elif runtime != "onnxruntime":
            engines = open_engines(bundle, layout, runtime, self.threads)
        self.pipeline: Pipeline | TensorRtPipeline = engines or self._on_cpu(bundle, layout, is_verified)
        if engines is not None:
            self.precision, self.runtime = engines.chosen.engines.precision, engines.runtime
            self.refined = False
            self.device, self.model_files = engines.gpu.name, engines.chosen.plans()
            self.device_bytes: int | None = engines.device_bytes

    def _on_cpu(self, bundle: Bundle, layout: Layout, is_verified: bool) -> Pipeline:
        contract, folder = bundle.contract, bundle.path / "onnx"
        wiring = contract.steps(layout)
        names = dict.fromkeys(step.stage for step in wiring)
        files = {n: [f"onnx/{file}" for file in contract.method.cpu[n].files] for n in names}

        def loaded(name: str) -> StageFunction:
            if not is_verified:
                bundle.verify(files[name])
            return cpu_stage(name, folder, contract, self.threads, bundle.refine)

        with ThreadPoolExecutor(self.threads, "load") as pool:
            loading = pool.map(loaded, names)
            if not is_verified:
                read = {file for each in files.values() for file in each}
                bundle.verify(file for file in bundle.manifest.files if file not in read)
            functions = dict(zip(names, loading, strict=True))
        self.precision, self.runtime, self.device = bundle.precision, f"ONNX Runtime {version()}", "cpu"
        self.model_files = [bundle.path / file for each in files.values() for file in each]
        self.device_bytes = None
        self.refined = bundle.refine is not None and layout == "fused"
        return Pipeline(wiring, functions)

    @classmethod
    def open(
        cls,
        path: Path,
        layout: Layout | None = None,
        threads: int | None = None,
        *,
        runtime: Runtime = "auto",
        say: Say = warn,
    ) -> "Inspector":
        """Open the bundle at `path` and load its stages, on a GPU if it has engines that run here.

        A bundle without engines is verified while its stages are loaded.

        Raises:
            ArtifactError: it is no bundle, a file of it was changed, or see `Inspector`.
        """
        return cls(Bundle.read(path), layout, threads, runtime=runtime, say=say, is_verified=False)

    def close(self) -> None:
        """Give the memory back; on a CPU there is nothing to do."""
        if isinstance(self.pipeline, TensorRtPipeline):
            self.pipeline.close()

    def __enter__(self) -> "Inspector":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def inspect(self, frame: Frame, *, with_maps: bool = False) -> Inspection:
        """Preprocess one frame and inspect it.

        Raises:
            FrameError: the frame cannot be inspected (no foreground, too few points).
        """
        found = self.inspect_prepared(prepare(frame, self.preprocessing), with_maps=True)
        return found.with_defects(frame, self.record.score_maps, self.preprocessing, self.limits, with_maps)

    def inspect_prepared(self, prepared: ModelInput, *, with_maps: bool = False) -> Inspection:
        """Inspect tensors that are preprocessed already (what the bench calls inference only)."""
        arrays = model_arrays(prepared)
        if problem := mismatch(self.tensors, arrays):
            raise FrameError(f"{problem}; prepare frames with m3ad.preprocess.prepare")
        values, stage_ms = self.pipeline.run(arrays)
        maps = values["score_maps"] if with_maps else None
        return Inspection.judged(values["score"], self.limits, values["anomaly_map"], stage_ms, maps)


def model_arrays(prepared: ModelInput) -> dict[str, npt.NDArray[Any]]:
    """What a frame was prepared to, by the contract's names; a method takes the ones it declares."""
    return {name: array for name, array in prepared._asdict().items() if array is not None}
