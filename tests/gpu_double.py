"""A double of a GPU: pycuda's driver and TensorRT's Python API over host memory, for machines that have neither.

It computes with ONNX Runtime what a plan was built of, and enforces what the documentation demands: that of CUDA
(`cuda_double`); and shapes lie in the profile; an arena is large enough and nobody else's; a runtime outlives its
engines and these their contexts.
"""

import json
import math
import weakref
import zlib
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from cuda_double import ALIGNMENT, CudaDouble, Error, MisuseError, require
from m3ad.contract import LETTERS, MAX_POINTS, OP_DOMAIN, OPS
from runtime_config_double import STRATEGIES, RuntimeConfig

MAGIC = b"plan of a double"


class GpuDouble(CudaDouble):
    """One GPU, and TensorRT or TensorRT-RTX on it.

    Args:
        capability: compute capability.
        memory: bytes.
        name: of the TensorRT module.
        version: of it.
    """

    def __init__(
        self,
        capability: tuple[int, int] = (8, 9),
        memory: int = 8 << 30,
        name: str = "tensorrt",
        version: str = "10.13.3.9",
    ) -> None:
        super().__init__(capability, memory)
        self.runs: list[str] = []  # the plans that were run, in order
        self.compiled: list[str] = []  # the plans whose kernels TensorRT-RTX had to compile, in order
        self.creators: dict[str, list[str]] = {}  # op -> the attributes that its plugin knows
        self.fails: str | None = None  # a plan whose run fails on the device
        self.refuses: str | None = None  # a plan that TensorRT cannot queue
        self.trt = tensorrt_of(self, name, version)


def tensorrt_of(double: GpuDouble, name: str, version: str) -> ModuleType:
    """The module `tensorrt` or `tensorrt_rtx`, as far as the runner knows it."""

    class ILogger:
        Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2, INFO=3, VERBOSE=4)

    class Registry:
        def get_creator(self, op: str, op_version: str, domain: str) -> Any:
            known = domain == OP_DOMAIN and op in OPS and op_version == str(OPS[op].version)
            fields = [SimpleNamespace(name=name) for name in double.creators.get(op, ())]
            return SimpleNamespace(field_names=fields) if known and op in double.creators else None

        def load_library(self, path: str) -> Any:
            with open(path, "rb") as file:
                text = file.read().decode()
            if not text.startswith("plugins:"):
                return None
            # A name, or name:attribute,attribute where not all are known.
            for each in text.removeprefix("plugins:").split():
                op, _, attributes = each.partition(":")
                double.creators[op] = attributes.split(",") if attributes else list(OPS[op].attributes)
            return object()

    class Runtime:
        def __init__(self, logger: ILogger) -> None:
            double.require_current()
            self._logger = weakref.ref(logger)
            double.objects.append(weakref.ref(self))

        def log(self, text: str) -> None:
            logger = self._logger()
            if logger is None:
                raise MisuseError("the logger is gone before its runtime")
            logger.log(ILogger.Severity.ERROR, text)  # type: ignore[attr-defined]

        def deserialize_cuda_engine(self, plan: bytes) -> "Engine | None":
            double.require_current()
            if not plan.startswith(MAGIC) or zlib.crc32(plan[len(MAGIC) + 4 :]) != int.from_bytes(
                plan[len(MAGIC) : len(MAGIC) + 4], "big"
            ):
                self.log("Serialization assertion plan->header.magicTag == kMAGIC failed")
                return None
            header, _, model = plan[len(MAGIC) + 4 :].partition(b"\n")
            facts = json.loads(header)
            if (facts["module"], facts["version"]) != (name, version):
                self.log(
                    f"The engine plan file is not compatible with {version}, it is of {facts['version']}"
                )
                return None
            if absent := set(facts["plugins"]) - double.creators.keys():
                self.log(f"Cannot find plugin: {min(absent)}, version: {OPS[min(absent)].version}")
                return None
            return Engine(double, module, self, facts, model)

        def __del__(self) -> None:
            if any(isinstance(o, Engine) and o.runtime() in (None, self) for o in alive(double)):
                double.violations.append("a runtime is gone before its engine")

    module = ModuleType(name)
    module.__dict__.update(
        __version__=version,
        ILogger=ILogger,
        Runtime=Runtime,
        DataType=SimpleNamespace(FLOAT="DataType.FLOAT", INT32="DataType.INT32", HALF="DataType.HALF"),
        TensorIOMode=SimpleNamespace(INPUT="INPUT", OUTPUT="OUTPUT"),
        TensorLocation=SimpleNamespace(DEVICE="TensorLocation.DEVICE", HOST="TensorLocation.HOST"),
        ExecutionContextAllocationStrategy=SimpleNamespace(STATIC=0, ON_PROFILE_CHANGE=1, USER_MANAGED=2),
        get_plugin_registry=Registry,
    )
    if name == "tensorrt_rtx":
        module.DynamicShapesKernelSpecializationStrategy = STRATEGIES  # type: ignore[attr-defined]
    return module


