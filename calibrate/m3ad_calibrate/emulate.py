"""Half precision as a GPU rounds it, on a CPU that has no such kernels.

ONNX Runtime runs fp16 nodes on CPUs in fp32 and drops the casts between neighbours, so its result is better than any
fp16 engine's; bf16 it does not run at all. Here every value that a half node makes is rounded.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from m3ad.method import Method
from m3ad_export.graphs.surgery import cast, edited, element_type, load_graph
from onnx import TensorProto

HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def emulated(model: onnx.ModelProto) -> onnx.ModelProto:
    """An fp32 model whose values are those of a model with half types: after each half node y = fp32(half(y)).

    Sums inside one node stay fp32, as in tensor cores.
    """
    return edited(onnx.shape_inference.infer_shapes(model), _round_halves)


def _round_halves(graph: gs.Graph) -> None:
    halves = {t.name: kind for t in graph.tensors().values() if (kind := element_type(t)) in HALVES}
    nodes: list[gs.Node] = []
    for tensor in graph.tensors().values():
        if tensor.name in halves and isinstance(tensor, gs.Constant):
            tensor.values = tensor.values.astype(np.float32)
    for node in graph.nodes:
        nodes.append(node)
        for i, tensor in enumerate(node.outputs):
            if tensor.name in halves:
                rounded = gs.Variable(f"{tensor.name}.rounded")
                if node.op == "Cast":
                    node.outputs[i], node.name = rounded, f"{rounded.name}/Cast"
                else:
                    node.outputs[i] = gs.Variable(f"{tensor.name}.exact")
                    nodes.append(cast(node.outputs[i], rounded, halves[tensor.name]))
                nodes.append(cast(rounded, tensor, TensorProto.FLOAT))
    graph.nodes = nodes


@contextmanager
def runnable(folder: Path, method: Method, is_half: bool) -> Iterator[Path]:
    """The folder of a bundle's graphs, or one with emulated copies of those that the CPU runs, weights beside them."""
    if not is_half:
        yield folder
        return
    with tempfile.TemporaryDirectory() as copies:
        for file in dict.fromkeys(file for form in method.cpu.values() for file in form.files):
            source, copy = folder / file, Path(copies) / file
            if not source.exists():
                continue  # of a layout that was left out
            if source.suffix == ".onnx":
                onnx.save(emulated(load_graph(source)), copy)
            else:
                copy.symlink_to(source.absolute())
        yield Path(copies)
