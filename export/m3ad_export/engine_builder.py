"""One ONNX model -> one plan, by full TensorRT or TensorRT-RTX: only API that 10.3 to 11.4 and RTX share."""

import importlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m3ad.atomic import file_beside
from m3ad.contract import LETTERS
from m3ad.errors import ArtifactError, M3adError, MissingDependencyError
from m3ad_plugins.library import load_plugins
from m3ad_runtime.tensorrt_plan import logger_of

from m3ad_export.engine_types import inspector_types, network_types
from m3ad_export.rtx_parser import provide_library

# TensorRT-RTX 1.7 compiles for these without seeing a GPU; Jetson's sm87 and sm110 are not among them.
RTX_TARGETS = ("sm80", "sm86", "sm89", "sm120", "sm121")
TYPICAL_POINTS = (
    20000  # what the kernels are tuned for; any N from 1024 and any R from 1 on runs, up to 50176
)
PROGRESS_S = 5.0  # a builder says nothing for minutes: 9.5 of them on an Orin, for one engine
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """One plan and what is known of it."""

    plan: bytes
    seconds: float
    precision_histogram: dict[str, int]
    inspected: bool
    plugin_layers: list[str] = field(default_factory=list)
    loops: int = 0


def builder_module(target: str) -> tuple[Any, str]:
    """The Python package that builds for a target, and the runtime's name.

    Raises:
        M3adError: no runtime builds for it.
        MissingDependencyError: the package is not installed.
    """
    if target == "native":
        name, advice = "tensorrt", "install TensorRT 10.3 or later for this machine's CUDA"
    elif target in RTX_TARGETS:
        name, advice = "tensorrt_rtx", "pip install 'm3ad[rtx]'"
    elif target == "sm75":
        raise M3adError(
            "sm75 cannot be built for: TensorRT-RTX has no fp32 matrix products on Turing, and the vote stays fp32; "
            "use full TensorRT on that machine, --target native"
        )
    else:
        raise M3adError(
            f"unknown target {target!r}, expected native or one of {', '.join(RTX_TARGETS)}; "
            f"engines for Jetson are built on the Jetson with --target native"
        )
    try:
        return importlib.import_module(name), name
    except ImportError as error:
        raise MissingDependencyError(f"{name} is not installed: {advice}") from error


def compute_capability(target: str) -> str:
    """As in 8.9: of the target's name, or of this machine's GPU for `native`."""
    if target == "native":
        import pycuda.autoinit  # only full TensorRT on a machine with a GPU comes here

        major, minor = pycuda.autoinit.device.compute_capability()
        return f"{major}.{minor}"
    digits = target.removeprefix("sm")
    return f"{digits[:-1]}.{digits[-1]}"


def build_plan(
    trt: Any,
    serialized: bytes,
    stage: str,
    target: str,
    plugins: Path | None = None,
    timing_cache: Path | None = None,
    say: Say = lambda _: None,
) -> BuiltEngine:
    """Parse and build a stage's model.

    Args:
        trt: the module of `builder_module`.
        serialized: the model, weights inside.
        stage: its name, for messages.
        target: as in `builder_module`.
        plugins: the plugin library, where the model has nodes of the custom ops.
        timing_cache: the file that keeps what the builder has timed, read and written.
        say: is told at least every five seconds that the builder works.

    Raises:
        ArtifactError: it does not parse or does not build, or the plugin library is refused.
    """
    started = time.perf_counter()
    logger = logger_of(trt)
    builder = trt.Builder(logger)
    if plugins is not None:
        if trt.__name__ == "tensorrt_rtx":
            provide_library()
        load_plugins(trt, plugins)
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
    add_profile(builder, network, config)
    if timing_cache is not None:
        begin_timing(config, timing_cache)
    types, layers = network_types(trt, network), _layers(network)
    with _progress(say, stage):
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ArtifactError(f"{trt.__name__} could not build stage {stage} for {target}:\n{logger.text()}")
    if timing_cache is not None:
        keep_timing(config, timing_cache)
    inspected = inspector_types(trt, logger, plan) if target == "native" else None
    return BuiltEngine(
        bytes(plan),
        time.perf_counter() - started,
        inspected if inspected is not None else types,
        inspected is not None,
        [layer.name for layer in layers if layer.type == trt.LayerType.PLUGIN_V3],
        sum(layer.type == trt.LayerType.TRIP_LIMIT for layer in layers),
    )


def begin_timing(config: Any, path: Path) -> None:
    """Start from what an earlier build has timed; a cache of another TensorRT or GPU is refused, and begun anew."""
    known = path.read_bytes() if path.is_file() else b""
    if not config.set_timing_cache(config.create_timing_cache(known), False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


def keep_timing(config: Any, path: Path) -> None:
    """Write what was timed; nobody reads half of it."""
    with file_beside(path) as temporary:
        temporary.write_bytes(bytes(config.get_timing_cache().serialize()))


def add_profile(builder: Any, network: Any, config: Any) -> None:
    """Let the dimensions that vary take what the contract allows; they are called by its letters."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    profile = builder.create_optimization_profile()
    for tensor in (tensor for tensor in inputs if -1 in tuple(tensor.shape)):
        shape = tuple(tensor.shape)
        letters = [LETTERS[tensor.get_dimension_name(i)] if d == -1 else None for i, d in enumerate(shape)]
        least, most = (
            tuple(d if known is None else known[end] for d, known in zip(shape, letters, strict=True))
            for end in (0, -1)
        )
        typical = tuple(TYPICAL_POINTS if d == -1 else d for d in shape)
        profile.set_shape(tensor.name, least, typical, most)
    if any(-1 in tuple(tensor.shape) for tensor in inputs):
        config.add_optimization_profile(profile)


def _layers(network: Any) -> list[Any]:
    return [network.get_layer(i) for i in range(network.num_layers)]


@contextmanager
def _progress(say: Say, stage: str) -> Iterator[None]:
    """A line every few seconds while the block runs; the builder works without Python's lock."""
    done = threading.Event()

    def speak() -> None:
        started = time.monotonic()
        while not done.wait(PROGRESS_S):
            say(f"{stage}: building, {time.monotonic() - started:.0f} s so far")

    speaker = threading.Thread(target=speak, daemon=True)
    speaker.start()
    try:
        yield
    finally:
        done.set()
        speaker.join()
