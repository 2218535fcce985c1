"""The CUDA kernels over the case table: on a GPU where there is one, and always thread by thread on the CPU."""

import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_input, make_tiny_detector
from emulated import EmulatedKernels, compile_emulated
from m3ad_export.baselines import graphed
from m3ad_export.baselines.forms import dense
from m3ad_export.baselines.graphed import require_same_map, with_ops
from m3ad_plugins.gpu.case_table import check_table
from m3ad_plugins.gpu.cases import FULL, OWN_ROWS, SMALL, Case, Row, rows_on
from m3ad_plugins.gpu.kernels import Kernels, compile_kernels

has_gpu = (
    shutil.which("nvidia-smi") is not None
    and subprocess.run(["nvidia-smi"], capture_output=True).returncode == 0
)

pytestmark = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="the kernels need CUDA's headers: no nvcc here"
)


GPU = pytest.param("gpu", marks=pytest.mark.gpu)


@pytest.fixture(scope="module", params=["emulated sm_80", GPU])
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    folder = tmp_path_factory.mktemp("kernels")
    if request.param != "gpu":
        return EmulatedKernels(compile_emulated(folder, int(request.param[-2:]) * 10))
    if not has_gpu:
        pytest.skip("no NVIDIA GPU answers nvidia-smi")
    return Kernels(compile_kernels(folder))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_kernels_equal_reference(kernels: Kernels, case: Case, dtype: type) -> None:
    for row in rows_on(case, 8, dtype):
        kernels.check(row)
    kernels.check_point_group(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", FULL, ids=str)
def test_full_size_kernels_equal_reference(kernels: Kernels, case: Case) -> None:
    for row in rows_on(case, 9):
        kernels.check(row)
    kernels.check_point_group(case)


@pytest.mark.parametrize("row", OWN_ROWS, ids=str)
def test_kernels_of_ops_without_a_cloud_equal_reference(kernels: Kernels, row: Row) -> None:
    kernels.check(row)


@pytest.mark.parametrize("kernels", ["emulated sm_75", "emulated sm_80", GPU], indirect=True)
def test_kernels_on_one_case(kernels: Kernels) -> None:
    assert check_table(kernels, few=True) == {"rows held": 28}


@torch.inference_mode()
def test_frame_in_pytorch_takes_the_launchers(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    # Tensors of the CPU are device memory to the emulator.
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=None))
    if not isinstance(kernels, EmulatedKernels):
        pytest.skip("m3ad-plugins gpu measures it")
    detector, frame = make_tiny_detector(), make_input(1100)
    inputs = [torch.from_numpy(a) for a in (frame.image, frame.points, frame.point_pixel, frame.scored_pixel)]
    found = with_ops(detector, graphed.Kernels(kernels.path))(*inputs)
    assert require_same_map(found, dense(detector)(*inputs[:3])) < 1e-5


@pytest.fixture(scope="module")
def unordered(tmp_path_factory: pytest.TempPathFactory) -> EmulatedKernels:
    """The kernels without a barrier of the block and one of the warp."""
    left_out = [
        ("farthest_point_sample/kernel.cu", "__syncthreads();", 2),
        ("knn_group/kernel.cu", "__syncwarp();", 4),
    ]
    return EmulatedKernels(compile_emulated(tmp_path_factory.mktemp("unordered"), 800, left_out))


@pytest.mark.parametrize(
    ("op", "place"),
    [
        ("FarthestPointSample", r"block 0 thread \d+ at kernel\.cpp:\d+, then (?:read|write) by block 0"),
        ("KnnGroup", r"block (\d+) thread \d+ at kernel\.cpp:\d+, then (?:read|write) by block \1"),
    ],
)
def test_missing_barrier_is_found(unordered: EmulatedKernels, op: str, place: str) -> None:
    row = next(row for row in rows_on(SMALL[0], 5) if row.op == op)
    with pytest.raises(AssertionError, match=f"shared memory: (?:write|read) by {place}"):
        unordered.check(row)
