"""The steps of a layout as engines in this process: TensorRT or TensorRT-RTX on the first visible GPU.

The stages run in turn on one stream and share one arena for their activations, as large as the largest stage needs:
two of them at a time would need two. Values stay on the device from step to step. There are no CUDA graphs: a graph
is of one N, and every frame has its own.
"""

import importlib
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from m3ad.bundle import Bundle
from m3ad.contract import MAX_POINTS, Layout, Stage, Step, Tensor
from m3ad.engines import engine_folders
from m3ad.errors import ArtifactError, DeviceError, M3adError, MissingDependencyError
from m3ad.method import PIPELINE_OUTPUTS
from m3ad_plugins.library import check_driver, library_path, load_plugins

from m3ad_runtime.cuda import Gpu
from m3ad_runtime.device_values import DeviceValues
from m3ad_runtime.engine_choice import (
    GPU_RUNTIMES,
    TITLES,
    Chosen,
    GpuRuntime,
    Machine,
    build_command,
    choose,
    engines_for,
)
from m3ad_runtime.onnx_graph import Arrays
from m3ad_runtime.runtime_cache import RuntimeCache, runtime_cache
from m3ad_runtime.tensorrt_head import HOST_INPUTS, TiledHeadPlans, tile_rows
from m3ad_runtime.tensorrt_plan import Plan, PlanTensor, logger_of

INSTALL = {
    "tensorrt": "install TensorRT 10.3 to 11.4 for this machine's CUDA",
    "tensorrt_rtx": "pip install 'm3ad[rtx]'",
}


