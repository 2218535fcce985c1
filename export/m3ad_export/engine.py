"""A bundle's ONNX stages -> engines, by TensorRT-RTX ahead of time or by full TensorRT where it is installed.

One code path: strongly typed networks, the precision already in the ONNX file, only API that TensorRT 10.3 to 11.4 and
TensorRT-RTX share. TensorRT takes the custom ops as plugins; TensorRT-RTX has none, so it gets their function bodies.
The files of a quantized bundle are built as they are, once its gate has passed.
"""

import hashlib
import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner
from m3ad.bundle import Bundle, file_entry, new_folder, sha256_of, write_json
from m3ad.contract import MAX_POINTS, MIN_POINTS, OP_DOMAIN, Layout
from m3ad.engines import FORMAT
from m3ad.errors import ArtifactError, M3adError, MissingDependencyError
from m3ad.method import Contract
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from m3ad_export.engine_types import inspector_types, network_types, verify_precision, verify_target
from m3ad_export.graphs.head import HEAD_PARTS, TILED_PARTS, head_model, with_tile
from m3ad_export.graphs.plan import default_plan
from m3ad_export.graphs.precision import Precision, half_model, histogram

# TensorRT-RTX 1.7 compiles for these without seeing a GPU; Jetson's sm87 and sm110 are not among them.
RTX_TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
TYPICAL_POINTS = 20000  # what the kernels are tuned for; any N and R in 1024..50176 runs
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """One plan and what is known of it."""

    plan: bytes
    seconds: float
    precision_histogram: dict[str, int]
    inspected: bool


