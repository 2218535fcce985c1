"""Half precision written into the ONNX file, the only place TensorRT 11 and strongly typed networks read it from.

The plan says which nodes stay in fp32 and why; everything else that computes on floats runs in half precision. Tensors
at the stage's boundary stay fp32, as the contract has them.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper

from m3ad_export.graphs.compose import op_bodies, opset_of
from m3ad_export.graphs.plan import Plan
from m3ad_export.graphs.surgery import cast, edited

INT8_WEIGHTS = "INT8_WEIGHTS"  # of the products in `histogram`, the one that is no ONNX type
_ELEMENT = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
MAKES_ITS_TYPE = ("Cast", "Shape", "Constant", "ConstantOfShape")  # whatever the types around them are
PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose")


def half_model(model: onnx.ModelProto, stage: str, plan: Plan) -> onnx.ModelProto:
    """A copy of an fp32 model in which every node the plan does not keep computes in half precision.

    Casts stand only where precision changes; weights of half nodes are stored in half. Q/DQ nodes take the half type
    with the node they feed: in a strongly typed network the type of a scale is the type of what is scaled.

    Raises:
        ValueError: a weight is larger than the type holds, or a scale smaller.
    """
    if plan.half is None:
        return model
    element = _ELEMENT[plan.half]
    return edited(onnx.shape_inference.infer_shapes(model), lambda graph: _halve(graph, stage, plan, element))


def _halve(graph: gs.Graph, stage: str, plan: Plan, element: int) -> None:
    halves: dict[str, gs.Tensor] = {}  # `<name>.half` of those that exist in half precision
    nodes: list[gs.Node] = []

    def half(tensor: gs.Tensor) -> gs.Tensor:
        name = f"{tensor.name}.half"
        if name not in halves and isinstance(tensor, gs.Constant):
            halves[name] = gs.Constant(name, _half_values(tensor, element))
        elif name not in halves:
            halves[name] = gs.Variable(name)
            nodes.append(cast(tensor, halves[name], element))
        return halves[name]

    for node in graph.nodes:
        computes = any(_is_float(t) for t in (*node.inputs, *node.outputs))
        if not computes or node.op in MAKES_ITS_TYPE or plan.float_type(stage, node) == "fp32":
            nodes.append(node)
            continue
        node.inputs = [half(t) if _is_float(t) else t for t in node.inputs]
        nodes.append(node)
        for i, tensor in enumerate(node.outputs):
            if _is_float(tensor):
                node.outputs[i] = halves[f"{tensor.name}.half"] = gs.Variable(f"{tensor.name}.half")
                # Back for who reads it in fp32; where nobody does, the cast goes again.
                nodes.append(cast(node.outputs[i], tensor, TensorProto.FLOAT))
    graph.nodes = nodes


def histogram(model: onnx.ModelProto) -> dict[str, int]:
    """How many matrix products and convolutions compute in which type, by ONNX name of the type.

    A product is INT8 or FLOAT8E4M3FN when all it reads was dequantized from it, INT8_WEIGHTS when its weights were.
    """
    typed = onnx.ModelProto()
    typed.CopyFrom(model)
    if not typed.functions:  # without bodies nothing says which types the custom ops return
        typed.functions.extend(op_bodies(typed.graph.node, opset_of(typed)))
    inferred = onnx.shape_inference.infer_shapes(typed)
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


def _is_float(tensor: gs.Tensor) -> bool:
    return bool(tensor.dtype == np.float32)


def _half_values(weight: gs.Constant, element: int) -> npt.NDArray[Any]:
    values = weight.values
    if weight.name.endswith("_scale") and np.any(values.astype(np.float16) == 0):
        raise ValueError(f"{weight.name} holds scales below fp16's smallest number; keep its node in fp32")
    if element == TensorProto.FLOAT16 and values.size and np.abs(values).max() > np.finfo(np.float16).max:
        raise ValueError(f"weight {weight.name} holds values beyond fp16's 65504; keep its node in fp32")
    return np.asarray(values.astype(helper.tensor_dtype_to_np_dtype(element)))
