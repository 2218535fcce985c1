"""INT8 and FP8 written into an ONNX graph as Q/DQ pairs, the form strongly typed TensorRT and ONNX Runtime both read.

Symmetric; activations per tensor, weights per output channel and stored in eight bits. A product is a matrix product
or, in INT8, a convolution. ONNX Runtime's quantizer places the pairs; what it cannot say (FP8 with our limits, weights
alone) is rewritten afterwards from the fp32 weights.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
from m3ad.errors import ArtifactError
from m3ad_export.graphs.plan import QUANTIZED, NodePrecision, Plan
from m3ad_export.graphs.surgery import edited, element_type
from onnx import TensorProto, numpy_helper
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import add_infer_metadata

from m3ad_calibrate.pairs import dequantizer, keep_outputs, own_pairs, read_directly
from m3ad_calibrate.ranges import LARGEST

FOLDED = ("Gather", "Slice", "Transpose", "Reshape", "Squeeze")
CONVOLUTIONS = ("Conv", "ConvTranspose")
PRODUCTS = ("MatMul", *CONVOLUTIONS)
OPSET = 19  # the first with FP8 and with half-typed scales in Q/DQ
QUANTIZER_OPTIONS = {
    "ActivationSymmetric": True,
    "WeightSymmetric": True,
    "QuantizeBias": False,  # TensorRT knows no INT32 bias behind a DQ
    "OpTypesToExcludeOutputQuantization": list(PRODUCTS),
    "MatMulConstBOnly": False,
}


def prepared(model: onnx.ModelProto, stage: str, plan: Plan) -> onnx.ModelProto:
    """A copy in which every product the plan quantizes is a MatMul with an initializer for its weights.

    A Gemm becomes MatMul and Sum, and so does a MatMul with an Add. ONNX Runtime folds a MatMul and an Add of plain
    rows into a Gemm, which it runs in fp32 behind DQ nodes: 512 x 1088 x 1088 takes 1.29 of a Gemm's time, as Sum 0.68.
    """
    return edited(model, lambda graph: _prepare(graph, stage, plan))


def _prepare(graph: gs.Graph, stage: str, plan: Plan) -> None:
    # A product may read a slice of a larger weight.
    graph.fold_constants(
        fold_shapes=False, error_ok=False, should_exclude_node=lambda node: node.op not in FOLDED
    )
    nodes: list[gs.Node] = []
    for node in graph.nodes:
        nodes.append(node)
        if node.op not in ("MatMul", "Gemm") or plan.choice(stage, node).precision not in QUANTIZED:
            continue
        weight, attributes = node.inputs[1], node.attrs
        if not isinstance(weight, gs.Constant) or len(weight.shape) != 2:
            continue
        if attributes.get("alpha", 1) != 1 or attributes.get("beta", 1) != 1 or attributes.get("transA"):
            continue
        if node.op == "Gemm":
            columns = np.ascontiguousarray(weight.values.T if attributes.get("transB") else weight.values)
            node.op, node.attrs = "MatMul", {}
            node.inputs[1] = gs.Constant(f"{weight.name}.columns", columns)
        if len(node.inputs) > 2:
            bias, output = node.inputs.pop(), node.outputs[0]
            product = gs.Variable(f"{output.name}.product")
            node.outputs = [product]
            nodes.append(gs.Node("Sum", f"{node.name}/bias", inputs=[product, bias], outputs=[output]))
        for reader in node.outputs[0].outputs:
            if reader.op == "Add":
                reader.op = "Sum"
    graph.nodes = nodes


def products(model: onnx.ModelProto, stage: str, plan: Plan) -> dict[str, str]:
    """The products of a prepared model that the plan quantizes: node name -> precision."""
    shapes = {i.name: i.dims for i in model.graph.initializer}
    found: dict[str, str] = {}
    for node in model.graph.node:
        precision = plan.choice(stage, node).precision
        if node.op_type in PRODUCTS and precision in QUANTIZED and _takes(node, shapes, precision):
            found[node.name] = precision
    return found


def _takes(node: onnx.NodeProto, shapes: Mapping[str, Sequence[int]], precision: NodePrecision) -> bool:
    """Whether the precision is for this product; `shapes` are those of the weights."""
    weights = shapes.get(node.input[1])
    if node.input[0] in shapes:
        return False
    if node.op_type == "MatMul":
        return len(weights) == 2 if weights is not None else precision != "int8_weights"
    groups = next((a.i for a in node.attribute if a.name == "group"), 1)
    # A transposed one has its output channels on axis 1, of each group anew: one scale would be for several channels.
    return weights is not None and precision != "fp8" and (node.op_type == "Conv" or groups == 1)


def has_convolutions(model: onnx.ModelProto, stage: str, plan: Plan) -> bool:
    """Whether the plan quantizes a convolution of a prepared model."""
    chosen = products(model, stage, plan)
    return any(node.op_type in CONVOLUTIONS and node.name in chosen for node in model.graph.node)


def nothing_for(plan: Plan, path: Path) -> str:
    """What to say of a bundle in which no product takes the plan's precision."""
    if plan.precision == "fp8":
        return f"{path} has no matrix product for fp8, which is not for convolutions; quantize it to int8 or fp16"
    return (
        f"the plan keeps every product of {path} in floating point; quantize to fp16, or write another plan: "
        "m3ad-calibrate plan"
    )


