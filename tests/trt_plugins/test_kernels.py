"""The CUDA kernels over the case table: on a GPU where there is one, and always thread by thread on the CPU.

The emulated form is the same .cu files as C++: `kernel<<<grid, block, shared, stream>>>(...)` becomes a call of
cuda_emulator.hpp, which runs every CUDA thread as a fiber. It shows logic, barriers and indices, not speed. Two
accesses that no barrier orders fail a row even where its result is right (race_detector.cpp).
"""

import ctypes
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from cases import FULL, LAUNCHES, OWN_ROWS, SMALL, Case, Launch, Row, rows_on
from m3ad_plugins.farthest_point_sample.reference import farthest_point_sample
from m3ad_plugins.knn_group.reference import knn_group

SOURCES = Path(__file__).parents[2] / "trt_plugins" / "m3ad_plugins"
HERE = Path(__file__).parent
has_gpu = (
    shutil.which("nvidia-smi") is not None
    and subprocess.run(["nvidia-smi"], capture_output=True).returncode == 0
)

pytestmark = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="the kernels need CUDA's headers: no nvcc here"
)


def compile_for_gpu(folder: Path) -> Path:
    library = folder / "libkernels.so"
    sources = [str(path) for path in (*SOURCES.glob("*/kernel.cu"), HERE / "device.cu")]
    options = ["-std=c++17", "-O3", "-arch=native", "-shared", "-Xcompiler=-fPIC"]
    subprocess.run(["nvcc", *options, *sources, "-o", str(library)], check=True)
    return library


