"""The CUDA launchers called with arrays: copied to the device, run, copied back; no TensorRT takes part."""

import ctypes
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from m3ad.errors import M3adError
from numpy.typing import NDArray

from m3ad_plugins.build import PACKAGE
from m3ad_plugins.farthest_point_sample.reference import farthest_point_sample
from m3ad_plugins.gpu.cases import LAUNCHES, Case, Launch, Row
from m3ad_plugins.knn_group.reference import knn_group

Array = NDArray[Any]
DEVICE_SOURCE = Path(__file__).parent / "device.cu"


def compile_kernels(folder: Path, architecture: str = "native") -> Path:
    """Compile every launcher and `device.cu` into one library, for this machine's GPU or for `sm_89` and the like.

    Raises:
        M3adError: nvcc refuses them.
    """
    library = folder / "libkernels.so"
    sources = [str(path) for path in (*sorted(PACKAGE.glob("*/kernel.cu")), DEVICE_SOURCE)]
    options = ["-std=c++17", "-O3", "-lineinfo", f"-arch={architecture}", "-shared", "-Xcompiler=-fPIC"]
    done = subprocess.run(
        ["nvcc", *options, *sources, "-o", str(library)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise M3adError(f"nvcc cannot compile the kernels for {architecture}:\n{done.stderr.strip()[-1500:]}")
    return library


class Kernels:
    """The launchers of a library that `compile_kernels` made."""

    def __init__(self, library: Path) -> None:
        self.path = library
        self.library = ctypes.CDLL(str(library))

    def launch(
        self,
        name: str,
        outputs: Sequence[Array],
        inputs: Sequence[Array],
        launch: Launch,
        workspace_of: str = "",
        repeats: int = 0,
    ) -> float:
        """Call launch<name> and wait for it; the outputs are overwritten.

        Args:
            name: of the launcher.
            outputs: what it writes.
            inputs: what it reads.
            launch: what it takes besides.
            workspace_of: the launcher whose workspace it takes, if not its own.
            repeats: how often it is called again, to be timed.

        Returns:
            Milliseconds of a repeated call, 0 without any.
        """
        size_of = getattr(self.library, f"workspace{workspace_of or name}")
        size_of.restype = ctypes.c_size_t
        workspace = np.full(size_of(launch.workspace), 0xCD, np.uint8)
        *tensors, scratch = devices = [self._to_device(a) for a in (*outputs, *inputs, workspace)]
        kinds: dict[type, Any] = {bool: ctypes.c_bool, int: ctypes.c_int32, float: ctypes.c_float}
        plain = [kinds[type(value)](value) for value in launch.sizes_and_attributes]

        def call() -> None:
            self._require(getattr(self.library, f"launch{name}")(*tensors, *plain, scratch, None), name)

        call()
        self._require(self.library.deviceWait(), name)
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        self._require(self.library.deviceWait(), name)
        taken = time.perf_counter() - started
        for output, device in zip(outputs, tensors, strict=False):
            size = ctypes.c_size_t(output.nbytes)
            self._require(self.library.deviceRead(output.ctypes.data_as(ctypes.c_void_p), device, size), name)
        for device in devices:
            self._require(self.library.deviceFree(device), name)
        return taken / repeats * 1e3 if repeats else 0.0

    def check(self, row: Row, repeats: int = 0) -> float:
        """Run a row of the case table, its outputs filled with what is wrong before; milliseconds of a repeated call.

        Raises:
            AssertionError: the outputs differ from the reference's.
        """
        dtype = row.inputs["tokens"].dtype if "tokens" in row.inputs else None
        outputs = [np.full(e.shape, -7, dtype or e.dtype) for e in row.expected()]
        launch = LAUNCHES[row.op](row.inputs, row.attributes)
        taken = self.launch(row.op, outputs, [*row.inputs.values()], launch, repeats=repeats)
        row.check(tuple(outputs))
        return taken

    def check_point_group(self, case: Case, repeats: int = 0) -> float:
        """Sampling and grouping in one launch, which is no op of its own.

        Raises:
            AssertionError: the outputs differ from the references'.
        """
        count, groups, size = len(case.points), case.num_samples, case.group_size
        idx = farthest_point_sample(case.points, groups, case.min_norm_sq)
        expected = (idx, *knn_group(case.points, idx, size))
        found = [np.full(e.shape, -7, e.dtype) for e in expected]
        launch = Launch((count, groups, float(case.min_norm_sq), size), count)
        taken = self.launch(
            "PointGroup", found, [case.points], launch, workspace_of="KnnGroup", repeats=repeats
        )
        for got, wanted in zip(found, expected, strict=True):
            np.testing.assert_array_equal(got, wanted)
        return taken

    def _to_device(self, host: Array) -> ctypes.c_void_p:
        device = ctypes.c_void_p()
        size = ctypes.c_size_t(host.nbytes)
        pointer = host.ctypes.data_as(ctypes.c_void_p)
        self._require(self.library.deviceCopy(ctypes.byref(device), pointer, size), "cudaMalloc")
        return device

    @staticmethod
    def _require(status: int, what: str) -> None:
        if status != 0:
            raise M3adError(f"{what} failed with CUDA error {status}")
