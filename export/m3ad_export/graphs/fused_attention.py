"""softmax(s q k^T) v as one node of ONNX Runtime's, for a graph that nothing but a CPU runs.

Its kernel works through blocks of keys with a running maximum and sum (Dao et al. 2022, arXiv 2205.14135), so that the
[heads, T, T] weights are never written out. No other runtime knows the node: graphs for engines keep the parts.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import helper, shape_inference

from m3ad_export.graphs.surgery import edited

DOMAIN, NODE = "com.microsoft", "MultiHeadAttention"
# From the products back to the layer that makes q, k and v side by side, as `nets.vit.Attention` is exported.
QUERY = ("Mul", "Squeeze", "Slice", "Transpose", "Reshape")
KEY = ("Transpose", "Squeeze", "Slice", "Transpose", "Reshape")
VALUE = ("Squeeze", "Slice", "Transpose", "Reshape")


def fused_attention(encoder: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of an encoder in which each fp32 attention is one node; what has another form stays as it is."""
    model = edited(shape_inference.infer_shapes(encoder), _fuse)
    is_used = any(node.domain == DOMAIN for node in model.graph.node)
    if is_used and all(entry.domain != DOMAIN for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return model


def _fuse(graph: gs.Graph) -> None:
    fused: dict[str, list[gs.Node]] = {}
    for softmax in (node for node in graph.nodes if node.op == "Softmax"):
        found = _parts(softmax)
        if found is None:
            continue
        scale, reshape, last = found
        q, k, v = (gs.Variable(f"{softmax.name}/{name}", np.float32) for name in "qkv")
        split = gs.Node("Split", f"{softmax.name}/Split", {"axis": 2, "num_outputs": 3})
        split.inputs, split.outputs = [reshape.inputs[0]], [q, k, v]
        heads = int(reshape.inputs[1].values[3])
        attention = gs.Node(
            NODE, f"{softmax.name}/{NODE}", {"num_heads": heads, "scale": scale}, domain=DOMAIN
        )
        (output,) = last.outputs
        last.outputs = []
        attention.inputs, attention.outputs = [q, k, v], [output]
        fused[last.name] = [split, attention]
    graph.nodes = [each for node in graph.nodes for each in fused.get(node.name, [node])]


def _parts(softmax: gs.Node) -> tuple[float, gs.Node, gs.Node] | None:
    """The scale, the Reshape of q, k and v side by side and the one that joins the heads; None for another form."""
    products = next(_up_from(softmax.inputs[0], ("MatMul",)), None)
    after = _down(softmax, ("MatMul", "Transpose", "Reshape"))
    if products is None or after is None or softmax.outputs[0].dtype != np.float32:
        return None
    chains = [
        list(_up_from(product.inputs[place], ops))
        for product, place, ops in ((products, 0, QUERY), (products, 1, KEY), (after[0], 1, VALUE))
    ]
    if any(len(chain) != len(ops) for chain, ops in zip(chains, (QUERY, KEY, VALUE), strict=True)):
        return None
    scale, reshape = chains[0][0].inputs[1], chains[0][-1]
    shape = reshape.inputs[1]
    starts = [next(node for node in chain if node.op == "Slice").inputs[1] for chain in chains]
    is_known = (
        all(chain[-1] is reshape for chain in chains)
        and all(isinstance(value, gs.Constant) for value in (scale, shape, *starts))
        and scale.values.size == 1
        and len(shape.values) == 5
        and [int(start.values.reshape(-1)[0]) for start in starts] == [0, 1, 2]
        and list(chains[0][3].attrs["perm"]) == [2, 0, 3, 1, 4]
        and list(chains[1][0].attrs["perm"]) == [0, 1, 3, 2]
        and list(after[1].attrs["perm"]) == [0, 2, 1, 3]
    )
    return (float(scale.values.reshape(-1)[0]), reshape, after[2]) if is_known else None


def _up_from(tensor: gs.Tensor, ops: Sequence[str]) -> Iterator[gs.Node]:
    """The nodes that made a tensor, back through first inputs, as long as they are the ops named."""
    for op in ops:
        maker = tensor.inputs[0] if tensor.inputs else None
        if maker is None or maker.op != op:
            return
        yield maker
        tensor = maker.inputs[0]


def _down(node: gs.Node, ops: Sequence[str]) -> list[gs.Node] | None:
    """The nodes that read a result one after the other and alone; None where they are others."""
    found = []
    for op in ops:
        readers = node.outputs[0].outputs
        if len(readers) != 1 or readers[0].op != op:
            return None
        node = readers[0]
        found.append(node)
    return found