class TensorRtPipeline:
    """A layout's engines, ready to run; one frame at a time, whichever thread asks.

    Args:
        bundle: verified.
        layout: which steps to run.
        chosen: its engines, verified.
        trt: `tensorrt` or `tensorrt_rtx`.
        gpu: is closed with the pipeline.
        threads: that form rows on the host, where the head is in parts.

    Raises:
        ArtifactError: TensorRT refuses a plan or the plugin library, or a plan's tensors are not the contract's.
        MissingDependencyError: a plan needs the plugin library and it is not built here.
        DeviceError: the GPU has too little memory.
    """

    def __init__(
        self, bundle: Bundle, layout: Layout, chosen: Chosen, trt: Any, gpu: Gpu, threads: int | None = None
    ) -> None:
        self.wiring, self.chosen, self.gpu = bundle.contract.steps(layout), chosen, gpu
        self.runtime = f"{TITLES[trt.__name__]} {trt.__version__}"
        self._inputs = bundle.contract.inputs
        self._lock = threading.Lock()
        self._plans: dict[str, Plan] = {}
        self._cache: RuntimeCache | None = None
        self._ran = False
        self._logger: Any = None
        self._runtime: Any = None
        try:
            with gpu.current():
                self._open(bundle, trt, threads)
        except BaseException:
            self.close()
            raise

    def _open(self, bundle: Bundle, trt: Any, threads: int | None) -> None:
        gpu, contract = self.gpu, bundle.contract
        free = gpu.free_bytes
        if self.chosen.needs_plugins():  # a plan with plugin layers is read back by their creators
            load_plugins(trt, library_path())
        self._logger = logger_of(trt)
        self._runtime = trt.Runtime(self._logger)
        build = build_command(bundle, self._runtime_name(trt), gpu.compute_capability)
        for path in self.chosen.plans():
            plan = Plan(trt, self._runtime, self._logger, path, f"build it again: {build}")
            self._plans[path.stem] = plan
        stages = contract.stages
        parts = self.chosen.stages.get("head", ())
        for name, names in self.chosen.stages.items():
            if len(names) == 1:
                verify_plan(self._plans[names[0]], stages[name])
        self.arena_bytes = max(plan.arena_bytes for plan in self._plans.values())
        arena = gpu.allocate(self.arena_bytes, "the activations of the largest stage")
        self._cache = runtime_cache(trt, self.chosen)
        for plan in self._plans.values():
            plan.attach(arena, self.arena_bytes, self._cache)
        tiled = len(parts) > 1
        tile = tile_rows(self._plans[parts[1]]) if tiled else 1
        on_host = [tensor.name for tensor in self._inputs] + [*PIPELINE_OUTPUTS]
        for step in self.wiring:
            if len(self.chosen.stages[step.stage]) > 1:
                on_host += [step.inputs[name] for name in HOST_INPUTS if name in step.inputs]
        self._values = DeviceValues(gpu, contract, self.wiring, on_host, -(-MAX_POINTS // tile) * tile)
        self._functions: list[Callable[[], None]] = []
        self.buffer_bytes = self._values.bytes
        for step in self.wiring:
            plans = tuple(self._plans[name] for name in self.chosen.stages[step.stage])
            if len(plans) > 1:
                head = TiledHeadPlans(gpu, plans, step, self._values, contract, threads)
                self.buffer_bytes += head.bytes
                self._functions.append(head.enqueue)
            else:
                self._functions.append(self._whole(plans[0], step))
        self.device_bytes = max(free - gpu.free_bytes, self.arena_bytes + self.buffer_bytes)

    @staticmethod
    def _runtime_name(trt: Any) -> GpuRuntime:
        (name,) = (name for name in GPU_RUNTIMES if name == trt.__name__)
        return name

    def _whole(self, plan: Plan, step: Step) -> Callable[[], None]:
        addresses = self._values.of_stage({**step.inputs, **step.outputs})

        def enqueue() -> None:
            shapes = {tensor: self._values.shape(value) for tensor, value in step.inputs.items()}
            plan.enqueue(addresses, shapes, self.gpu.stream)

        return enqueue

    def run(self, inputs: Arrays) -> tuple[dict[str, npt.NDArray[Any]], dict[str, float]]:
        """Run every step; return the pipeline's outputs and the milliseconds of each step.

        A step's time is the device's, from the end of the step before; what the host does for a head in parts is in it.

        Raises:
            DeviceError: the GPU or TensorRT failed.
            ArtifactError: an engine was not built for this many points or scored pixels.
        """
        gpu = self.gpu
        with self._lock, gpu.current():
            try:
                self._values.send(inputs, self._inputs)
                events = [gpu.event()]
                for function in self._functions:
                    function()
                    events.append(gpu.event())
                self._values.fetch(PIPELINE_OUTPUTS)
            finally:
                gpu.synchronize()  # what is queued reads and writes memory that the next frame uses
            if self._cache and not self._ran:  # now everything is compiled, and a process may be killed later
                self._cache.save()
            self._ran = True
            outputs = {name: self._values.host(name).copy() for name in PIPELINE_OUTPUTS}
            step_ms: dict[str, float] = {}
            for step, first, second in zip(self.wiring, events, events[1:], strict=False):
                label = step.stage if step.stage not in step_ms else f"{step.stage} again"
                step_ms[label] = gpu.milliseconds(first, second)
        return outputs, step_ms

    def close(self) -> None:
        """Let go of contexts, compiled kernels, engines, runtime and memory, in this order."""
        if self.gpu.is_open:
            with self.gpu.current():
                self._functions = []
                for plan in self._plans.values():
                    plan.detach()
                if self._cache:
                    self._cache.close()
                for plan in self._plans.values():
                    plan.close()
                self._plans = {}
                self._runtime = None
            self.gpu.close()


def verify_plan(plan: Plan, stage: Stage) -> None:
    """Check that a plan's tensors are those of its stage; an input that the plan has no use for may be missing.

    Raises:
        ArtifactError: they are not.
    """
    for tensors, found, wanted in (
        (stage.inputs, plan.inputs, "takes"),
        (stage.outputs, plan.outputs, "gives"),
    ):
        known = {tensor.name: tensor for tensor in tensors}
        for tensor in found:
            want = known.get(tensor.name)
            if want is None or tensor.shape != want.shape or np.dtype(tensor.dtype) != np.dtype(want.dtype):
                raise ArtifactError(
                    f"plan {plan.name} {wanted} {_written(tensor)}, the contract of stage {stage.name} has "
                    f"{_written(want) if want else 'no such tensor'}; {plan.advice}"
                )
        if tensors is stage.outputs and (missing := known.keys() - {t.name for t in found}):
            raise ArtifactError(f"plan {plan.name} does not give `{min(missing)}`; {plan.advice}")


def _written(tensor: PlanTensor | Tensor) -> str:
    return f"`{tensor.name}` {np.dtype(tensor.dtype)} {list(tensor.shape)}"


def open_engines(
    bundle: Bundle, layout: Layout, runtime: GpuRuntime, threads: int | None = None
) -> TensorRtPipeline:
    """A layout of a bundle as engines on this machine's GPU.

    Raises:
        ArtifactError: the bundle has no engines that run here.
        MissingDependencyError: TensorRT, pycuda or the plugin library is missing.
        DeviceError: the GPU cannot be reached or has too little memory.
    """
    engines_for(bundle, runtime)  # what is missing there is told also where there is no GPU
    driver = check_driver()
    if not driver.is_well:
        raise DeviceError(f"no GPU can be reached: {driver.found}; {driver.advice}")
    try:
        trt = importlib.import_module(runtime)
    except ImportError as error:
        raise MissingDependencyError(
            f"{TITLES[runtime]} is not installed, its engines need it: {INSTALL[runtime]}"
        ) from error
    gpu = Gpu.open()
    try:
        chosen = choose(bundle, layout, runtime, Machine(gpu.compute_capability, trt.__version__))
    except BaseException:
        gpu.close()
        raise
    return TensorRtPipeline(bundle, layout, chosen, trt, gpu, threads)


def engines_that_run(
    bundle: Bundle, layout: Layout, threads: int | None, say: Callable[[str], None]
) -> TensorRtPipeline | None:
    """A layout as engines if the bundle has some that run here, or None, and one line said about why not.

    Nothing is said where there is neither an engine nor an NVIDIA driver: there was nothing to choose.
    """
    reasons: list[str] = []

    def opened(runtime: GpuRuntime) -> TensorRtPipeline | None:
        try:
            return open_engines(bundle, layout, runtime, threads)
        except M3adError as error:
            reasons.append(str(error))
            return None

    if found := next((pipeline for pipeline in map(opened, GPU_RUNTIMES) if pipeline is not None), None):
        return found
    if engine_folders(bundle.path) or check_driver().is_well:
        # The reason of the runtime that has engines tells more than that the other one has none.
        reason = next((text for text in reasons if " has no engines for " not in text), reasons[0])
        say(f"running on the CPU, in ONNX Runtime: {reason}")
    return None
