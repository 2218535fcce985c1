"""One plan in TensorRT or TensorRT-RTX: its tensors, and how it is put on the stream.

Only API that TensorRT 10.3 to 11.4 and TensorRT-RTX have in common; runtime_cache.py has what is of TensorRT-RTX alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from m3ad.errors import ArtifactError, DeviceError

from m3ad_runtime.cuda import ALIGNMENT
from m3ad_runtime.runtime_cache import RuntimeCache

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PlanTensor:
    """An input or output of a plan.

    Attributes:
        name: as in the ONNX file.
        is_input: or an output.
        shape: -1 for what may vary.
        dtype: of its values in memory.
        least: of an input, the smallest shape it may have; `shape` where nothing varies.
        most: the largest.
    """

    name: str
    is_input: bool
    shape: Shape
    dtype: npt.DTypeLike
    least: Shape
    most: Shape

    def takes(self, shape: Shape) -> bool:
        """Whether a shape lies between the smallest and the largest."""
        return len(shape) == len(self.shape) and all(
            low <= size <= high for low, size, high in zip(self.least, shape, self.most, strict=True)
        )


class Plan:
    """A deserialised engine with a context that works in memory it is given.

    Args:
        trt: `tensorrt` or `tensorrt_rtx`.
        runtime: of `trt`; outlives the plan.
        logger: what the runtime speaks to.
        path: of the plan, verified.
        advice: which command builds it again.

    Raises:
        ArtifactError: TensorRT refuses it, or a tensor has a type that the contract does not know.
    """

    def __init__(self, trt: Any, runtime: Any, logger: Any, path: Path, advice: str) -> None:
        self.name, self.advice, self._trt, self._logger = path.stem, advice, trt, logger
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise ArtifactError(f"{trt.__name__} {trt.__version__} refuses {path}: {logger.last()}; {advice}")
        self._engine, self._context = engine, None
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self.tensors = {name: self._tensor(engine, name) for name in names}
        self.inputs = [t for t in self.tensors.values() if t.is_input]
        self.outputs = [t for t in self.tensors.values() if not t.is_input]

    def _tensor(self, engine: Any, name: str) -> PlanTensor:
        trt = self._trt
        dtypes = {trt.DataType.FLOAT: np.float32, trt.DataType.INT32: np.int32}
        dtype = dtypes.get(engine.get_tensor_dtype(name))
        if dtype is None or engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
            found = engine.get_tensor_dtype(name)
            raise ArtifactError(
                f"`{name}` of plan {self.name} is {found} on {engine.get_tensor_location(name)}, expected float32 or "
                f"int32 on the device; {self.advice}"
            )
        shape = tuple(engine.get_tensor_shape(name))
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        least = most = shape
        if is_input and -1 in shape:
            least, _, most = map(tuple, engine.get_tensor_profile_shape(name, 0))
        return PlanTensor(name, is_input, shape, dtype, least, most)

    @property
    def arena_bytes(self) -> int:
        """What the context needs for its activations, at the largest shapes."""
        return int(self._engine.device_memory_size_v2)

    def attach(self, arena: int, size: int, cache: RuntimeCache | None) -> None:
        """Make the context; it works in the arena, which no other one uses at the same time.

        Args:
            arena: device memory.
            size: of the arena in bytes.
            cache: of kernels that are compiled here, with TensorRT-RTX.

        Raises:
            DeviceError: there is too little memory for what the context keeps beside it.
        """
        assert size >= self.arena_bytes
        assert arena % ALIGNMENT == 0
        trt = self._trt
        how = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(cache.config(trt, self._engine) if cache else how)
        if context is None:
            raise DeviceError(
                f"{self._trt.__name__} cannot make a context of plan {self.name}: {self._logger.last()}; end what "
                "else runs on the GPU, and look at: m3ad-export doctor"
            )
        context.set_device_memory(arena, size)
        self._context = context

    def enqueue(self, addresses: Mapping[str, int], shapes: Mapping[str, Shape], stream: int) -> None:
        """Put one run on the stream.

        Args:
            addresses: of every tensor, in device memory.
            shapes: of every input.
            stream: its handle.

        Raises:
            ArtifactError: an input has a shape that the plan was not built for.
            DeviceError: TensorRT could not queue it.
        """
        context = self._context
        assert context is not None
        for entry in self.inputs:
            shape = shapes[entry.name]
            if not entry.takes(shape):
                raise ArtifactError(
                    f"`{entry.name}` of plan {self.name} is {list(shape)}, it was built for {list(entry.least)} to "
                    f"{list(entry.most)}; {self.advice}"
                )
            self._require(context.set_input_shape(entry.name, shape), f"set the shape of {entry.name}")
        for name in self.tensors:
            self._require(context.set_tensor_address(name, addresses[name]), f"set the address of {name}")
        self._require(context.execute_async_v3(stream), "run")

    def _require(self, done: bool, what: str) -> None:
        if not done:
            raise DeviceError(
                f"{self._trt.__name__} could not {what} in plan {self.name}: {self._logger.last()}; look at: "
                "m3ad-export doctor"
            )

    def detach(self) -> None:
        """Let go of the context."""
        self._context = None

    def close(self) -> None:
        """Let go of the context, then of the engine."""
        self.detach()
        self._engine = None


def logger_of(trt: Any) -> Any:
    """What TensorRT speaks to: keeps the warnings and errors, which are shown when something fails."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps what TensorRT says."""

        def __init__(self) -> None:
            super().__init__()
            self.lines: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            # Without a GPU a builder also reports that it saw no driver; that is not why a build fails.
            if severity <= trt.ILogger.Severity.WARNING and "CUDA driver" not in msg:
                self.lines.append(msg)

        def text(self) -> str:
            return "\n".join(f"  {line}" for line in self.lines[-20:])

        def last(self) -> str:
            """The last line, for a sentence."""
            return self.lines[-1].strip() if self.lines else "it says nothing of why"

    return Logger()
