"""The tensors of one frame in device memory: allocated once, for the largest frame that the contract knows."""

import math
from collections.abc import Iterable, Mapping

from m3ad.contract import LETTERS, Step, Tensor
from m3ad.method import Contract

from m3ad_runtime.cuda import Array, Gpu
from m3ad_runtime.onnx_graph import Arrays

Shape = tuple[int, ...]


class DeviceValues:
    """Every value of a layout by its name in the pipeline; the sizes N and R are those of the frame that was sent.

    Args:
        gpu: its context is current.
        contract: of the bundle.
        wiring: of the layout.
        on_host: values that are sent or fetched, which have pinned memory.
        rows: for how many rows there is memory, at least as many as the contract allows.
    """

    def __init__(
        self, gpu: Gpu, contract: Contract, wiring: tuple[Step, ...], on_host: Iterable[str], rows: int
    ) -> None:
        self._gpu, self._rows = gpu, rows
        stages = contract.stages
        self.tensors: dict[str, Tensor] = {}
        for step in wiring:
            stage = stages[step.stage]
            self.tensors |= {step.inputs[t.name]: t for t in stage.inputs}
            self.tensors |= {step.outputs[t.name]: t for t in stage.outputs}
        self.addresses: dict[str, int] = {}
        self.bytes = 0
        for name, tensor in self.tensors.items():
            size = math.prod(self._largest(tensor)) * 4  # float32 and int32 alone
            self.addresses[name] = gpu.allocate(size, f"the tensor {name}")
            self.bytes += size
        self._pinned: dict[str, Array] = {
            name: gpu.pinned(math.prod(self._largest(self.tensors[name])), self.tensors[name].dtype)
            for name in dict.fromkeys(on_host)
        }
        self._sizes: dict[str, int] = {}

    def _largest(self, tensor: Tensor) -> Shape:
        return tuple(max(self._rows, LETTERS[d][-1]) if isinstance(d, str) else d for d in tensor.dims)

    def shape(self, name: str) -> Shape:
        """Of a value, in this frame."""
        return tuple(self._sizes[d] if isinstance(d, str) else d for d in self.tensors[name].dims)

    def host(self, name: str) -> Array:
        """A value's pinned memory in this frame's shape: what was sent, or what was fetched last."""
        shape = self.shape(name)
        return self._pinned[name][: math.prod(shape)].reshape(shape)

    def send(self, arrays: Arrays, tensors: Iterable[Tensor]) -> None:
        """Queue the copies of a frame's inputs to the device; the stream has come to the end of the last frame."""
        tensors = list(tensors)
        for tensor in tensors:
            pairs = zip(tensor.dims, arrays[tensor.name].shape, strict=True)
            self._sizes |= {d: size for d, size in pairs if isinstance(d, str)}
        for tensor in tensors:
            pinned = self.host(tensor.name)
            pinned[...] = arrays[tensor.name]
            self._gpu.copy_in(self.addresses[tensor.name], pinned)

    def fetch(self, names: Iterable[str]) -> None:
        """Queue the copies of values to their pinned memory, to be read when the stream has come there."""
        for name in names:
            self._gpu.copy_out(self.host(name), self.addresses[name])

    def of_stage(self, names: Mapping[str, str]) -> dict[str, int]:
        """A stage's tensors -> addresses, from its tensors -> values."""
        return {tensor: self.addresses[value] for tensor, value in names.items()}
