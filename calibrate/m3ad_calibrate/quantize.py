"""A bundle and a precision plan -> another bundle of the same layout whose graphs hold that precision."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from m3ad import bundle as artefact
from m3ad.bundle import Bundle
from m3ad.contract import PIPELINE_INPUTS, Layout, stages, steps
from m3ad.errors import ArtifactError, M3adError
from m3ad.pipeline import Pipeline
from m3ad.stages import CPU_FILES, Ops, cpu_stage
from m3ad_export.graphs.export import ENCODER_GRAPH, verify_interface, verify_not_frozen, write_xyz_extractor
from m3ad_export.graphs.head import HEAD_PARTS, head_model, read_parts
from m3ad_export.graphs.plan import Plan
from m3ad_export.graphs.precision import half_model, histogram

from m3ad_calibrate import qdq
from m3ad_calibrate.emulate import runnable
from m3ad_calibrate.gate import onnx_digest
from m3ad_calibrate.modelopt import Engine, quantized_by_modelopt
from m3ad_calibrate.ranges import EightBits, Method, Observed, limit, observe
from m3ad_calibrate.record import Feeds
from m3ad_calibrate.smooth import smoothable, smoothed

# The plugin-free graphs of a bundle by layout: a plan is written into the first, the others are copied.
COPIED: dict[str, tuple[str, ...]] = {"both": (), "chain": ("project",), "fused": ("head_scores",)}
GRAPHS: dict[str, tuple[str, ...]] = {
    "both": ("rgb_extractor", "xyz_encoder"),
    "chain": ("mfm", "mgm", "vm"),
    "fused": tuple(part for part in HEAD_PARTS if part not in COPIED["fused"]),
}
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a plan is written: the method and the engine of calibration, and whether outliers are smoothed first."""

    method: Method = "max"
    engine: Engine = "onnxruntime"
    smoothquant: bool = False


class Graph:
    """One plugin-free graph with what was observed of it, ready to be written by any plan that keeps at least `base`.

    Args:
        model: fp32, weights inside.
        stage: its name in plans.
        runs: recorded inputs; not needed by a half plan.
        base: the plan whose products are prepared.
        settings: see Settings.
    """

    def __init__(
        self, model: onnx.ModelProto, stage: str, runs: Feeds, base: Plan, settings: Settings
    ) -> None:
        self.stage, self.runs, self.settings = stage, runs, settings
        self.eight_bits = base.precision in ("int8", "fp8")
        self.model = qdq.prepared(model, stage, base) if self.eight_bits else model
        self.seen: dict[str, Observed] = {}
        if self.eight_bits and settings.engine == "onnxruntime":
            if settings.smoothquant and (norms := smoothable(self.model)):
                self.model = smoothed(self.model, observe(self.model, runs, norms))
            self.seen = observe(self.model, runs, qdq.activations(self.model, stage, base))

    def written(self, plan: Plan) -> onnx.ModelProto:
        """The graph in this plan's precision."""
        if not self.eight_bits:
            return half_model(self.model, self.stage, plan)
        if self.settings.engine == "modelopt":
            model = quantized_by_modelopt(self.model, self.stage, plan, self.runs, self.settings.method)
        else:
            kind: EightBits = "fp8" if plan.precision == "fp8" else "int8"
            wanted = qdq.activations(self.model, self.stage, plan)
            limits = {name: limit(self.seen[name], self.settings.method, kind) for name in wanted}
            model = qdq.quantized(self.model, self.stage, plan, limits)
        result = half_model(model, self.stage, plan)
        del result.metadata_props[:]  # the quantizers drop the graph's own and leave theirs
        result.metadata_props.MergeFrom(self.model.metadata_props)
        return result


def graphs_of(layouts: Sequence[Layout], table: Mapping[str, tuple[str, ...]] = GRAPHS) -> list[str]:
    """The graphs of some layouts."""
    return [name for key in ("both", *layouts) for name in table[key]]


