"""Half precision written into the ONNX file, the only place TensorRT 11 and strongly typed networks read it from.

The plan says which nodes stay in fp32 and why; everything else that computes on floats runs in half precision. Tensors
at the stage's walls stay fp32, as the contract has them.
"""

from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from m3ad_export.graphs.plan import Plan

Precision = Literal["fp32", "fp16", "bf16"]
INT8_WEIGHTS = "INT8_WEIGHTS"  # of the products in `histogram`, the one that is no ONNX type
_ELEMENT = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
MAKES_ITS_TYPE = ("Cast", "Shape", "Constant", "ConstantOfShape")  # whatever the types around them are
PRODUCTS = ("MatMul", "Gemm", "Conv")


def half_model(model: onnx.ModelProto, stage: str, plan: Plan) -> onnx.ModelProto:
    """A copy of an fp32 model in which every node the plan does not keep computes in half precision.

    Casts stand only where precision changes; weights of half nodes are stored in half. Q/DQ nodes take the half type
    with the node they feed: in a strongly typed network the type of a scale is the type of what is scaled.

    Raises:
        ValueError: a weight is larger than the type holds, or a scale smaller.
    """
    half_type = plan.half
    if half_type is None:
        return model
    element = _ELEMENT[half_type]
    inferred = onnx.shape_inference.infer_shapes(model)
    floats = {
        v.name
        for v in (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output)
        if v.type.tensor_type.elem_type == TensorProto.FLOAT
    }
    weights = {i.name: i for i in model.graph.initializer if i.data_type == TensorProto.FLOAT}
    floats |= weights.keys()
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    del graph.node[:], graph.value_info[:]
    nodes: list[onnx.NodeProto] = []
    made_half: set[str] = set()  # values that exist in half precision under `<name>.half`
    made_full = {v.name for v in model.graph.input} | weights.keys()

    def half(name: str) -> str:
        if name not in made_half:
            if name in weights:
                graph.initializer.append(_half_weight(weights[name], element))
            else:
                nodes.append(_cast(name, f"{name}.half", element))
            made_half.add(name)
        return f"{name}.half"

    def full(name: str) -> str:
        if name in floats and name not in made_full:
            nodes.append(_cast(f"{name}.half", name, TensorProto.FLOAT))
            made_full.add(name)
        return name

    for source in model.graph.node:
        node = onnx.NodeProto()
        node.CopyFrom(source)
        computes = any(name in floats for name in (*node.input, *node.output))
        if not computes or node.op_type in MAKES_ITS_TYPE or plan.float_type(stage, node) == "fp32":
            node.input[:] = [full(name) for name in node.input]
            made_full.update(node.output)
        else:
            node.input[:] = [half(name) if name in floats else name for name in node.input]
            made_half.update(name for name in node.output if name in floats)
            made_full.update(name for name in node.output if name not in floats)
            node.output[:] = [f"{name}.half" if name in floats else name for name in node.output]
        nodes.append(node)
    for output in graph.output:
        full(output.name)
    graph.node.extend(nodes)
    _drop_unused_weights(graph)
    return result


def histogram(model: onnx.ModelProto) -> dict[str, int]:
    """How many matrix products and convolutions compute in which type, by ONNX name of the type.

    A product is INT8 or FLOAT8E4M3FN when all it reads was dequantized from it, INT8_WEIGHTS when its weights were.
    """
    inferred = onnx.shape_inference.infer_shapes(model)
    graph = inferred.graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    types |= {i.name: i.data_type for i in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    counts: dict[str, int] = {}
    for node in graph.node:
        if node.op_type in PRODUCTS:
            sources = [makers[name] for name in node.input[:2] if name in makers]
            pairs = [source for source in sources if source.op_type == "DequantizeLinear"]
            name = TensorProto.DataType.Name(types[(pairs[0].input if pairs else node.output)[0]])
            if name == "INT8" and len(pairs) < 2:
                name = INT8_WEIGHTS
            counts[name] = counts.get(name, 0) + 1
    return counts


def _cast(source: str, target: str, element: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"{target}/Cast", to=element)


def _half_weight(weight: TensorProto, element: int) -> TensorProto:
    values = numpy_helper.to_array(weight)
    if weight.name.endswith("_scale") and np.any(values.astype(np.float16) == 0):
        raise ValueError(f"{weight.name} holds scales below fp16's smallest number; keep its node in fp32")
    if element == TensorProto.FLOAT16 and values.size and np.abs(values).max() > np.finfo(np.float16).max:
        raise ValueError(f"weight {weight.name} holds values beyond fp16's 65504; keep its node in fp32")
    converted = values.astype(helper.tensor_dtype_to_np_dtype(element))
    return numpy_helper.from_array(converted, f"{weight.name}.half")


def _drop_unused_weights(graph: onnx.GraphProto) -> None:
    used = {name for node in graph.node for name in node.input} | {v.name for v in graph.output}
    kept = [i for i in graph.initializer if i.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