def activations(model: onnx.ModelProto, stage: str, plan: Plan) -> set[str]:
    """The tensors that need a limit before `quantized` can write this plan."""
    chosen, weights = products(model, stage, plan), {i.name for i in model.graph.initializer}
    return {
        name
        for node in model.graph.node
        if chosen.get(node.name, "int8_weights") != "int8_weights"
        for name in node.input[:2]  # the third, of a convolution, is its bias
        if name not in weights
    }


def quantized(model: onnx.ModelProto, stage: str, plan: Plan, limits: dict[str, float]) -> onnx.ModelProto:
    """Write the plan's INT8 and FP8 products into a prepared model.

    Args:
        model: what `prepared` returned; not changed.
        stage: whose graph it is, for the plan's patterns.
        plan: the precision plan.
        limits: c of every tensor in `activations`; its scale becomes c / 127 or c / 448.

    Raises:
        ArtifactError: the result does not hold what the plan says.
    """
    chosen = products(model, stage, plan)
    if not chosen:
        return copy.deepcopy(model)
    weights_only = {name for name, precision in chosen.items() if precision == "int8_weights"}
    bounds = {name: (np.float32(-c), np.float32(c)) for name, c in limits.items()}
    for node in model.graph.node:  # a limit for the quantizer's sake; these pairs are removed below
        if node.name in weights_only and node.input[0] not in bounds:
            bounds[node.input[0]] = (np.float32(-1), np.float32(1))
    source = onnx.shape_inference.infer_shapes(model)
    add_infer_metadata(source)
    quantizer = QDQQuantizer(
        source,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, bounds),
        nodes_to_quantize=list(chosen),
        nodes_to_exclude=[],
        op_types_to_quantize=list(PRODUCTS),
        extra_options=QUANTIZER_OPTIONS,
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    written: onnx.ModelProto = quantizer.model.model
    if plan.precision == "fp8" or plan.half:
        for entry in (o for o in written.opset_import if not o.domain):
            entry.version = max(entry.version, OPSET)

    def place_pairs(graph: gs.Graph) -> None:
        keep_outputs(graph)
        read_directly(graph, chosen.keys() - weights_only)
        if plan.precision == "fp8":
            weights = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
            _as_fp8(graph, {name for name, p in chosen.items() if p == "fp8"}, weights, limits)
        own_pairs(graph.cleanup())
        verify(graph, chosen)

    return edited(written, place_pairs)


def _as_fp8(
    graph: gs.Graph, names: set[str], weights: dict[str, npt.NDArray[Any]], limits: dict[str, float]
) -> None:
    """Retype the pairs that feed these products from INT8 to FP8 E4M3, from the fp32 weights and the limits."""
    for tensor in (t for node in graph.nodes if node.name in names for t in node.inputs):
        stored, scale, zero = tensor.inputs[0].inputs
        if isinstance(stored, gs.Constant):
            weight = weights[stored.name.removesuffix("_quantized")]
            largest = np.maximum(np.abs(weight).max(axis=0), np.finfo(np.float32).tiny)
            scale.values = (largest / LARGEST["fp8"]).astype(np.float32)
            stored.values = (weight / scale.values).astype(ml_dtypes.float8_e4m3fn)
        else:
            scale.values = np.asarray(limits[stored.i().name] / LARGEST["fp8"], np.float32)
        zero.values = np.zeros(scale.shape, ml_dtypes.float8_e4m3fn)


def verify(graph: gs.Graph, chosen: dict[str, str]) -> None:
    """Compare every product with the plan.

    Raises:
        ArtifactError: one reads something else than the plan says.
    """
    expected = {
        "int8": ({TensorProto.INT8}, 2),
        "int8_weights": ({TensorProto.INT8}, 1),
        "fp8": ({TensorProto.FLOAT8E4M3FN}, 2),
    }
    for node in graph.nodes:
        if node.op == "DequantizeLinear":
            continue
        pairs = [maker for t in node.inputs if (maker := dequantizer(t)) is not None]
        actual = ({element_type(p.inputs[2]) for p in pairs}, len(pairs))
        if actual != expected.get(chosen.get(node.name, ""), (set(), 0)):
            raise ArtifactError(
                f"{node.name} was to be {chosen.get(node.name, 'floating point')}, the quantizer wrote something else; "
                f"update onnxruntime or keep the node in the plan"
            )