def quantize(
    source: Bundle,
    out: Path,
    plan: Plan,
    feeds: dict[str, Feeds],
    ops: Ops,
    settings: Settings,
    origin: dict[str, Any] | None,
    layouts: Sequence[Layout] = (),
    say: Say = lambda _: None,
) -> Bundle:
    """Write a bundle in which the plan's precision lies in the ONNX files; it is not usable before its gate.

    Args:
        source: not quantized itself.
        out: the folder to write; an older bundle there is replaced.
        plan: the precision plan.
        feeds: recorded inputs by graph; a half plan needs none.
        ops: the custom ops, for the golden values.
        settings: see Settings.
        origin: what the manifest says of the recorded inputs, None without them.
        layouts: which of the source's to write; all if empty.
        say: is told of each graph.

    Raises:
        M3adError: `out` is the source.
        ArtifactError: `out` is something else, the source is quantized, or a graph does not hold the plan.
    """
    if source.manifest.precision is not None:
        raise ArtifactError(f"{source.path} is quantized already; quantize the bundle it was made from")
    if out.resolve() == source.path.resolve():
        raise M3adError(f"{out} is the bundle to quantize; name another folder for the result")
    layouts = list(layouts) or source.manifest.layouts
    if odd := [layout for layout in layouts if layout not in source.manifest.layouts]:
        raise ArtifactError(f"{source.path} has no layout {odd[0]}; export it with both: m3ad-export bundle")
    with artefact.new_folder(out, artefact.FORMAT) as folder:
        (folder / "onnx").mkdir()
        for name in graphs_of(layouts, COPIED):
            shutil.copyfile(source.file(f"onnx/{name}.onnx"), folder / "onnx" / f"{name}.onnx")
        histograms = {}
        for name in graphs_of(layouts):
            model = onnx.load(source.file(f"onnx/{name}.onnx"))
            written = Graph(model, name, feeds.get(name, []), plan, settings).written(plan)
            histograms[name] = histogram(written)
            onnx.save(written, folder / "onnx" / f"{name}.onnx")
            say(f"{name}: {histograms[name]}")
        compose(folder / "onnx", source, layouts)
        _write_golden(folder, source, layouts, ops, plan.half is not None)
        before, after = (
            sum(weight_bytes(p, layouts).values()) for p in (source.path / "onnx", folder / "onnx")
        )
        manifest = {
            **{k: v for k, v in source.document.items() if k not in ("parity", "files", "gate")},
            "layouts": layouts,
            "precision": {
                "type": plan.precision,
                "half": plan.half,
                "method": settings.method,
                "engine": settings.engine,
                "smoothquant": settings.smoothquant,
                "versions": {n: version(n) for n in ("onnx", "onnxruntime")},
                "source_onnx": onnx_digest(source),
                "source_manifest_sha256": artefact.sha256_of(source.path / artefact.MANIFEST),
                "calibration": origin,
                "products": histograms,
                "weight_bytes": {"source": before, "quantized": after, "ratio": round(after / before, 4)},
                "plan": plan.to_json(),
            },
            "files": artefact.file_entries(folder),
        }
        artefact.write_json(folder / artefact.MANIFEST, manifest)
    return Bundle.open(out)


def compose(folder: Path, source: Bundle, layouts: Sequence[Layout]) -> None:
    """Write the graphs that hold custom ops from the quantized parts in `folder`, as the exporter composes them.

    Raises:
        ArtifactError: a graph does not have the contract's tensors, or does not depend on its inputs.
    """
    dims = source.dims
    write_xyz_extractor(onnx.load(folder / ENCODER_GRAPH), dims, folder)
    composed = ["xyz_extractor"]
    if "fused" in layouts:
        onnx.save(head_model(dims, read_parts(folder)), folder / "head.onnx")
        composed.append("head")
    for name in composed:
        verify_not_frozen(folder / f"{name}.onnx")
    for name, stage in stages(dims).items():
        if (folder / f"{name}.onnx").exists():
            verify_interface(folder / f"{name}.onnx", stage)


def weight_bytes(folder: Path, layouts: Sequence[Layout]) -> dict[str, int]:
    """Bytes of all initializers (scales and zero points are some) of each graph that the CPU runs for these layouts."""
    names = dict.fromkeys(
        f for layout in layouts for step in steps_of(layout) for f in CPU_FILES[step] if f.endswith(".onnx")
    )
    return {name: _initializer_bytes(onnx.load(folder / name)) for name in names}


def steps_of(layout: Layout) -> tuple[str, ...]:
    """The stages of a layout."""
    return ("rgb_extractor", "xyz_extractor", *(("head",) if layout == "fused" else ("mfm", "mgm", "vm")))


def _initializer_bytes(model: onnx.ModelProto) -> int:
    return sum(onnx.numpy_helper.to_array(i).nbytes for i in model.graph.initializer)


def _write_golden(folder: Path, source: Bundle, layouts: Sequence[Layout], ops: Ops, is_half: bool) -> None:
    """Golden values of the quantized stages for the source's golden frame."""
    (folder / "golden").mkdir()
    dims = source.dims
    values: dict[str, Any] = {}
    inputs = {n: np.load(source.file(f"golden/{n}.npy"), allow_pickle=False) for n in PIPELINE_INPUTS}
    with runnable(folder / "onnx", is_half) as graphs:
        for layout in layouts:
            wiring = steps(dims, layout)
            functions = {s.stage: cpu_stage(s.stage, graphs, dims, ops, 2) for s in wiring}
            found, _ = Pipeline(wiring, functions).run(inputs, keep_all=True)
            values = {**found, **values}  # the chain's come first, as in the exporter
    for name, value in values.items():
        np.save(folder / "golden" / f"{name}.npy", value, allow_pickle=False)
