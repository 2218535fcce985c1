"""`enqueue` of every plugin on real device memory: `python -m m3ad_plugins.gpu.enqueue FOLDER [--tensorrt HEADERS]`.

Builds the plugin library for the GPU of this machine and a small C++ host that calls `IPluginV3` itself, so neither
a builder nor a runtime of TensorRT is needed. Holds the outputs to the references and prints one JSON document.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from m3ad.contract import OPS
from m3ad.errors import M3adError

from m3ad_plugins.cuda_build import build_plugins
from m3ad_plugins.gpu.cases import FULL, OWN_ROWS, SMALL, Row, rows_on

SOURCE = Path(__file__).parent / "enqueue_host.cpp"
SYSTEM_HEADERS = [
    Path("/usr/include"),
    *(Path("/usr/include") / f"{cpu}-linux-gnu" for cpu in ("x86_64", "aarch64")),
]
REPEATS = 50


def headers(tensorrt: Path | None) -> Path | None:
    """The folder of NvInferRuntime.h: that of `--tensorrt`, or the system's; None if there is none."""
    folders = SYSTEM_HEADERS if tensorrt is None else [tensorrt / "include", tensorrt]
    return next((folder for folder in folders if (folder / "NvInferRuntime.h").is_file()), None)


def compile_host(folder: Path, include: Path) -> Path:
    """Compile the host with nvcc, which knows where CUDA's headers and runtime are.

    Raises:
        M3adError: nvcc refuses it.
    """
    host = folder / "enqueue_host"
    command = ["nvcc", "-std=c++17", "-O2", f"-isystem={include}", str(SOURCE), "-ldl", "-o", str(host)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise M3adError(f"nvcc cannot compile the host of the plugins:\n{done.stderr.strip()[-1500:]}")
    return host


def job_text(row: Row, outputs: Sequence[np.ndarray]) -> str:
    """A row in the words that the host reads."""
    kinds = {int: "int", float: "float", str: "text"}
    lines = [f"plugin {row.op} {OPS[row.op].version}"]
    lines += [f"field {kinds[type(value)]} {name} {value}" for name, value in row.attributes.items()]
    for kind, arrays in (("input", [*row.inputs.values()]), ("output", [*outputs])):
        lines += [f"{kind} {a.dtype} {a.ndim} {' '.join(map(str, a.shape))}" for a in arrays]
    return "\n".join(lines) + "\n"


def enqueue(host: Path, library: Path, row: Row, folder: Path, repeats: int = REPEATS) -> dict[str, float]:
    """Run a row through its plugin and hold the outputs to the reference.

    Returns:
        `workspace_bytes`, and `graph_ms` of a launch of the captured enqueue.

    Raises:
        M3adError: the host stops.
        AssertionError: the outputs differ from the reference's.
    """
    tokens = row.inputs.get("tokens")
    outputs = [np.empty(e.shape, e.dtype if tokens is None else tokens.dtype) for e in row.expected()]
    (folder / "job").write_text(job_text(row, outputs))
    (folder / "tensors").write_bytes(b"".join(np.ascontiguousarray(a).tobytes() for a in row.inputs.values()))
    files = [str(folder / name) for name in ("job", "tensors", "out")]
    command = [str(host), str(library), *files, str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise M3adError(f"{row}: {done.stderr.strip() or f'the host ended with {done.returncode}'}")
    written, start = (folder / "out").read_bytes(), 0
    found = []
    for output in outputs:
        found.append(np.frombuffer(written, output.dtype, output.size, start).reshape(output.shape))
        start += output.nbytes
    row.check(tuple(found))
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def main() -> None:
    """Build, run and print; what differs goes to stderr and ends with code 1."""
    parser = argparse.ArgumentParser(prog="python -m m3ad_plugins.gpu.enqueue", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tensorrt", type=Path)
    parser.add_argument("--architecture", help="of this machine's GPU, as in 89; all if left out")
    chosen = parser.parse_args()
    include = headers(chosen.tensorrt)
    try:
        if include is None:
            raise M3adError("no NvInferRuntime.h is here; name TensorRT's folder with --tensorrt")
        library = build_plugins(chosen.tensorrt, None, chosen.architecture, chosen.folder / "plugins")
        host = compile_host(chosen.folder, include)
        rows = [
            *OWN_ROWS,
            *rows_on(SMALL[1], 8),
            *rows_on(SMALL[11], 8, np.float16),
            *rows_on(FULL[-1], 1152),
        ]
        figures: dict[str, float] = {"rows held": len(rows)}
        for row in rows:
            taken = enqueue(host, library, row, chosen.folder)
            if row.name == FULL[-1].name:
                figures[f"{row.op} N={len(row.inputs['points'])} in a CUDA graph ms"] = taken["graph_ms"]
        print(json.dumps(figures))  # noqa: T201
    except (M3adError, AssertionError) as error:
        sys.exit(f"error: {' '.join(str(error).split())[:400]}")


if __name__ == "__main__":
    main()