def build_engines(
    bundle: Bundle,
    target: str,
    precision: Precision | None = None,
    layouts: Sequence[Layout] = ("chain",),
    say: Say = lambda _: None,
) -> Path:
    """Build every stage of the layouts and write them to the bundle as engines/<target>/.

    Args:
        bundle: a verified bundle.
        target: `sm86`.. for TensorRT-RTX ahead of time, `native` for full TensorRT and the GPU of this machine.
        precision: of the matrix products, fp16 if None; norms, cosines and voting stay fp32. A quantized bundle
            holds its precision already and takes None only.
        layouts: whose stages to build.
        say: is told of every stage as it is built.

    Returns:
        The folder written.

    Raises:
        M3adError: the target is unknown or lacks the bundle's type.
        MissingDependencyError: the builder is not installed.
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
    trt, runtime = _builder_module(target)
    names = dict.fromkeys(step.stage for layout in layouts for step in bundle.contract.steps(layout))
    with new_folder(bundle.path / "engines" / target, FORMAT) as folder:
        entries: dict[str, Any] = {}
        for stage in (part for name in names for part in engine_stages(name, runtime)):
            sources = source_files(bundle, stage)
            model = stage_model(
                bundle.path / "onnx", stage, bundle.contract, chosen, with_plugins=runtime == "tensorrt"
            )
            serialized = model.SerializeToString()
            built = _build(trt, serialized, stage, target, _needs_plugins(model))
            verify_precision(stage, histogram(model), built.precision_histogram)
            path = folder / f"{stage}.plan"
            path.write_bytes(built.plan)
            entries[path.name] = {
                **file_entry(path),
                "onnx_sha256": hashlib.sha256(serialized).hexdigest(),
                "source_files": {path.name: sha256_of(path) for path in sources},
                "inputs": [v.name for v in model.graph.input],
                "precision_histogram": built.precision_histogram,
                "inspected": built.inspected,
                "build_s": round(built.seconds, 2),
            }
            say(
                f"{stage}: {len(built.plan) / 1e6:.1f} MB in {built.seconds:.1f} s, {built.precision_histogram}"
            )
        manifest = {
            "format": FORMAT,
            "target": target,
            "runtime": runtime,
            "runtime_version": trt.__version__,
            "compute_capability": _compute_capability(target),
            "precision": written.type if written else chosen,
            "accepted_loss": (bundle.document.get("gate") or {}).get("accepted"),
            "layouts": list(layouts),
            "files": entries,
        }
        write_json(folder / "manifest.json", manifest)
    return bundle.path / "engines" / target


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
        model = onnx.load(folder / f"{name}.onnx")
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
    """Record in a quantized bundle who builds it although its gate did not pass, and why.

    Args:
        bundle: quantized; its gate failed or is missing.
        who_and_why: `NAME: REASON`.

    Raises:
        M3adError: one of the two is missing, or there is no loss to accept.
    """
    name, _, reason = (part.strip() for part in who_and_why.partition(":"))
    if not name or not reason:
        raise M3adError(f"--accept-loss needs a name and a reason, 'NAME: REASON', got {who_and_why!r}")
    gate = bundle.document.get("gate") or {"passed": False, "figures": None}
    if bundle.manifest.precision is None or gate["passed"]:
        raise M3adError(f"{bundle.path} has no loss to accept: it is not quantized, or its gate passed")
    return bundle.update(gate={**gate, "accepted": {"by": name, "reason": reason}})


def _builder_module(target: str) -> tuple[Any, str]:
    if target == "native":
        name, runtime, advice = (
            "tensorrt",
            "tensorrt",
            "install TensorRT 10.3 or later for this machine's CUDA",
        )
    elif target in RTX_TARGETS:
        name, runtime, advice = "tensorrt_rtx", "tensorrt_rtx", "pip install 'm3ad[rtx]'"
    else:
        raise M3adError(
            f"unknown target {target!r}, expected native or one of {', '.join(RTX_TARGETS)}; "
            f"engines for Jetson are built on the Jetson with --target native"
        )
    try:
        return importlib.import_module(name), runtime
    except ImportError as error:
        raise MissingDependencyError(f"{name} is not installed: {advice}") from error


def _compute_capability(target: str) -> str:
    if target == "native":
        import pycuda.autoinit  # only full TensorRT on a machine with a GPU comes here

        major, minor = pycuda.autoinit.device.compute_capability()
        return f"{major}.{minor}"
    digits = target.removeprefix("sm")
    return f"{digits[:-1]}.{digits[-1]}"


def _needs_plugins(model: onnx.ModelProto) -> bool:
    return any(node.domain == OP_DOMAIN for node in model.graph.node)


def _build(trt: Any, serialized: bytes, stage: str, target: str, with_plugins: bool) -> BuiltEngine:
    started = time.perf_counter()
    logger = _logger(trt)
    builder = trt.Builder(logger)
    if with_plugins:
        _load_plugins(trt, builder)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(serialized):
        errors = "\n".join(f"  {str(parser.get_error(i)).splitlines()[0]}" for i in range(parser.num_errors))
        raise ArtifactError(
            f"{trt.__name__} {trt.__version__} cannot read stage {stage}:\n{errors}\n"
            f"Export the bundle again with this m3ad, or build this stage for another runtime"
        )
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if target != "native":
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), 0)
    profile = builder.create_optimization_profile()
    dynamic = False
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        if -1 in tuple(tensor.shape):
            dynamic = True
            sizes = (MIN_POINTS, TYPICAL_POINTS, MAX_POINTS)
            profile.set_shape(tensor.name, *(tuple(n if d == -1 else d for d in tensor.shape) for n in sizes))
    if dynamic:
        config.add_optimization_profile(profile)
    types = network_types(trt, network)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ArtifactError(f"{trt.__name__} could not build stage {stage} for {target}:\n{logger.text()}")
    inspected = inspector_types(trt, logger, plan) if target == "native" else None
    return BuiltEngine(
        bytes(plan),
        time.perf_counter() - started,
        inspected if inspected is not None else types,
        inspected is not None,
    )


def _load_plugins(trt: Any, builder: Any) -> None:
    from m3ad_plugins.library import library_path

    registry = builder.get_plugin_registry()
    if registry.load_library(str(library_path())) is None:
        raise ArtifactError(f"TensorRT {trt.__version__} refused {library_path()}; run: m3ad-export doctor")


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps what the builder says; it is shown when a build fails."""

        def __init__(self) -> None:
            super().__init__()
            self.lines: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            # Without a GPU the builder also reports that it saw no driver; that is not why a build fails.
            if severity <= trt.ILogger.Severity.WARNING and "CUDA driver" not in msg:
                self.lines.append(msg)

        def text(self) -> str:
            return "\n".join(f"  {line}" for line in self.lines[-20:])

    return Logger()
