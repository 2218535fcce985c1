"""The part of the double of a GPU that only TensorRT-RTX has: runtime configurations and the cache of its kernels.

A context compiles its plan's kernels at its first run and puts them into the cache it was made with. A cache is read
back only by the version that wrote it, whole or not at all, and outlives the contexts that use it.
"""

import json
import weakref
from types import SimpleNamespace
from typing import Any

STRATEGIES = SimpleNamespace(LAZY=0, EAGER=1, NONE=2)


class RuntimeCache:
    """trt.IRuntimeCache."""

    def __init__(self, double: Any, version: str) -> None:
        self.double, self.version = double, version
        self.kernels: set[str] = set()
        double.objects.append(weakref.ref(self))

    def deserialize(self, blob: bytes) -> bool:
        try:
            header = json.loads(blob)
        except ValueError:
            return False
        if header["version"] != self.version:
            return False
        self.kernels = set(header["kernels"])
        return True

    def serialize(self) -> memoryview:
        return memoryview(json.dumps({"version": self.version, "kernels": sorted(self.kernels)}).encode())

    def compile(self, plan: str) -> None:
        if plan not in self.kernels:
            self.double.compiled.append(plan)
            self.kernels.add(plan)

    def __del__(self) -> None:
        users = [o for ref in self.double.objects if (o := ref()) is not None and getattr(o, "cache", None)]
        if any(user.cache() in (None, self) for user in users):
            self.double.violations.append("a runtime cache is gone before a context that uses it")


class RuntimeConfig:
    """trt.IRuntimeConfig."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.cache = engine, None
        self.dynamic_shapes_kernel_specialization_strategy = STRATEGIES.LAZY
        self.strategy = 0

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache(self.engine.double, self.engine.trt.__version__)

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True

    def set_execution_context_allocation_strategy(self, strategy: int) -> None:
        self.strategy = strategy
