"""The pipeline in one process: frame -> preprocessing -> stages of a layout -> score, verdict and anomaly map.

The wiring is the contract's; the stages are whatever runtime hands in. Nothing here knows a server.
"""

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from m3ad.bundle import Bundle
from m3ad.contract import (
    DEFAULT_LAYOUT,
    PIPELINE_INPUTS,
    PIPELINE_OUTPUTS,
    Dims,
    Layout,
    Step,
    mismatch,
    pipeline_tensors,
    steps,
)
from m3ad.errors import FrameError
from m3ad.frames import Frame
from m3ad.manifest import Encoder
from m3ad.onnx_graph import Arrays
from m3ad.preprocess import ModelInput, Preprocessing, prepare
from m3ad.stages import Ops, StageFunction, cpu_stage
from m3ad.typed_json import parse_json, require_whole, typed

# Parameters of a served ensemble: the ServingRecord as JSON, and how it is served (runtime, precision, model_bytes).
RECORD_PARAMETER, SERVING_PARAMETER = "m3ad", "m3ad_serving"


@dataclass(frozen=True, slots=True)
class Inspection:
    """What an inspected part comes back as; `score_maps` [maps, 224, 224] only where they were asked for."""

    score: float
    is_anomalous: bool
    anomaly_map: npt.NDArray[np.float32]
    stage_ms: dict[str, float] = field(default_factory=dict)
    score_maps: npt.NDArray[np.float32] | None = None

    @classmethod
    def judged(
        cls,
        score: npt.NDArray[np.float32],
        threshold: float,
        anomaly_map: npt.NDArray[np.float32],
        stage_ms: dict[str, float],
        score_maps: npt.NDArray[np.float32] | None,
    ) -> "Inspection":
        """The inspection that a score [1] and the threshold make: above it a part is anomalous.

        Raises:
            FrameError: the score is not a number, so that there is no verdict.
        """
        value = float(score[0])
        if not (math.isfinite(value) and math.isfinite(threshold)):
            raise FrameError(
                f"there is no verdict: the score is {value} and the threshold {threshold}, expected finite numbers; "
                "check the networks with m3ad-export parity, or export the bundle again"
            )
        return cls(value, value > threshold, anomaly_map, stage_ms, score_maps)


@dataclass(frozen=True, slots=True)
class ServingRecord:
    """What a client must know of a bundle to prepare frames and give verdicts; it travels with every deployment."""

    contract_version: int
    category: str
    layout: Layout
    dims: Dims
    preprocessing: dict[str, Any]
    threshold: float
    weights: str
    score_maps: list[str]

    @classmethod
    def of(cls, bundle: Bundle, layout: Layout) -> "ServingRecord":
        """The record of a bundle served in this layout."""
        manifest = bundle.manifest
        return cls(
            contract_version=manifest.contract_version,
            category=manifest.category,
            layout=layout,
            dims=manifest.dims,
            preprocessing=manifest.preprocessing,
            threshold=manifest.threshold.value,
            weights=weights_line(manifest.encoders),
            score_maps=manifest.score_maps,
        )

    @classmethod
    def from_json(cls, text: str | bytes, source: str, advice: str) -> "ServingRecord":
        """Read a record back from an ensemble's parameter, every field checked.

        Raises:
            ArtifactError: it is not JSON, or a field is missing, of another type or out of range.
        """
        document = parse_json(text, source, advice)
        record = typed(document, cls, source, advice)
        require_whole(document["dims"], record.dims.to_json(), "$.dims", source, advice)
        return record


def weights_line(encoders: Mapping[str, Encoder]) -> str:
    """Which weights a result comes from, in one line, shown wherever a result is shown."""
    return "; ".join(
        f"{modality} {encoder.name} ({encoder.weights.kind} weights)"
        for modality, encoder in encoders.items()
    )


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
        values = {name: inputs[name] for name in PIPELINE_INPUTS}
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
    """An opened bundle that inspects frames in this process."""

    def __init__(
        self, bundle: Bundle, ops: Ops, layout: Layout = DEFAULT_LAYOUT, threads: int | None = None
    ) -> None:
        """Load every stage of the layout on the CPU; `threads` defaults to the cores this process may use."""
        self.record = ServingRecord.of(bundle, layout)
        self.preprocessing = Preprocessing.from_json(self.record.preprocessing)
        self.threads = threads or len(os.sched_getaffinity(0))
        self.precision = bundle.precision
        wiring = steps(bundle.dims, layout)
        names = dict.fromkeys(step.stage for step in wiring)
        self.folder = bundle.path / "onnx"
        functions = {n: cpu_stage(n, self.folder, bundle.dims, ops, self.threads) for n in names}
        self.pipeline = Pipeline(wiring, functions)
        self.tensors, _ = pipeline_tensors(bundle.dims)

    @classmethod
    def open(
        cls, path: Path, ops: Ops, layout: Layout = DEFAULT_LAYOUT, threads: int | None = None
    ) -> "Inspector":
        """Open and verify the bundle at `path` and load its stages."""
        return cls(Bundle.open(path), ops, layout, threads)

    def inspect(self, frame: Frame, *, with_maps: bool = False) -> Inspection:
        """Preprocess one frame and inspect it.

        Raises:
            FrameError: the frame cannot be inspected (no foreground, too few points).
        """
        return self.inspect_prepared(prepare(frame, self.preprocessing), with_maps=with_maps)

    def inspect_prepared(self, prepared: ModelInput, *, with_maps: bool = False) -> Inspection:
        """Inspect tensors that are preprocessed already (region A of the bench)."""
        arrays = model_arrays(prepared)
        if problem := mismatch(self.tensors, arrays):
            raise FrameError(f"{problem}; prepare frames with m3ad.preprocess.prepare")
        values, stage_ms = self.pipeline.run(arrays)
        maps = values["score_maps"] if with_maps else None
        return Inspection.judged(
            values["score"], self.record.threshold, values["anomaly_map"], stage_ms, maps
        )


def model_arrays(prepared: ModelInput) -> dict[str, npt.NDArray[Any]]:
    """The pipeline's inputs by the contract's names."""
    return prepared._asdict()