def alive(double: GpuDouble) -> list[Any]:
    return [o for ref in double.objects if (o := ref()) is not None]


TYPES = {
    1: ("DataType.FLOAT", np.float32),
    6: ("DataType.INT32", np.int32),
    10: ("DataType.HALF", np.float16),
}


class Engine:
    """trt.ICudaEngine."""

    def __init__(
        self, double: GpuDouble, trt: ModuleType, runtime: Any, facts: dict[str, Any], model: bytes
    ) -> None:
        self.double, self.trt, self.facts = double, trt, facts
        self.runtime = weakref.ref(runtime)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        graph = onnx.load_from_string(model).graph
        self.values = {v.name: v for v in (*graph.input, *graph.output)}
        self.inputs = [v.name for v in graph.input]
        self.outputs = [v.name for v in graph.output]
        double.objects.append(weakref.ref(self))

    def __del__(self) -> None:
        if any(isinstance(o, Context) and o.engine in (None, self) for o in alive(self.double)):
            self.double.violations.append("an engine is gone before its context")

    num_io_tensors = property(lambda self: len(self.values))
    device_memory_size_v2 = property(lambda self: self.facts["arena"])

    def get_tensor_name(self, index: int) -> str:
        return list(self.values)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return "INPUT" if name in self.inputs else "OUTPUT"

    def get_tensor_dtype(self, name: str) -> str:
        return TYPES[self.values[name].type.tensor_type.elem_type][0]

    def numpy_dtype(self, name: str) -> Any:
        return TYPES[self.values[name].type.tensor_type.elem_type][1]

    def get_tensor_location(self, name: str) -> str:
        return "TensorLocation.DEVICE"

    def get_tensor_shape(self, name: str) -> list[int]:
        dims = self.values[name].type.tensor_type.shape.dim
        return [-1 if d.dim_param else d.dim_value for d in dims]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[list[int]]:
        require(profile == 0 and name in self.inputs, "profiles are of inputs")
        dims = self.values[name].type.tensor_type.shape.dim
        most = self.facts.get("most_rows", MAX_POINTS)
        ends = ((LETTERS[d.dim_param][0], most, most) if d.dim_param else None for d in dims)
        sizes = [end or (d.dim_value,) * 3 for end, d in zip(ends, dims, strict=True)]
        return [list(shape) for shape in zip(*sizes, strict=True)]

    def create_runtime_config(self) -> RuntimeConfig:
        require(self.trt.__name__ == "tensorrt_rtx", "runtime configurations are of TensorRT-RTX here")
        return RuntimeConfig(self)

    def create_execution_context(self, how: "int | RuntimeConfig") -> "Context | None":
        self.double.require_current()
        require(self.runtime() is not None, "an engine is used after its runtime is gone")
        if self.facts.get("no_context"):
            self.runtime().log("CUDA initialization failure with error: out of memory")  # type: ignore[union-attr]
            return None
        config = how if isinstance(how, RuntimeConfig) else None
        require(config is None or config.engine is self, "a runtime configuration of another engine")
        strategy = config.strategy if config else how
        require(strategy == 2, "a context that takes memory of its own: the stages are to share one arena")
        return Context(self, config.cache if config else None)