def compile_emulated(folder: Path, arch: int, without: Sequence[tuple[str, str, int]] = ()) -> Path:
    """The kernels as C++ over the emulator; `without` (file, text, n) leaves out the file's n-th such text."""
    dry = subprocess.run(
        ["nvcc", "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=False
    ).stderr
    includes = re.findall(r'"(-I[^"]+)"', dry)
    here = folder / str(arch)
    copied = [*SOURCES.glob("*/*.cu*"), *SOURCES.glob("common/*.hpp")]
    files = {path: path.relative_to(SOURCES) for path in copied}
    files[HERE / "device.cu"] = Path("device.cu")
    for path, place in files.items():
        text = path.read_text()
        for unwanted, n in [(text, n) for file, text, n in without if file == str(place)]:
            before = [match.start() for match in re.finditer(re.escape(unwanted), text)][n]
            text = text[:before] + text[before + len(unwanted) :]
        text = re.sub(r"(\w+)<<<(.*?)>>>\(", r"emulator::launch(\1, \2)(", text, flags=re.DOTALL)
        text = re.sub(
            r"extern __shared__ ([\w ]+) (\w+)\[\];", r"auto* \2 = emulator::dynamicShared<\1>();", text
        )
        target = here / place
        if path.suffix == ".cu":
            target = target.with_suffix(".cpp")
            text = f'#include "cuda_emulator.hpp"\n#define __CUDA_ARCH__ {arch}\n{text}'
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    library = folder / f"libemulated_{arch}.so"
    options = ["-std=c++17", "-O2", "-g1", "-fPIC", "-ffp-contract=off", "-w", f"-I{HERE}", *includes]
    # Only the compiler's half of ThreadSanitizer. What it calls is in race_detector.cpp, which must not be watched.
    watched = {str(path): "-fsanitize=thread" for path in here.rglob("*.cpp")}
    sources = {**watched, str(HERE / "race_detector.cpp"): "-fno-sanitize=thread"}
    objects = [str(here / f"{n}.o") for n in range(len(sources))]
    compilers = [
        subprocess.Popen(["c++", *options, how, "-c", source, "-o", made])
        for (source, how), made in zip(sources.items(), objects, strict=True)
    ]
    assert [compiler.wait() for compiler in compilers] == [0] * len(sources)
    subprocess.run(["c++", "-shared", *objects, "-o", str(library)], check=True)
    return library


class Kernels:
    """The launchers with arrays in and out: copied to the device, run, copied back."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.path = library
        if self.is_emulated:
            self.library.raceFirst.restype = ctypes.c_char_p

    @property
    def is_emulated(self) -> bool:
        return hasattr(self.library, "raceFirst")

    def race(self) -> str:
        """The first race of a kernel since it was last asked, its places as file:line; empty if none."""
        if not self.is_emulated:
            return ""

        def line(offset: re.Match[str]) -> str:
            command = ["addr2line", "-s", "-e", str(self.path), offset[1]]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]

        said = self.library.raceFirst().decode()
        self.library.raceForget()
        return re.sub(r"\+(0x[0-9a-f]+)", line, said)

    def to_device(self, host: np.ndarray) -> ctypes.c_void_p:
        device = ctypes.c_void_p()
        size = ctypes.c_size_t(host.nbytes)
        assert self.library.deviceCopy(ctypes.byref(device), host.ctypes.data_as(ctypes.c_void_p), size) == 0
        return device

    def launch(
        self,
        name: str,
        outputs: Sequence[np.ndarray],
        inputs: Sequence[np.ndarray],
        launch: Launch,
        workspace_of: str = "",
    ) -> None:
        """Call launch<name> and wait for it; the outputs are overwritten."""
        size_of = getattr(self.library, f"workspace{workspace_of or name}")
        size_of.restype = ctypes.c_size_t
        workspace = np.full(size_of(launch.workspace), 0xCD, np.uint8)
        arrays = (*outputs, *inputs, workspace)
        *tensors, scratch = devices = [self.to_device(array) for array in arrays]
        kinds = {bool: ctypes.c_bool, int: ctypes.c_int32, float: ctypes.c_float}
        plain = [kinds[type(value)](value) for value in launch.sizes_and_attributes]
        assert getattr(self.library, f"launch{name}")(*tensors, *plain, scratch, None) == 0
        for output, device in zip(outputs, tensors, strict=False):
            size = ctypes.c_size_t(output.nbytes)
            assert self.library.deviceRead(output.ctypes.data_as(ctypes.c_void_p), device, size) == 0
        assert self.race() == ""
        for device in devices:
            assert self.library.deviceFree(device) == 0

    def check(self, row: Row) -> None:
        """Run a row of the case table, its outputs filled with what is wrong before."""
        dtype = row.inputs["tokens"].dtype if "tokens" in row.inputs else None
        outputs = [np.full(e.shape, -7, dtype or e.dtype) for e in row.expected()]
        self.launch(row.op, outputs, [*row.inputs.values()], LAUNCHES[row.op](row.inputs, row.attributes))
        row.check(tuple(outputs))


def check_point_group(kernels: Kernels, case: Case) -> None:
    """Sampling and grouping in one launch, which is no op of its own."""
    count, groups, size = len(case.points), case.num_samples, case.group_size
    idx = farthest_point_sample(case.points, groups, case.min_norm_sq)
    expected = (idx, *knn_group(case.points, idx, size))
    found = [np.full(e.shape, -7, e.dtype) for e in expected]
    launch = Launch((count, groups, float(case.min_norm_sq), size), count)
    kernels.launch("PointGroup", found, [case.points], launch, workspace_of="KnnGroup")
    for got, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


GPU = pytest.param("gpu", marks=pytest.mark.gpu)


@pytest.fixture(scope="module", params=["emulated sm_80", GPU])
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    folder = tmp_path_factory.mktemp("kernels")
    if request.param != "gpu":
        return Kernels(compile_emulated(folder, int(request.param[-2:]) * 10))
    if not has_gpu:
        pytest.skip("no NVIDIA GPU answers nvidia-smi")
    return Kernels(compile_for_gpu(folder))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_kernels_equal_reference(kernels: Kernels, case: Case, dtype: type) -> None:
    for row in rows_on(case, 8, dtype):
        kernels.check(row)
    check_point_group(kernels, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", FULL, ids=str)
def test_full_size_kernels_equal_reference(kernels: Kernels, case: Case) -> None:
    for row in rows_on(case, 9):
        kernels.check(row)
    check_point_group(kernels, case)


@pytest.mark.parametrize("row", OWN_ROWS, ids=str)
def test_kernels_of_ops_without_a_cloud_equal_reference(kernels: Kernels, row: Row) -> None:
    kernels.check(row)


@pytest.mark.parametrize("kernels", ["emulated sm_75", "emulated sm_80", GPU], indirect=True)
def test_kernels_on_one_case(kernels: Kernels) -> None:
    case = SMALL[1]  # ties everywhere
    for row in rows_on(case, 5):
        kernels.check(row)
    check_point_group(kernels, case)


@pytest.fixture(scope="module")
def unordered(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """The kernels without a barrier of the block and one of the warp."""
    left_out = [
        ("farthest_point_sample/kernel.cu", "__syncthreads();", 2),
        ("knn_group/kernel.cu", "__syncwarp();", 4),
    ]
    return Kernels(compile_emulated(tmp_path_factory.mktemp("unordered"), 800, left_out))


@pytest.mark.parametrize(
    ("op", "place"),
    [
        ("FarthestPointSample", r"block 0 thread \d+ at kernel\.cpp:\d+, then (?:read|write) by block 0"),
        ("KnnGroup", r"block (\d+) thread \d+ at kernel\.cpp:\d+, then (?:read|write) by block \1"),
    ],
)
def test_missing_barrier_is_found(unordered: Kernels, op: str, place: str) -> None:
    row = next(row for row in rows_on(SMALL[0], 5) if row.op == op)
    with pytest.raises(AssertionError, match=f"shared memory: (?:write|read) by {place}"):
        unordered.check(row)
