"""A bundle's ONNX stages -> engines, by TensorRT-RTX ahead of time or by full TensorRT where it is installed.

One code path: strongly typed networks, the precision already in the ONNX file, the custom ops as plugins. Without the
plugin library TensorRT-RTX gets their function bodies instead, loops among them. The files of a quantized bundle are
built as they are, once its gate has passed. A plan is built again only when something that makes it has changed.
"""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner
from m3ad.bundle import Bundle, file_entry, new_folder, sha256_of, write_json
from m3ad.contract import OP_DOMAIN, Layout
from m3ad.engines import FORMAT, Engines, Precision
from m3ad.errors import ArtifactError, M3adError, MissingDependencyError
from m3ad.method import Contract
from m3ad.methods.common import HEAD_PARTS
from m3ad_plugins.library import library_path
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from m3ad_export.engine_builder import BuiltEngine, Say, build_plan, builder_module, compute_capability
from m3ad_export.engine_types import verify_precision, verify_target
from m3ad_export.graphs.head import TILED_PARTS, head_model, with_tile
from m3ad_export.graphs.plan import default_plan
from m3ad_export.graphs.precision import half_model, histogram
from m3ad_export.graphs.surgery import load_graph


def build_engines(
    bundle: Bundle,
    target: str,
    precision: Precision | None = None,
    layouts: Sequence[Layout] = ("chain",),
    say: Say = lambda _: None,
    *,
    plugins: bool | None = None,
) -> Path:
    """Build every stage of the layouts and write them to the bundle as engines/<target>/.

    Args:
        bundle: a verified bundle.
        target: `sm86`.. for TensorRT-RTX ahead of time, `native` for full TensorRT and the GPU of this machine.
        precision: of the matrix products, fp16 if None; norms, cosines and voting stay fp32. A quantized bundle
            holds its precision already and takes None only.
        layouts: whose stages to build.
        say: is told of every stage as it is built, and every five seconds that a builder works.
        plugins: whether TensorRT-RTX gets the custom ops as plugins; left out, where the plugin library is built.
            Full TensorRT always does.

    Returns:
        The folder written.

    Raises:
        M3adError: the target is unknown or lacks the bundle's type.
        MissingDependencyError: the builder is not installed, or the plugin library is asked for and not built.
        ArtifactError: a stage does not parse, does not build, or has another precision than asked for; or the bundle
            is quantized and its gate has not passed.
    """
    written = bundle.manifest.precision
    if written:
        bundle.verify_usable()
        if precision is not None:
            raise M3adError(
                f"{bundle.path} is quantized to {written.type} already; leave --precision out, or build its source"
            )
        verify_target(target, written.type)
    chosen = None if written else precision or "fp16"
    trt, runtime = builder_module(target)
    names = dict.fromkeys(step.stage for layout in layouts for step in bundle.contract.steps(layout))
    library = _plugin_library(runtime, plugins)
    if (
        library is None
        and plugins is None
        and any(bundle.contract.method.cpu[n].kind in ("grouped", "patches") for n in names)
    ):
        say(
            "no plugin library is built here, so sampling and grouping are loops in these engines: m3ad-plugins build"
        )
    facts = {
        "runtime": runtime,
        "runtime_version": trt.__version__,
        "compute_capability": compute_capability(target),
        "precision": written.type if written else chosen,
        "plugin_library": sha256_of(library) if library else None,
    }
    target_folder = bundle.path / "engines" / target
    earlier = _earlier_plans(target_folder, facts)
    with new_folder(target_folder, FORMAT) as folder:
        entries: dict[str, Any] = {}
        for stage in (part for name in names for part in engine_stages(name, runtime)):
            model = stage_model(
                bundle.path / "onnx", stage, bundle.contract, chosen, with_plugins=library is not None
            )
            serialized = model.SerializeToString()
            onnx_sha256 = hashlib.sha256(serialized).hexdigest()
            path = folder / f"{stage}.plan"
            if (known := earlier.get((path.name, onnx_sha256))) is not None:
                shutil.copy2(target_folder / path.name, path)
                entries[path.name] = known
                say(f"{stage}: up to date")
                continue
            needed = library if _has_ops(model) else None
            cache = target_folder.with_name(f"{target}.timing_cache") if target == "native" else None
            built = build_plan(trt, serialized, stage, target, needed, cache, say)
            verify_precision(stage, histogram(model), built.precision_histogram)
            path.write_bytes(built.plan)
            entries[path.name] = {
                **file_entry(path),
                "onnx_sha256": onnx_sha256,
                "source_files": {source.name: sha256_of(source) for source in source_files(bundle, stage)},
                "inputs": [v.name for v in model.graph.input],
                "precision_histogram": built.precision_histogram,
                "inspected": built.inspected,
                "plugin_layers": built.plugin_layers,
                "loops": built.loops,
                "build_s": round(built.seconds, 2),
            }
            say(_summary(stage, built))
        manifest = {
            "format": FORMAT,
            "target": target,
            **facts,
            "accepted_loss": (bundle.document.get("gate") or {}).get("accepted"),
            "layouts": list(layouts),
            "files": entries,
        }
        write_json(folder / "manifest.json", manifest)
    return target_folder