class Context:
    """trt.IExecutionContext."""

    def __init__(self, engine: Engine, cache: Any = None) -> None:
        self._engine = weakref.ref(engine)
        self.cache = weakref.ref(cache) if cache else None
        self.double = engine.double
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.arena: tuple[int, int] | None = None
        self.double.objects.append(weakref.ref(self))

    @property
    def engine(self) -> Engine | None:
        return self._engine()

    def _used(self) -> Engine:
        self.double.require_current()
        engine = self._engine()
        if engine is None or engine.runtime() is None:
            raise MisuseError("a context is used after its engine or runtime is gone")
        return engine

    def set_device_memory(self, address: int, size: int) -> None:
        engine = self._used()
        require(address % ALIGNMENT == 0, "an arena that is not aligned to 256 bytes")
        require(size >= engine.device_memory_size_v2, "an arena smaller than device_memory_size_v2")
        self.double.at(address, size, "an arena")
        self.arena = (address, size)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        engine = self._used()
        least, _, most = engine.get_tensor_profile_shape(name, 0)
        fits = len(shape) == len(least) and all(
            low <= size <= high for low, size, high in zip(least, shape, most, strict=True)
        )
        if fits:
            self.shapes[name] = tuple(shape)
        else:
            engine.runtime().log(f"{name}: {shape} is out of the profile")  # type: ignore[union-attr]
        return fits

    def set_tensor_address(self, name: str, address: int) -> bool:
        engine = self._used()
        require(address % ALIGNMENT == 0, f"{name}: an address that is not aligned to 256 bytes")
        self.addresses[name] = address
        return name in engine.values

    def execute_async_v3(self, stream: int) -> bool:
        engine, double = self._used(), self.double
        plan = engine.facts["stage"]
        require(stream == double.stream.handle, "a run on no stream")
        require(self.arena is not None, f"{plan}: no memory was set")
        require(self.addresses.keys() == engine.values.keys(), f"{plan}: addresses are missing")
        require(self.shapes.keys() == {*engine.inputs}, f"{plan}: shapes are missing")
        if plan == double.refuses:
            engine.runtime().log("enqueueV3: Error Code 3: API Usage Error")  # type: ignore[union-attr]
            return False
        if self.cache:
            self.cache().compile(plan)
        # What was set is read now; it may be set anew for the next run while this one waits.
        addresses, shapes = dict(self.addresses), dict(self.shapes)
        arena, size = self.arena or (0, 0)

        def run() -> None:
            if plan == double.fails:
                raise Error("cuStreamSynchronize failed: an illegal memory access was encountered")
            ranges = [(arena, size)]

            def memory(name: str, shape: tuple[int, ...]) -> np.ndarray:
                dtype = np.dtype(engine.numpy_dtype(name))
                found = double.at(addresses[name], math.prod(shape) * dtype.itemsize, f"{plan}: {name}")
                ranges.append((addresses[name], found.nbytes))
                return found.view(dtype).reshape(shape)

            feeds = {name: memory(name, shapes[name]) for name in engine.inputs}
            results = engine.session.run(engine.outputs, {n: a.copy() for n, a in feeds.items()})
            outputs = [memory(n, r.shape) for n, r in zip(engine.outputs, results, strict=True)]
            ends = sorted((start, start + length) for start, length in ranges)
            overlap = any(a[1] > b[0] for a, b in pairwise(ends) if a[1] > a[0])
            require(not overlap, f"{plan}: tensors or the arena share memory")
            double.at(arena, size, "an arena")[:] = 0xEE  # activations of the last stage are gone
            for memory_of, result in zip(outputs, results, strict=True):
                memory_of[...] = result
            double.runs.append(plan)

        double.queue.append(run)
        return True


def plan_of(model: onnx.ModelProto, stage: str, module: ModuleType, arena: int, **facts: Any) -> bytes:
    """The plan that the double reads back: the model itself, and what TensorRT keeps beside it.

    Args:
        model: with the bodies of its ops.
        stage: the plan's name.
        module: of `tensorrt_of`.
        arena: bytes its context needs.
        facts: more of them: `no_context`, `most_rows` of the profile.
    """
    plugins = sorted({n.op_type for n in model.graph.node if n.domain == OP_DOMAIN})
    header = {
        "module": module.__name__,
        "version": module.__version__,
        "stage": stage,
        "plugins": plugins,
        "arena": arena,
        **facts,
    }
    body = json.dumps(header).encode() + b"\n" + model.SerializeToString()
    return MAGIC + zlib.crc32(body).to_bytes(4, "big") + body
