"""The plugins' own `enqueue`, called by the C++ host that a machine with a GPU runs, here over emulated kernels.

Wants TensorRT's headers, of 10 or 11, as test_registry.py does; no TensorRT library and no GPU.
"""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from emulated import HERE, compile_emulated, cuda_includes
from m3ad.errors import M3adError
from m3ad_plugins.build import PACKAGE
from m3ad_plugins.gpu import enqueue
from m3ad_plugins.gpu.cases import OWN_ROWS, SMALL, Row, rows_on

NAMED = [os.environ.get(f"M3AD_TENSORRT_HEADERS_{major}") for major in ("11", "10")]
INCLUDE = next(filter(None, (enqueue.headers(Path(n) if n else None) for n in NAMED)), None)

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="the kernels need CUDA's headers: no nvcc here"),
    pytest.mark.skipif(
        INCLUDE is None,
        reason="no headers of TensorRT: M3AD_TENSORRT_HEADERS_11 is not set (README of trt_plugins)",
    ),
]


@pytest.fixture(scope="module")
def host_and_library(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The host and the plugins, each over cuda_emulator.hpp: device memory, streams and graphs are the host's."""
    folder = tmp_path_factory.mktemp("enqueue")
    plugins = [str(path) for path in (*PACKAGE.glob("*/plugin.cpp"), PACKAGE / "plugin" / "library.cpp")]
    library = compile_emulated(
        folder, 800, also=["-includecuda_emulator.hpp", f"-isystem{INCLUDE}", *plugins]
    )
    host = folder / "enqueue_host"
    command = ["c++", "-std=c++17", "-O1", "-w", "-rdynamic", f"-I{HERE}", "-include", "cuda_emulator.hpp"]
    command += [f"-isystem{INCLUDE}", *cuda_includes(), str(enqueue.SOURCE), str(HERE / "race_detector.cpp")]
    subprocess.run([*command, "-ldl", "-o", str(host)], check=True)
    return host, library


@pytest.mark.parametrize(
    "row",
    [OWN_ROWS[1], OWN_ROWS[4], *OWN_ROWS[7:9], *rows_on(SMALL[1], 8), *rows_on(SMALL[11], 8, np.float16)[2:]],
    ids=str,
)
def test_enqueue_equals_reference(host_and_library: tuple[Path, Path], row: Row, tmp_path: Path) -> None:
    host, library = host_and_library
    figures = enqueue.enqueue(host, library, row, tmp_path, repeats=1)
    assert figures["workspace_bytes"] > 0


def test_what_a_plugin_refuses_is_told(host_and_library: tuple[Path, Path], tmp_path: Path) -> None:
    host, library = host_and_library
    good = rows_on(SMALL[1], 5)[0]
    bad = Row(good.op, good.name, good.inputs, {**good.attributes, "min_norm_sq": -1.0})
    with pytest.raises(
        M3adError,
        match=r"(?s)ties: .*min_norm_sq: expected at least 0, got -1.*createPlugin refused the attr",
    ):
        enqueue.enqueue(host, library, bad, tmp_path)
