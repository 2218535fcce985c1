"""Half precision written into the ONNX file, the only place TensorRT 11 and strongly typed networks read it from.

A plan says which nodes stay in fp32 and why; everything else that computes on floats runs in half precision. Tensors
at the stage's walls stay fp32, as the contract has them.
"""

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
from m3ad.contract import OP_DOMAIN
from onnx import TensorProto, helper, numpy_helper

Precision = Literal["fp32", "fp16", "bf16"]
_ELEMENT = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


@dataclass(frozen=True, slots=True)
class Keep:
    """Nodes that stay in fp32: a pattern searched in `module/operation/OpType` names, and the reason."""

    pattern: str
    reason: str


# The pattern is searched in `<stage>:<node name>`.
KEEP_FP32: tuple[Keep, ...] = (
    Keep(
        r"^(vm|head_vote):",
        "scores lie near 1 - cos = 0, where fp16 steps are as large as the signal; voting multiplies them",
    ),
    Keep(r"^head_rows:/(?!gelu)", "the scores themselves, and the rows they compare"),
    Keep(r"^project:", "distances to centres decide the weights; 3-NN in fp16 loses its true neighbours"),
    Keep(r"/LayerNormalization", "sums of squares over wide rows overflow fp16"),
    Keep(r"/Softmax", "exponentials overflow; TensorRT fuses an fp32 softmax into attention"),
    Keep(
        r":blocks[\w.]*\.\d+/add", "the residual stream of a ViT grows beyond what fp16 holds on some builds"
    ),
    Keep(r"/(linalg_vector_norm|clamp_min|expand|div)\w*/", "L2 norms of feature rows"),
    Keep(r":encoder\.first_conv", "neighbourhoods are offsets of millimetres, their variance about 1e-6"),
    Keep(r":encoder\.second_conv\.1/", "batch statistics over all grouped points"),
    Keep(r":pos_embed", "absolute coordinates in metres: fp16 would round them to a quarter millimetre"),
    Keep(rf":{OP_DOMAIN}\.", "the custom ops measure distances in fp32"),
)


def reason_to_keep(stage: str, node: onnx.NodeProto, plan: tuple[Keep, ...] = KEEP_FP32) -> str | None:
    """Why a node stays in fp32, or None when it may run in half precision."""
    name = f"{stage}:{OP_DOMAIN}." if node.domain == OP_DOMAIN else f"{stage}:{node.name}"
    return next((keep.reason for keep in plan if re.search(keep.pattern, name)), None)


def half_model(
    model: onnx.ModelProto, stage: str, precision: Literal["fp16", "bf16"], plan: tuple[Keep, ...] = KEEP_FP32
) -> onnx.ModelProto:
    """A copy of an fp32 model in which every node the plan does not keep computes in half precision.

    Casts stand only where precision changes; weights of half nodes are stored in half.

    Raises:
        ValueError: a weight is larger than the type holds.
    """
    element = _ELEMENT[precision]
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
        if not computes or node.op_type in ("Cast", "Shape") or reason_to_keep(stage, node, plan):
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
    """How many matrix products and convolutions compute in which type, by ONNX name of the type."""
    inferred = onnx.shape_inference.infer_shapes(model)
    graph = inferred.graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    types |= {i.name: i.data_type for i in graph.initializer}
    counts: dict[str, int] = {}
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm", "Conv"):
            name = TensorProto.DataType.Name(types[node.output[0]])
            counts[name] = counts.get(name, 0) + 1
    return counts


def _cast(source: str, target: str, element: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"{target}/Cast", to=element)


def _half_weight(weight: TensorProto, element: int) -> TensorProto:
    values = numpy_helper.to_array(weight)
    if element == TensorProto.FLOAT16 and values.size and np.abs(values).max() > np.finfo(np.float16).max:
        raise ValueError(f"weight {weight.name} holds values beyond fp16's 65504; keep its node in fp32")
    converted = values.astype(helper.tensor_dtype_to_np_dtype(element))
    return numpy_helper.from_array(converted, f"{weight.name}.half")


def _drop_unused_weights(graph: onnx.GraphProto) -> None:
    used = {name for node in graph.node for name in node.input} | {v.name for v in graph.output}
    kept = [i for i in graph.initializer if i.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
