"""The plugin library in the real registries of TensorRT 10 and 11, on a machine without a GPU.

Wants CMake, nvcc, and for each major two paths in the environment (README.md of trt_plugins says where to get them):
M3AD_TENSORRT_HEADERS_<major>, a folder with include/NvInferRuntime.h, and M3AD_TENSORRT_LEAN_<major>, the file
libnvinfer_lean.so.<major> of the wheel tensorrt-lean-cu13.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "trt_plugins" / "m3ad_plugins"
MAJORS = ("10", "11")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("nvcc") is None or shutil.which("cmake") is None,
        reason="the plugins are built with CMake and nvcc, which are not here",
    ),
]


def given(kind: str, major: str) -> Path:
    name = f"M3AD_TENSORRT_{kind}_{major}"
    if name not in os.environ:
        pytest.skip(f"{name} is not set; trt_plugins/README.md says what it names")
    return Path(os.environ[name])


def run(*command: object) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory):
    """Builds for the headers of a major, once; one architecture, the device code is not run."""
    folders: dict[str, Path] = {}

    def build(major: str) -> Path:
        if major not in folders:
            folder = tmp_path_factory.mktemp(f"plugins{major}")
            headers = given("HEADERS", major)
            run(
                *("cmake", "-S", SOURCES, "-B", folder, f"-DTensorRT_ROOT={headers}"),
                "-DM3AD_CUDA_ARCHITECTURES=87",
            )
            run("cmake", "--build", folder, "--target", "all", "registry_check")
            folders[major] = folder
        return folders[major]

    return build


EXPECTED = """
creator FarthestPointSample 1
plugin FarthestPointSample 2 m3ad fields num_samples=1024 min_norm_sq=0.001000
shapes 0
output int32 [1024]
formats 1 int8 0
configure 0
workspace 1
few_points -1
attached 1
creator FarthestPointSample 1
plugin FarthestPointSample 2 m3ad fields num_samples=1024 min_norm_sq=0.000000
shapes 0
output int32 [1024]
formats 1 int8 0
configure 0
workspace 1
few_points -1
attached 1
creator KnnGroup 1
plugin KnnGroup 1 m3ad fields group_size=32
shapes 0
output fp32 [1024, 32, 3]
output int32 [1024, 32]
formats 1 int8 0
configure 0
workspace 1
few_points -1
attached 1
creator TokenInterpolate 1
plugin TokenInterpolate 2 m3ad fields image_size=224 output_size=0
shapes 0
output fp32 [R, 1152]
formats 1 int8 0
configure 0
workspace 1
few_points 0
attached 1
creator TokenInterpolate 1
plugin TokenInterpolate 2 m3ad fields image_size=224 output_size=56
shapes 0
output fp16 [R, 1152]
formats 1 int8 0
configure 0
workspace 1
few_points 0
attached 1
creator OneClassSvm 1
plugin OneClassSvm 1 m3ad fields kernel=linear gamma=0.500000
shapes 0
output fp32 [N]
formats 1 int8 0
configure 0
workspace 1
few_points 0
attached 1
creator OneClassSvm 1
plugin OneClassSvm 1 m3ad fields kernel=rbf gamma=0.500000
shapes 0
output fp32 [N]
formats 1 int8 0
configure 0
workspace 1
few_points 0
attached 1
creator NearestRow 1
plugin NearestRow 1 m3ad fields
shapes 0
output fp32 [N]
output int32 [N]
formats 1 int8 0
configure 0
workspace 1
few_points 0
attached 1
refused FarthestPointSample 1
refused FarthestPointSample 1
refused KnnGroup 1
refused TokenInterpolate 1
refused TokenInterpolate 1
refused OneClassSvm 1
"""
TEXTS = (
    "num_samples is 1024 but there are only N = 8 points",
    "group_size is 32 but there are only N = 8 points",
    "num_samples: expected at least 1, got 0",
    "attribute num_samples: expected an integer",
    "group_size: expected 1..4064, got 5000",
    "image_size: expected 3..4096, got 0",
    "output_size: expected a quarter of image_size 224 up to it, got 55",
    "kernel: expected linear or rbf, got 'poly'",
)


def check(output: str) -> None:
    # The lean runtime says that there is no GPU; every other line is ours.
    facts = [line.rstrip() for line in output.splitlines() if not line.startswith(("error ", "m3ad::"))]
    assert facts == ["loaded 1", *EXPECTED.split("\n")[1:-1]]
    for text in TEXTS:
        assert text in output


@pytest.mark.parametrize("runtime", MAJORS)
@pytest.mark.parametrize("headers", MAJORS)
def test_one_library_loads_into_every_registry(built, headers: str, runtime: str) -> None:
    library = built(headers) / "libm3ad_plugins.so"
    check(run(built(runtime) / "registry_check", given("LEAN", runtime), "core", library))


@pytest.mark.parametrize("major", MAJORS)
def test_shim_registers_on_plain_dlopen(built, major: str) -> None:
    shim = built(major) / f"libm3ad_plugins_trt{major}.so"
    output = run(built(major) / "registry_check", given("LEAN", major), "shim", shim)
    assert "shim_again 1\n" in output
    check(output.replace("shim_again 1\n", ""))


def test_shim_of_another_major_says_so(built) -> None:
    shim = built("11") / "libm3ad_plugins_trt11.so"
    output = run(built("10") / "registry_check", given("LEAN", "10"), "shim", shim)
    assert "libnvinfer.so.11 is neither loaded nor found; is this the shim of another TensorRT?" in output
    assert "creator KnnGroup 0" in output


def test_library_needs_no_symbol_of_tensorrt(built) -> None:
    library = built("10") / "libm3ad_plugins.so"
    assert "nvinfer" not in run("readelf", "--dynamic", library)
    undefined = run("nm", "--dynamic", "--undefined-only", library)
    assert not [line for line in undefined.splitlines() if "nvinfer" in line or "getPlugin" in line]


def test_missing_headers_leave_the_kernels(tmp_path: Path) -> None:
    configured = run(
        "cmake", "-S", SOURCES, "-B", tmp_path, "-DTensorRT_ROOT=/nowhere", "-DM3AD_CUDA_ARCHITECTURES=87;999"
    )
    assert "does not know sm_999: left out" in configured
    assert "No TensorRT headers (NvInferRuntime.h): the plugins are left out." in configured
    run("cmake", "--build", tmp_path, "--target", "m3ad_kernels")
