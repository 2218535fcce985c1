"""What TensorRT-RTX compiled for this GPU at run time, kept in a file for the next start.

Its plans hold no kernels of one GPU; they are compiled when a context is made and at the first frame.
"""

import contextlib
import hashlib
from pathlib import Path
from typing import Any

from m3ad.atomic import file_beside
from m3ad_plugins.build import cache_folder

from m3ad_runtime.engine_choice import Chosen


class RuntimeCache:
    """The compiled kernels of a pipeline's plans, in one file that may be missing, damaged or of another driver.

    Args:
        path: of the file. TensorRT-RTX checks what it holds against the GPU, the driver and its own version, and
            refuses the whole of it on any mismatch; it is then replaced.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._runtime_cache: Any = None
        self._kept = b""

    def config(self, trt: Any, engine: Any) -> Any:
        """How an engine's context is made: with this cache, in memory that it is given."""
        runtime_config = engine.create_runtime_config()
        if self._runtime_cache is None:
            self._runtime_cache = runtime_config.create_runtime_cache()
            with contextlib.suppress(OSError):  # the first start, or a home that cannot be read
                blob = self.path.read_bytes()
                if self._runtime_cache.deserialize(blob):
                    self._kept = blob
        runtime_config.set_execution_context_allocation_strategy(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        # Every frame has its own number of points: kernels of one number would be compiled beside frames, for ever.
        runtime_config.dynamic_shapes_kernel_specialization_strategy = (
            trt.DynamicShapesKernelSpecializationStrategy.NONE
        )
        runtime_config.set_runtime_cache(self._runtime_cache)
        return runtime_config

    def save(self) -> None:
        """Write what was compiled, if anything was since it was read."""
        if self._runtime_cache is None:
            return
        blob = bytes(self._runtime_cache.serialize())
        if blob == self._kept:
            return
        # A disk that is full or cannot be written costs the next start some seconds, and no frame.
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)  # it holds code
            with file_beside(self.path) as beside:
                beside.write_bytes(blob)
        self._kept = blob

    def close(self) -> None:
        """Let go of the kernels; contexts made with them are gone before."""
        self._runtime_cache = None


def runtime_cache(trt: Any, chosen: Chosen) -> RuntimeCache | None:
    """The cache of these engines in the user's cache folder, or None: TensorRT's plans hold their kernels."""
    if trt.__name__ != "tensorrt_rtx":
        return None
    files = chosen.engines.manifest["files"]
    names = sorted(path.name for path in chosen.plans())
    key = hashlib.sha256("".join(files[name]["sha256"] for name in names).encode()).hexdigest()[:16]
    return RuntimeCache(cache_folder() / "tensorrt_rtx" / f"{key}.cache")
