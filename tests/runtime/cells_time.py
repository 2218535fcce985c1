"""How long M3DM's cells take: a graph of standard operations, as bundles had it, and the op, in turn.

python tests/runtime/cells_time.py BUNDLE DATA, BUNDLE one from before the op had an `output_size`, DATA a category. Of
the first test frame's real tokens: elapsed and processor time, medians of the rounds and of the rounds' ratios.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
from m3ad.bundle import Bundle
from m3ad.frames import find_samples, read_sample
from m3ad.preprocess import prepare
from m3ad_plugins import native
from m3ad_runtime.banks import Cells
from m3ad_runtime.onnx_graph import OnnxGraph
from m3ad_runtime.pipeline import model_arrays
from m3ad_runtime.stages import cpu_stage

ROUNDS = 5


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Elapsed and processor milliseconds."""
    start, cpu = time.perf_counter(), time.process_time()
    work()
    return (time.perf_counter() - start) * 1e3, (time.process_time() - cpu) * 1e3


def main(path: str, data: str) -> None:
    bundle, threads = Bundle.open(Path(path)), native.threads()
    frame = prepare(read_sample(find_samples(Path(data), "test")[0]), bundle.preprocessing)
    arrays = model_arrays(frame)
    arrays |= cpu_stage("xyz_extractor", bundle.path / "onnx", bundle.contract, threads)(arrays)
    graph, op = OnnxGraph(bundle.file("onnx/cells.onnx"), threads), Cells(56)
    before, after = graph(arrays)["xyz_cells"], op(arrays)["xyz_cells"]
    apart = np.abs(before - after).max() / np.abs(before).max()
    filled = after.any(axis=1)
    assert np.array_equal(filled, before.any(axis=1))
    rounds = [(timed(lambda: graph(arrays)), timed(lambda: op(arrays))) for _ in range(ROUNDS)]
    print(
        f"{len(frame.points)} points, {filled.sum()} cells, {threads} threads, apart by {apart:.1e} of the largest"
    )
    for k, kind in enumerate(("elapsed", "processor")):
        old, new = (median(each[i][k] for each in rounds) for i in range(2))
        ratio = median(a[k] / b[k] for a, b in rounds)
        print(f"{kind}: graph {old:.1f} ms, op {new:.1f} ms, ratio {ratio:.1f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
