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
from onnx import TensorProto, helper, numpy_helper

HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def emulated(model: onnx.ModelProto) -> onnx.ModelProto:
    """An fp32 model whose values are those of a model with half types: after each half node y = fp32(half(y)).

    Sums inside one node stay fp32, as in tensor cores.
    """
    inferred = onnx.shape_inference.infer_shapes(model)
    types = {v.name: v.type.tensor_type.elem_type for v in inferred.graph.value_info}
    halves = {name: kind for name, kind in types.items() if kind in HALVES}
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    for initializer in graph.initializer:
        if initializer.data_type in HALVES:
            values = numpy_helper.to_array(initializer).astype(np.float32)
            initializer.CopyFrom(numpy_helper.from_array(values, initializer.name))
    nodes = []
    for node in graph.node:
        rounded = [(i, name) for i, name in enumerate(node.output) if name in halves]
        if node.op_type == "Cast" and rounded:
            nodes += _round(node.input[0], node.output[0], halves[node.output[0]])
            continue
        for i, name in rounded:
            node.output[i] = f"{name}.exact"
        nodes.append(node)
        for _, name in rounded:
            nodes += _round(f"{name}.exact", name, halves[name])
    copied = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(copied)
    return result


def _round(source: str, target: str, element: int) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Cast", [source], [f"{target}.rounded"], name=f"{target}/down", to=element),
        helper.make_node("Cast", [f"{target}.rounded"], [target], name=f"{target}/up", to=TensorProto.FLOAT),
    ]


@contextmanager
def runnable(folder: Path, is_half: bool) -> Iterator[Path]:
    """The folder of a bundle's graphs, or one with emulated copies of those that the CPU runs."""
    if not is_half:
        yield folder
        return
    with tempfile.TemporaryDirectory() as copies:
        for path in folder.glob("*.onnx"):
            model = onnx.load(path)
            if not model.functions:  # what holds custom ops is composed for GPUs
                onnx.save(emulated(model), Path(copies) / path.name)
        yield Path(copies)
