"""Where the Q/DQ pairs of a graph sit: who reads rounded values, and which pair each product reads."""

import onnx
from onnx import TensorProto


def keep_outputs(graph: onnx.GraphProto) -> None:
    """Let an output that a product also reads leave as it was made, where the quantizer returns its rounded form."""
    makers = {name: node for node in graph.node for name in node.output}
    renamed: dict[str, str] = {}
    for output in graph.output:
        if makers[output.name].op_type == "DequantizeLinear":
            made = makers[makers[output.name].input[0]].input[0]
            renamed |= {made: output.name, output.name: f"{output.name}_DequantizeLinear_Output"}
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]


def read_directly(graph: onnx.GraphProto, quantized_products: set[str]) -> None:
    """Let every other node read an activation itself: the quantizer hands its Q/DQ pair to all who read the tensor.

    The cosine reads the mentor that the next layer quantizes; it must not see that rounding.
    """
    makers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.name in quantized_products or node.op_type == "DequantizeLinear":
            continue
        for i, name in enumerate(node.input):
            dequantize = makers.get(name)
            if dequantize is not None and dequantize.op_type == "DequantizeLinear":
                quantize = makers.get(dequantize.input[0])
                if quantize is not None:  # weights have no maker
                    node.input[i] = quantize.input[0]


def own_pairs(graph: onnx.GraphProto) -> None:
    """Give each INT8 product pairs, scales and stored weights of its own, where several read the same.

    ONNX Runtime runs a product in INT8 only if nobody else reads its pairs. On CPUs whose products of signed weights
    saturate it turns a weight to unsigned once for every product that reads it, which fails at the second.
    """
    makers = {name: node for node in graph.node for name in node.output}
    stored = {i.name: i for i in graph.initializer}
    taken: set[str] = set()
    nodes: list[onnx.NodeProto] = []

    def own(name: str) -> str:
        """The name itself for who asks first, names of copies for all others."""
        copy, k = name, 0
        while copy in taken:
            k += 1
            copy = f"copy{k}.{name}"
        taken.add(copy)
        if copy != name and name in stored:
            initializer = graph.initializer.add()
            initializer.CopyFrom(stored[name])
            initializer.name = copy
        return copy

    for node in graph.node:
        for i, name in enumerate(() if node.op_type == "DequantizeLinear" else node.input):
            dequantize = makers.get(name)
            if dequantize is None or dequantize.op_type != "DequantizeLinear":
                continue
            if stored[dequantize.input[2]].data_type != TensorProto.INT8:
                continue
            quantize = makers.get(dequantize.input[0])  # none behind a weight
            pair = [quantize, dequantize] if quantize else [dequantize]
            if name in taken:
                pair = [onnx.NodeProto.FromString(each.SerializeToString()) for each in pair]
                nodes.extend(pair)
            renamed = {old: own(old) for old in dict.fromkeys([*dequantize.input, *pair[0].input[1:], name])}
            node.input[i] = renamed[name]
            for each in pair:
                each.name = own(each.name)
                each.input[:] = [renamed.get(old, old) for old in each.input]
                each.output[:] = [renamed.get(old, old) for old in each.output]
        nodes.append(node)
    ordered = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(ordered)
