"""A bundle and a precision plan -> another bundle of the same layout whose graphs hold that precision."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from m3ad import bundle as artefact
from m3ad.bundle import Bundle
from m3ad.contract import Layout
from m3ad.errors import ArtifactError, M3adError
from m3ad.method import Contract
from m3ad.scored import on_lattice
from m3ad_export.graphs.plan import QUANTIZED, Plan
from m3ad_export.graphs.precision import half_model, histogram
from m3ad_export.graphs.stages import compose_stages
from m3ad_export.graphs.surgery import load_graph
from m3ad_runtime.onnx_graph import RUN_AS_WRITTEN
from m3ad_runtime.pipeline import Pipeline
from m3ad_runtime.stages import cpu_stage

from m3ad_calibrate import qdq
from m3ad_calibrate.emulate import runnable
from m3ad_calibrate.gate import onnx_digest
from m3ad_calibrate.modelopt import Engine, quantized_by_modelopt
from m3ad_calibrate.ranges import EightBits, Method, Observed, limit, observe
from m3ad_calibrate.record import Feeds
from m3ad_calibrate.smooth import smoothable, smoothed

Say = Callable[[str], None]
EIGHT_BITS = {"INT8", "FLOAT8E4M3FN", "INT8_WEIGHTS"}  # of `histogram`


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a plan is written: the method and the engine of calibration, and whether outliers are smoothed first."""

    method: Method = "max"
    engine: Engine = "onnxruntime"
    smoothquant: bool = False


class Graph:
    """One dense subgraph with what was observed of it, ready to be written by any plan that keeps at least `base`.

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
            activations = qdq.activations(self.model, self.stage, plan)
            limits = {name: limit(self.seen[name], self.settings.method, kind) for name in activations}
            model = qdq.quantized(self.model, self.stage, plan, limits)
        result = half_model(model, self.stage, plan)
        del result.metadata_props[:]  # the quantizers drop the graph's own and leave theirs
        result.metadata_props.MergeFrom(self.model.metadata_props)
        if qdq.has_convolutions(self.model, self.stage, plan):
            result.metadata_props.add(key=RUN_AS_WRITTEN, value="1")
        return result


def quantize(
    source: Bundle,
    out: Path,
    plan: Plan,
    feeds: dict[str, Feeds],
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
        settings: see Settings.
        origin: what the manifest says of the recorded inputs, None without them.
        layouts: which of the source's to write; all if empty.
        say: is told of each graph.

    Raises:
        M3adError: `out` is the source.
        ArtifactError: `out` is something else, the source is quantized, a graph does not hold the plan, or an eight-bit
            plan reaches no product.
    """
    if source.manifest.precision is not None:
        raise ArtifactError(f"{source.path} is quantized already; quantize the bundle it was made from")
    if out.resolve() == source.path.resolve():
        raise M3adError(f"{out} is the bundle to quantize; name another folder for the result")
    contract = source.contract
    layouts = list(layouts) or source.manifest.layouts
    if odd := [layout for layout in layouts if layout not in source.manifest.layouts]:
        raise ArtifactError(f"{source.path} has no layout {odd[0]}; export it with both: m3ad-export bundle")
    with artefact.new_folder(out, artefact.FORMAT) as folder:
        (folder / "onnx").mkdir()
        graphs = contract.method.graphs_of(layouts)
        copied = [f"{graph.name}.onnx" for graph in graphs if not graph.may_quantize]
        forms = [contract.method.cpu[stage] for stage in stages_of(contract, layouts)]
        copied += [
            file
            for form in forms
            if form.kind in ("pixel_layer", "halves", "nearest")
            for file in form.files[1:]
        ]
        for file in dict.fromkeys(copied):
            shutil.copyfile(source.file(f"onnx/{file}"), folder / "onnx" / file)
        histograms = {}
        for name in (graph.name for graph in graphs if graph.may_quantize):
            model = load_graph(source.file(f"onnx/{name}.onnx"))
            written = Graph(model, name, feeds.get(name, []), plan, settings).written(plan)
            histograms[name] = histogram(written)
            onnx.save(written, folder / "onnx" / f"{name}.onnx")
            say(f"{name}: {histograms[name]}")
        if plan.precision in QUANTIZED and not any(
            EIGHT_BITS & types.keys() for types in histograms.values()
        ):
            raise ArtifactError(qdq.nothing_for(plan, source.path))
        compose_stages(contract, layouts, folder / "onnx")
        write_golden(folder, source, contract, layouts, plan.half is not None)
        before, after = (
            sum(weight_bytes(contract, p, layouts).values()) for p in (source.path / "onnx", folder / "onnx")
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


def weight_bytes(contract: Contract, folder: Path, layouts: Sequence[Layout]) -> dict[str, int]:
    """Bytes of all initializers (scales and zero points are some) of each graph that the CPU runs for these layouts."""
    stages = stages_of(contract, layouts)
    files = (f for stage in stages for f in contract.method.cpu[stage].files if f.endswith(".onnx"))
    return {name: _initializer_bytes(load_graph(folder / name)) for name in dict.fromkeys(files)}


def stages_of(contract: Contract, layouts: Sequence[Layout]) -> list[str]:
    """The stages of some layouts, each once."""
    return list(dict.fromkeys(step.stage for layout in layouts for step in contract.steps(layout)))


def _initializer_bytes(model: onnx.ModelProto) -> int:
    return sum(onnx.numpy_helper.to_array(i).nbytes for i in model.graph.initializer)


def write_golden(
    folder: Path, source: Bundle, contract: Contract, layouts: Sequence[Layout], is_half: bool = False
) -> None:
    """Golden values of the written stages for the source's golden frame."""
    (folder / "golden").mkdir()
    values: dict[str, Any] = {}
    inputs = {n: np.load(source.file(f"golden/{n}.npy"), allow_pickle=False) for n in contract.method.inputs}
    if contract.lattice != "all":
        inputs["scored_pixel"] = on_lattice(inputs["scored_pixel"], contract.lattice)
    with runnable(folder / "onnx", contract.method, is_half) as graphs:
        for layout in layouts:
            wiring = contract.steps(layout)
            functions = {s.stage: cpu_stage(s.stage, graphs, contract, 2) for s in wiring}
            found, _ = Pipeline(wiring, functions).run(inputs, keep_all=True)
            values = {**found, **values}  # the chain's come first, as in the exporter
    for name, value in values.items():
        np.save(folder / "golden" / f"{name}.npy", value, allow_pickle=False)
