"""Where the Q/DQ pairs of a graph sit: who reads rounded values, and which pair each product reads."""

import numpy as np
import onnx_graphsurgeon as gs


def dequantizer(tensor: gs.Tensor) -> gs.Node | None:
    """The DequantizeLinear that makes a tensor, if one does."""
    return next((maker for maker in tensor.inputs if maker.op == "DequantizeLinear"), None)


def keep_outputs(graph: gs.Graph) -> None:
    """Let an output that a product also reads leave as it was made, where the quantizer returns its rounded form."""
    for i, output in enumerate(graph.outputs):
        if (dequantize := dequantizer(output)) is not None:
            made = dequantize.i().inputs[0]
            made.name, output.name = output.name, f"{output.name}_DequantizeLinear_Output"
            made.dtype, made.shape = output.dtype, output.shape
            graph.outputs[i] = made


def read_directly(graph: gs.Graph, quantized_products: set[str]) -> None:
    """Let every other node read an activation itself: the quantizer hands its Q/DQ pair to all who read the tensor.

    The cosine reads the mentor that the next layer quantizes; it must not see that rounding.
    """
    for node in graph.nodes:
        if node.name in quantized_products or node.op == "DequantizeLinear":
            continue
        for i, tensor in enumerate(node.inputs):
            if (dequantize := dequantizer(tensor)) is not None:
                for quantize in dequantize.inputs[0].inputs:  # weights have no maker
                    node.inputs[i] = quantize.inputs[0]


def own_pairs(graph: gs.Graph) -> None:
    """Give each INT8 product pairs, scales and stored weights of its own, where several read the same.

    ONNX Runtime runs a product in INT8 only if nobody else reads its pairs. On CPUs whose products of signed weights
    saturate it turns a weight to unsigned once for every product that reads it, which fails at the second.
    """
    taken: set[str] = set()
    nodes: list[gs.Node] = []

    def own_name(name: str) -> str:
        """The name itself for who asks first, names of copies for all others."""
        copy, k = name, 0
        while copy in taken:
            k += 1
            copy = f"copy{k}.{name}"
        taken.add(copy)
        return copy

    def own(tensor: gs.Tensor) -> gs.Tensor:
        name = own_name(tensor.name)
        if name == tensor.name:
            return tensor
        # Not by the library's copy: it shares a weight that was not read yet, and both leave with one name.
        return gs.Constant(name, tensor.values) if isinstance(tensor, gs.Constant) else gs.Variable(name)

    for node in graph.nodes:
        for i, tensor in enumerate(() if node.op == "DequantizeLinear" else node.inputs):
            dequantize = dequantizer(tensor)
            if dequantize is None or dequantize.inputs[2].dtype != np.int8:
                continue
            pair = [*dequantize.inputs[0].inputs, dequantize]  # no QuantizeLinear behind a weight
            is_first = tensor.name not in taken
            around = {t.name: t for t in (*dequantize.inputs, *pair[0].inputs[1:], tensor)}
            owned = {name: own(t) for name, t in around.items()}
            for each in pair:
                inputs, outputs = ([owned.get(t.name, t) for t in ts] for ts in (each.inputs, each.outputs))
                if is_first:
                    each.inputs, each.outputs = inputs, outputs
                else:
                    each = each.copy(inputs, outputs)
                    nodes.append(each)
                each.name = own_name(each.name)
            node.inputs[i] = owned[tensor.name]
        nodes.append(node)
    graph.nodes = nodes
