"""The CUDA kernels over the case table: on a GPU where there is one, and always thread by thread on the CPU.

The emulated form is the same .cu files as C++: `kernel<<<grid, block, shared, stream>>>(...)` becomes a call of
cuda_emulator.hpp, which runs every CUDA thread as a fiber. It shows logic, barriers and indices, not speed.
"""

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cases import FULL, SMALL, Case
from m3ad_plugins import reference

ROOM = Path(__file__).parents[2] / "trt_plugins"
HERE = Path(__file__).parent
RNG = np.random.default_rng(0)
has_gpu = (
    shutil.which("nvidia-smi") is not None
    and subprocess.run(["nvidia-smi"], capture_output=True).returncode == 0
)

pytestmark = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="the kernels need CUDA's headers: no nvcc here"
)


def compile_for_gpu(folder: Path) -> Path:
    library = folder / "libkernels.so"
    sources = [str(path) for path in (*(ROOM / "cuda").glob("*.cu"), HERE / "kernels_c.cu")]
    options = ["-std=c++17", "-O3", "-arch=native", "-shared", "-Xcompiler=-fPIC", f"-I{ROOM / 'cuda'}"]
    subprocess.run(["nvcc", *options, *sources, "-o", str(library)], check=True)
    return library


def compile_emulated(folder: Path, arch: int) -> Path:
    dry = subprocess.run(
        ["nvcc", "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=False
    ).stderr
    includes = re.findall(r'"(-I[^"]+)"', dry)
    here = folder / str(arch)
    here.mkdir()
    for path in (*(ROOM / "cuda").iterdir(), HERE / "kernels_c.cu"):
        text = path.read_text()
        text = re.sub(r"(\w+)<<<(.*?)>>>\(", r"emulator::launch(\1, \2)(", text, flags=re.DOTALL)
        text = re.sub(
            r"extern __shared__ ([\w ]+) (\w+)\[\];", r"auto* \2 = emulator::dynamicShared<\1>();", text
        )
        text = text.replace('"../common/', f'"{ROOM / "common"}/')
        target = here / path.name
        if path.suffix == ".cu":
            target = target.with_suffix(".cpp")
            text = f'#include "cuda_emulator.hpp"\n#define __CUDA_ARCH__ {arch}\n{text}'
        target.write_text(text)
    library = folder / f"libemulated_{arch}.so"
    options = ["-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=off", "-w", f"-I{HERE}", *includes]
    sources = [str(path) for path in here.glob("*.cpp")]
    subprocess.run(["c++", *options, *sources, "-o", str(library)], check=True)
    return library


GPU = pytest.param("gpu", marks=pytest.mark.gpu)


@pytest.fixture(scope="module", params=["emulated sm_80", GPU])
def call(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    folder = tmp_path_factory.mktemp("kernels")
    if request.param == "gpu":
        if not has_gpu:
            pytest.skip("no NVIDIA GPU answers nvidia-smi")
        library = ctypes.CDLL(str(compile_for_gpu(folder)))
    else:
        library = ctypes.CDLL(str(compile_emulated(folder, int(request.param[-2:]) * 10)))

    def run(name: str, *arguments: object) -> None:
        plain = [
            ctypes.c_void_p(a.ctypes.data)
            if isinstance(a, np.ndarray)
            else ctypes.c_float(a)
            if isinstance(a, float)
            else a
            for a in arguments
        ]
        assert getattr(library, name)(*plain) == 0

    return run


def check_grouping(call: Callable[..., None], case: Case) -> None:
    points, count, groups, size = case.points, len(case.points), case.num_samples, case.group_size
    expected_idx = reference.farthest_point_sample(points, groups, case.min_norm_sq)
    expected, expected_knn = reference.knn_group(points, expected_idx, size)
    idx = np.full(groups, -7, np.int32)
    call("farthest_point_sample", idx, points, count, groups, float(case.min_norm_sq))
    np.testing.assert_array_equal(idx, expected_idx)
    for together in (False, True):
        knn_idx = np.full((groups, size), -7, np.int32)
        neighborhood = np.full((groups, size, 3), np.nan, np.float32)
        if together:
            idx[:] = -7
            sizes = (count, groups, float(case.min_norm_sq), size)
            call("point_group", idx, neighborhood, knn_idx, points, *sizes)
        else:
            call("knn_group", neighborhood, knn_idx, points, idx, count, groups, size)
        np.testing.assert_array_equal(idx, expected_idx)
        np.testing.assert_array_equal(knn_idx, expected_knn)
        np.testing.assert_array_equal(neighborhood, expected)


def check_interpolation(call: Callable[..., None], case: Case, width: int, dtype: type) -> None:
    centers = case.points[reference.farthest_point_sample(case.points, case.num_samples, case.min_norm_sq)]
    tokens = RNG.normal(0, 1, (len(centers), width)).astype(dtype)
    cloud, size = (case.points, case.point_pixel, centers), case.image_size
    for scored_pixel in (
        reference.scored_pixels(case.point_pixel, size),
        np.arange(0, size**2, 3, dtype=np.int32),
    ):
        expected = reference.token_interpolate(*cloud, tokens.astype(np.float32), scored_pixel, size)
        rows = np.full((len(scored_pixel), width), np.nan, dtype)
        sizes = (len(case.points), len(centers), width, len(scored_pixel), size, int(dtype is np.float16))
        call("token_interpolate", rows, *cloud, tokens, scored_pixel, *sizes)
        rtol = 2**-11 if dtype is np.float16 else 1e-5  # fp16: sums are fp32, rounded once
        np.testing.assert_allclose(rows.astype(np.float32), expected, rtol=rtol, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_grouping_kernels_equal_reference(call: Callable[..., None], case: Case) -> None:
    check_grouping(call, case)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_interpolation_kernels_equal_reference(call: Callable[..., None], case: Case, dtype: type) -> None:
    check_interpolation(call, case, 8, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("case", FULL, ids=str)
def test_full_size_kernels_equal_reference(call: Callable[..., None], case: Case) -> None:
    check_grouping(call, case)
    check_interpolation(call, case, 9, np.float32)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize(("rows", "width", "vectors"), [(1, 1, 1), (300, 7, 90), (5, 40, 33)])
def test_svm_kernels_equal_reference(
    call: Callable[..., None], kernel: str, rows: int, width: int, vectors: int
) -> None:
    x, support = (RNG.normal(0, 1, (count, width)).astype(np.float32) for count in (rows, vectors))
    coefficients, rho = RNG.normal(0, 1, vectors).astype(np.float32), np.float32([0.25])
    decision = np.full(rows, np.nan, np.float32)
    call(
        "one_class_svm",
        decision,
        x,
        support,
        coefficients,
        rho,
        rows,
        width,
        vectors,
        int(kernel == "rbf"),
        0.3,
    )
    expected = reference.one_class_svm(x, support, coefficients, 0.25, kernel, 0.3)
    np.testing.assert_allclose(decision, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("call", ["emulated sm_75", "emulated sm_80", GPU], indirect=True)
def test_grouping_and_interpolation_kernels_on_one_case(call: Callable[..., None]) -> None:
    case = SMALL[1]  # ties everywhere
    check_grouping(call, case)
    check_interpolation(call, case, 5, np.float32)