def _plugin_library(runtime: str, wanted: bool | None) -> Path | None:
    if wanted is False and runtime == "tensorrt_rtx":
        return None
    try:
        return library_path()
    except MissingDependencyError:
        if wanted or runtime == "tensorrt":
            raise
        return None


def _earlier_plans(folder: Path, facts: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """What is recorded of the plans in a folder, by file name and model, if all else that makes a plan is the same."""
    if not folder.is_dir():
        return {}
    try:
        manifest = Engines.open(folder, "build the engines again").manifest
    except ArtifactError:  # whether such a folder may be replaced is told where it is
        return {}
    if any(manifest.get(name) != value for name, value in facts.items()):
        return {}
    return {
        (name, entry["onnx_sha256"]): entry
        for name, entry in manifest["files"].items()
        if (folder / name).is_file() and sha256_of(folder / name) == entry["sha256"]
    }


def _has_ops(model: onnx.ModelProto) -> bool:
    return any(node.domain == OP_DOMAIN for node in model.graph.node)


def _summary(stage: str, built: BuiltEngine) -> str:
    made_of = [f"plugins {', '.join(built.plugin_layers)}"] if built.plugin_layers else []
    made_of += [f"{built.loops} loops"] if built.loops else []
    figures = f"{len(built.plan) / 1e6:.1f} MB in {built.seconds:.1f} s, {built.precision_histogram}"
    return ", ".join([f"{stage}: {figures}", *made_of])


def engine_stages(stage: str, runtime: str) -> tuple[str, ...]:
    """The ONNX files whose engines make up a stage.

    TensorRT-RTX 1.7 fails on the head's loop over tiles; it gets the parts, rows interpolated between.
    """
    return HEAD_PARTS if stage == "head" and runtime == "tensorrt_rtx" else (stage,)


def source_files(bundle: Bundle, stage: str) -> list[Path]:
    """The files that an engine of `stage` is made of: graphs, and the weights that lie beside them.

    Raises:
        ArtifactError: the bundle has no such file.
    """
    names = []
    for part in HEAD_PARTS if stage == "head" else (stage,):
        graph = bundle.file(f"onnx/{part}.onnx")
        weights = onnx.load(graph, load_external_data=False).graph.initializer
        outside = [ExternalDataInfo(w).location for w in weights if uses_external_data(w)]
        names += [graph.name, *dict.fromkeys(outside)]
    return [bundle.file(f"onnx/{name}") for name in names]


def stage_model(
    folder: Path, stage: str, contract: Contract, precision: Precision | None, *, with_plugins: bool
) -> onnx.ModelProto:
    """The ONNX model an engine is built from: precision written in, custom ops as plugins or as function bodies.

    None takes the precision of the files as it is.
    """

    def part(name: str) -> onnx.ModelProto:
        model = load_graph(folder / f"{name}.onnx")
        if name in TILED_PARTS:
            model = with_tile(model)
        return half_model(model, name, default_plan(precision)) if precision in ("fp16", "bf16") else model

    # The head's precision is written into its parts: a loop's body is no place for it afterwards.
    model = (
        head_model(contract, {name: part(name) for name in HEAD_PARTS}) if stage == "head" else part(stage)
    )
    if with_plugins:
        # Up to 10.6 the parser takes a function body before a plugin of the same name: none is left to take.
        del model.functions[:]
        return model
    return onnx.inliner.inline_local_functions(model)


def accepted(bundle: Bundle, who_and_why: str) -> Bundle:
    """Record in a bundle of another precision or lattice who builds it although its gate did not pass, and why.

    Args:
        bundle: its gate failed or is missing.
        who_and_why: `NAME: REASON`.

    Raises:
        M3adError: one of the two is missing, or there is no loss to accept.
    """
    name, _, reason = (part.strip() for part in who_and_why.partition(":"))
    if not name or not reason:
        raise M3adError(f"--accept-loss needs a name and a reason, 'NAME: REASON', got {who_and_why!r}")
    gate = bundle.document.get("gate") or {"passed": False, "figures": None}
    if (bundle.manifest.precision or bundle.manifest.lattice) is None or gate["passed"]:
        raise M3adError(f"{bundle.path} has no loss to accept: it is as it was trained, or its gate passed")
    return bundle.update(gate={**gate, "accepted": {"by": name, "reason": reason}})
