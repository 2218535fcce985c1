"""The half of the double of a GPU that is CUDA: pycuda's driver over host memory.

It enforces what the documentation demands: a context is current; async copies run from and to pinned memory, and only
when the stream is waited for, so that what is read too early is NaN and what is changed too early is noticed; addresses
are the device's own, aligned to 256 bytes, of memory that is large enough; what was taken is given back.
"""

import gc
import threading
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

ALIGNMENT = 256


class MisuseError(AssertionError):
    """Something that the documentation of CUDA or TensorRT forbids."""


def require(fits: bool, what: str) -> None:
    if not fits:
        raise MisuseError(what)


class Error(Exception):
    """pycuda.driver.Error."""


class OutOfMemoryError(Error):
    """pycuda.driver.MemoryError."""


class CudaDouble:
    """One GPU.

    Args:
        capability: compute capability.
        memory: bytes.
    """

    def __init__(self, capability: tuple[int, int], memory: int) -> None:
        self.capability, self.memory = capability, memory
        self.live: dict[int, np.ndarray] = {}
        self.peak = 0
        self.retained = 0
        self.pinned: list[np.ndarray] = []
        self.queue: list[Callable[[], None]] = []
        self.violations: list[str] = []
        self.objects: list[weakref.ref[Any]] = []  # of TensorRT, which the device has to outlive
        self._current = threading.local()
        self._next = 0x7F0000000000
        self.driver = self._driver()

    # memory

    def used(self) -> int:
        return sum(array.nbytes for array in self.live.values())

    def require_current(self) -> None:
        require(getattr(self._current, "depth", 0) > 0, "no context is current in this thread")

    def allocate(self, size: int) -> "Allocation":
        self.require_current()
        require(size > 0, "an allocation of nothing")
        if self.used() + size > self.memory:
            raise OutOfMemoryError("cuMemAlloc failed: out of memory")
        address, self._next = self._next, self._next + -(-size // ALIGNMENT) * ALIGNMENT + ALIGNMENT
        self.live[address] = np.full(size, 0xFF, np.uint8)  # NaN, -1: nothing that is right by chance
        self.peak = max(self.peak, self.used())
        return Allocation(self, address)

    def at(self, address: int, size: int, what: str) -> np.ndarray:
        for base, array in self.live.items():
            if base <= address and address + size <= base + array.nbytes:
                return array[address - base : address - base + size]
        raise MisuseError(f"{what}: {size} bytes at {address:#x} are not the device's, or of two allocations")

    def is_pinned(self, array: np.ndarray) -> bool:
        start = array.ctypes.data
        return any(
            p.ctypes.data <= start and start + array.nbytes <= p.ctypes.data + p.nbytes for p in self.pinned
        )

    # the stream

    def run_until(self, count: int) -> None:
        while len(self.queue) > count:
            self.queue.pop(0)()

    def copy_in(self, address: int, array: np.ndarray, stream: Any) -> None:
        self.require_current()
        require(stream is self.stream, "a copy on no stream")
        require(array.flags.c_contiguous and self.is_pinned(array), "an async copy from pageable memory")
        self.at(address, array.nbytes, "a copy to the device")
        before = array.tobytes()

        def copy() -> None:
            require(array.tobytes() == before, "pinned memory was changed while a copy from it was queued")
            self.at(address, len(before), "a copy to the device")[:] = np.frombuffer(before, np.uint8)

        self.queue.append(copy)

    def copy_out(self, array: np.ndarray, address: int, stream: Any) -> None:
        self.require_current()
        require(stream is self.stream, "a copy on no stream")
        require(array.flags.c_contiguous and self.is_pinned(array), "an async copy to pageable memory")
        self.at(address, array.nbytes, "a copy from the device")
        as_bytes = array.reshape(-1).view(np.uint8)
        as_bytes[:] = 0xFF

        def copy() -> None:
            as_bytes[:] = self.at(address, array.nbytes, "a copy from the device")

        self.queue.append(copy)

    def _driver(self) -> ModuleType:
        double = self

        class Context:
            def push(self) -> None:
                double._current.depth = getattr(double._current, "depth", 0) + 1

            @staticmethod
            def pop() -> None:
                double.require_current()
                double._current.depth -= 1

            def detach(self) -> None:
                double.retained -= 1

        class Device:
            def __init__(self, index: int) -> None:
                require(index == 0, "there is one GPU")

            def name(self) -> str:
                return "double of a GPU"

            def compute_capability(self) -> tuple[int, int]:
                return double.capability

            def retain_primary_context(self) -> Context:
                double.retained += 1
                return Context()

        class Stream:
            handle = 0xC0DE

            def __init__(self) -> None:
                double.require_current()
                double.stream = self

            def synchronize(self) -> None:
                double.require_current()
                double.run_until(0)

        class Event:
            """Done when the stream has come to it."""

            def record(self, stream: Any) -> "Event":
                require(stream is double.stream, "an event on no stream")
                self.done = False
                double.queue.append(self._arrive)
                return self

            def _arrive(self) -> None:
                self.done = True

            def synchronize(self) -> "Event":
                while not self.done:
                    double.queue.pop(0)()
                return self

            def time_since(self, other: "Event") -> float:
                require(self.done and other.done, "the time of an event that the stream has not come to")
                return 1.0

        def pagelocked_empty(shape: Any, dtype: Any) -> np.ndarray:
            double.require_current()
            array = np.empty(shape, dtype)
            array.reshape(-1).view(np.uint8)[:] = 0xFF
            double.pinned.append(array)
            return array

        module = ModuleType("pycuda.driver")
        module.__dict__.update(
            Error=Error,
            MemoryError=OutOfMemoryError,
            init=lambda: None,
            Device=Device,
            Context=Context,
            Stream=Stream,
            Event=Event,
            mem_alloc=self.allocate,
            mem_get_info=lambda: (self.memory - self.used(), self.memory),
            pagelocked_empty=pagelocked_empty,
            memcpy_htod_async=self.copy_in,
            memcpy_dtoh_async=self.copy_out,
        )
        return module

    def assert_given_back(self) -> None:
        """Nothing is allocated, queued, current or alive, and no object went before what needs it."""
        gc.collect()  # an exception that was caught keeps the frames it came through
        assert self.violations == []
        assert self.live == {}
        assert self.queue == []
        assert getattr(self._current, "depth", 0) == 0
        assert self.retained == 0
        assert [type(o).__name__ for ref in self.objects if (o := ref()) is not None] == []


class Allocation:
    """pycuda.driver.DeviceAllocation."""

    def __init__(self, double: CudaDouble, address: int) -> None:
        self.double, self.address = double, address

    def __int__(self) -> int:
        return self.address

    def free(self) -> None:
        self.double.require_current()
        require(not self.double.queue, "memory is freed while work is queued")
        del self.double.live[self.address]
