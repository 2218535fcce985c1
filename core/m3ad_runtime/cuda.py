"""The GPU as the runner sees it: memory, pinned memory, one stream, events. The only file that speaks to pycuda.

TensorRT works in the device's primary context, so everything here does, too; it is current inside `Gpu.current()`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from m3ad.errors import DeviceError, MissingDependencyError

Array = npt.NDArray[Any]
ALIGNMENT = 256  # of every address cuMemAlloc returns, and what TensorRT demands of an arena
MIB = 2**20


class Gpu:
    """The first visible GPU. What is allocated of it is freed by `close`, not before."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        device = driver.Device(0)
        self.name: str = device.name()
        self.compute_capability = "{}.{}".format(*device.compute_capability())
        self._context: Any = device.retain_primary_context()
        self._allocations: list[Any] = []
        with self.current():
            self._stream: Any = driver.Stream()

    @classmethod
    def open(cls) -> "Gpu":
        """The GPU of this machine.

        Raises:
            MissingDependencyError: pycuda is not installed, or cannot be loaded.
            DeviceError: the driver shows no GPU.
        """
        try:
            import pycuda.driver as driver
        except ModuleNotFoundError as error:
            raise MissingDependencyError(
                "pycuda is not installed, engines in this process need it: pip install 'm3ad[gpu]'"
            ) from error
        except ImportError as error:
            raise MissingDependencyError(
                f"pycuda cannot be loaded here ({error}); look at: m3ad-export doctor"
            ) from error
        try:
            driver.init()
            return cls(driver)
        except driver.Error as error:
            raise DeviceError(f"no GPU can be reached ({error}); look at: m3ad-export doctor") from error

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the GPU's context current in this thread while the block runs.

        Raises:
            DeviceError: what was queued has failed, here or in a kernel before.
        """
        self._context.push()
        try:
            yield
        except self._driver.Error as error:
            raise DeviceError(
                f"{self.name} failed ({error}); start this process again, and look at: m3ad-export doctor"
            ) from error
        finally:
            self._context.pop()

    @property
    def is_open(self) -> bool:
        """Whether it was not closed yet."""
        return self._context is not None

    @property
    def stream(self) -> int:
        """The handle of the one stream, for TensorRT."""
        return int(self._stream.handle)

    @property
    def free_bytes(self) -> int:
        """Memory that is free on the GPU, whoever uses the rest."""
        free, _ = self._driver.mem_get_info()
        return int(free)

    def allocate(self, size: int, what: str) -> int:
        """The address of new device memory of at least one byte.

        Raises:
            DeviceError: there is not as much; `what` it was for is told.
        """
        try:
            self._allocations.append(self._driver.mem_alloc(max(size, 1)))
        except self._driver.MemoryError as error:
            raise DeviceError(
                f"{self.name} has no {size / MIB:.0f} MiB for {what}, only {self.free_bytes / MIB:.0f} MiB are free; "
                "end what else runs there, or use the fused layout, engines of a lower precision or a lattice"
            ) from error
        return int(self._allocations[-1])

    def pinned(self, count: int, dtype: npt.DTypeLike) -> Array:
        """[count] of host memory that copies may run from and to while Python goes on.

        Raises:
            DeviceError: there is not as much.
        """
        try:
            return np.asarray(self._driver.pagelocked_empty(count, dtype))
        except self._driver.MemoryError as error:
            size = count * np.dtype(dtype).itemsize / MIB
            raise DeviceError(f"this machine has no {size:.0f} MiB of pinned memory left") from error

    def copy_in(self, address: int, pinned: Array) -> None:
        """Queue a copy to the device; the array stays as it is until an event after it, or `synchronize`."""
        self._driver.memcpy_htod_async(address, pinned, self._stream)

    def copy_out(self, pinned: Array, address: int) -> None:
        """Queue a copy from the device; the array is read after `synchronize`."""
        self._driver.memcpy_dtoh_async(pinned, address, self._stream)

    def event(self) -> Any:
        """Mark this place in the stream."""
        return self._driver.Event().record(self._stream)

    def wait(self, event: Any) -> None:
        """Wait until the stream has come to the event."""
        event.synchronize()

    def milliseconds(self, first: Any, second: Any) -> float:
        """The device's time between two events that the stream has come to."""
        return float(second.time_since(first))

    def synchronize(self) -> None:
        """Wait for all that is queued."""
        self._stream.synchronize()

    def close(self) -> None:
        """Free the memory and give the context back; what runs on it must be closed before."""
        with self.current():
            self._stream.synchronize()
            for allocation in self._allocations:
                allocation.free()
            self._allocations.clear()
            self._stream = None
        self._context.detach()
        self._context = None
