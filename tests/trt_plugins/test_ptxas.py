"""What nvcc makes of the kernels for each architecture: registers, shared memory, spills, roundings. Runs nothing.

Compiled once for the sources and the compiler there are; the report is kept in build/.
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from m3ad_plugins.build import hash_of_files

SOURCES = Path(__file__).parents[2] / "trt_plugins" / "m3ad_plugins"
CACHE = Path(__file__).parents[2] / "build" / "ptxas"
REGISTERS = 65536  # of a block, on every architecture; given out in eights to each thread
SHARED_BYTES = 48 << 10  # of a block that asks for no more
EXACT = ("farthest_point_sample", "knn_group")  # their indices must be the reference's
FUSED = re.compile(r"\b(?:fma|mad)(?:\.\w+)*\.f32|\b(?:mul|add|sub)(?:\.ftz)?\.f32")
COMPILED = re.compile(
    r"Compiling entry function '(\w+)' for 'sm_(\w+)'\n.*\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads\n.*Used (\d+) registers(?:.*?, (\d+) bytes smem)?"
)

pytestmark = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="kernels are compiled with nvcc: none here"
)


def architectures() -> list[str]:
    """Those of the build that this nvcc knows."""
    listed = re.search(r'M3AD_CUDA_ARCHITECTURES "([\d;]+)"', (SOURCES / "CMakeLists.txt").read_text())
    known = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    assert listed is not None
    return [sm for sm in listed[1].split(";") if f"sm_{sm}\n" in known]


def compile_op(
    source: Path, work: Path, standard: tuple[str, ...] = ("-std=c++17", "-O3")
) -> dict[str, object]:
    """Every kernel of a file on every architecture, and how its single-precision operations round."""
    codes = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in architectures()]
    command = ["nvcc", *standard, *codes, "-Xptxas=-v", "--threads=2", "--keep", f"--keep-dir={work}"]
    command += ["-c", "-o", str(work / "op.o"), str(source)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    kernels = []
    for name, sm, *figures in COMPILED.findall(said):
        ptx = (work / f"{source.stem}.compute_{sm}.ptx").read_text()
        body = ptx[ptx.index(f".entry {name}(") :]
        bounds = re.search(r"^\.maxntid (\d+)", body[: body.index("\n{")], re.MULTILINE)
        keys = ("stack", "spill_stores", "spill_loads", "registers", "shared")
        threads = int(bounds[1]) if bounds else None
        plain = re.search(r"(?<=\d)[A-Za-z]+Kernel", name)
        kernels.append(
            {"kernel": plain[0] if plain else name, "sm": sm, "threads": threads}
            | {key: int(figure or 0) for key, figure in zip(keys, figures, strict=True)}
        )
    fused = {
        sm: FUSED.findall((work / f"{source.stem}.compute_{sm}.ptx").read_text()) for sm in architectures()
    }
    return {"kernels": kernels, "fused": {sm: sorted({*found}) for sm, found in fused.items()}}


@pytest.fixture(scope="module")
def report() -> dict[str, dict]:
    """Per op, what `compile_op` found."""
    files = sorted([*SOURCES.glob("*/*.cu*"), *SOURCES.glob("common/*.hpp"), Path(__file__)])
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    kept = CACHE / f"{hash_of_files(files, version, *architectures())}.json"
    if not kept.is_file():
        found = {}
        for source in sorted(SOURCES.glob("*/kernel.cu")):
            with tempfile.TemporaryDirectory() as work:
                found[source.parent.name] = compile_op(source, Path(work))
        kept.parent.mkdir(parents=True, exist_ok=True)
        written = kept.with_suffix(f".{os.getpid()}")
        written.write_text(json.dumps(found, indent=1))
        written.replace(kept)
    return json.loads(kept.read_text())


def complaints(kernel: dict) -> list[str]:
    """What a kernel does that a launch would pay for, or fail on."""
    said = [f"{key} {kernel[key]} bytes" for key in ("stack", "spill_stores", "spill_loads") if kernel[key]]
    if kernel["threads"] is None:
        return [*said, "no __launch_bounds__"]
    registers = (kernel["registers"] + 7) // 8 * 8 * kernel["threads"]
    if registers > REGISTERS:
        said.append(f"{kernel['threads']} threads want {registers} registers")
    if kernel["shared"] > SHARED_BYTES:
        said.append(f"{kernel['shared']} bytes of shared memory")
    return said


def test_every_kernel_fits_its_launch(report: dict[str, dict]) -> None:
    kernels = [kernel for op in report.values() for kernel in op["kernels"]]
    declared = sum(path.read_text().count("__global__ void") for path in SOURCES.glob("*/*.cu*"))
    assert len({k["kernel"] for k in kernels}) == declared
    assert {k["sm"] for k in kernels} == {*architectures()}
    assert [f"{k['kernel']} sm_{k['sm']}: {c}" for k in kernels for c in complaints(k)] == []


@pytest.mark.parametrize("op", EXACT)
def test_distances_of_sampling_and_grouping_round_at_every_step(report: dict[str, dict], op: str) -> None:
    # A product without a rounding of its own may be fused with the sum after it, by nvcc or by ptxas.
    assert report[op]["fused"] == {sm: [] for sm in architectures()}


def test_what_the_gate_must_refuse_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "planted.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024) planted(float* y, float const* x, int n) {\n"
        "    float kept[80];\n"
        "    for (int i = 0; i < 80; ++i) kept[i] = x[i * n + threadIdx.x] * x[i];\n"
        "    __syncthreads();\n"
        "    for (int i = 0; i < n; ++i) y[i * n + threadIdx.x] = kept[(i * 7) % 80] + kept[i % 80] * x[i];\n"
        "}\n"
    )
    found = compile_op(source, tmp_path)
    assert all("stack 3" in complaints(kernel)[0] for kernel in found["kernels"])
    assert all("fma.rn.f32" in fused for fused in found["fused"].values())
