"""INT8 and FP8 written into an ONNX graph as Q/DQ pairs, the form strongly typed TensorRT and ONNX Runtime both read.

Symmetric; activations per tensor, weights per output channel and stored in eight bits. ONNX Runtime's quantizer places
the pairs; what it cannot say (FP8 with our limits, weights alone) is rewritten afterwards from the fp32 weights.
"""

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from m3ad.errors import ArtifactError
from m3ad_export.graphs.plan import QUANTIZED, Plan
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import add_infer_metadata

from m3ad_calibrate.pairs import keep_outputs, own_pairs, read_directly
from m3ad_calibrate.ranges import LARGEST

OPSET = 19  # the first with FP8 and with half-typed scales in Q/DQ
QUANTIZER_OPTIONS = {
    "ActivationSymmetric": True,
    "WeightSymmetric": True,
    "QuantizeBias": False,  # TensorRT knows no INT32 bias behind a DQ
    "OpTypesToExcludeOutputQuantization": ["MatMul"],
    "MatMulConstBOnly": False,
}


def prepared(model: onnx.ModelProto, stage: str, plan: Plan) -> onnx.ModelProto:
    """A copy in which every product the plan quantizes is a MatMul with an initializer for its weights.

    A Gemm becomes MatMul and Sum, and so does a MatMul with an Add. ONNX Runtime folds a MatMul and an Add of plain
    rows into a Gemm, which it runs in fp32 behind DQ nodes: 512 x 1088 x 1088 takes 1.29 of a Gemm's time, as Sum 0.68.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    weights = {i.name: i for i in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    nodes: list[onnx.NodeProto] = []
    products: set[str] = set()
    for node in list(graph.node):
        if node.op_type not in ("MatMul", "Gemm") or plan.choice(stage, node).precision not in QUANTIZED:
            nodes.append(node)
            continue
        folded = _constant(node.input[1], weights, makers)
        if folded is None or folded.ndim != 2:
            nodes.append(node)
            continue
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if (
            attributes.get("alpha", 1.0) != 1.0
            or attributes.get("beta", 1.0) != 1.0
            or attributes.get("transA")
        ):
            nodes.append(node)
            continue
        turned = bool(attributes.get("transB"))
        name = node.input[1] if node.op_type == "MatMul" else f"{node.input[1]}.columns"
        if name not in weights:
            weights[name] = numpy_helper.from_array(
                np.ascontiguousarray(folded.T if turned else folded), name
            )
            graph.initializer.append(weights[name])
        biased = node.op_type == "Gemm" and len(node.input) > 2
        product = f"{node.output[0]}.product" if biased else node.output[0]
        nodes.append(helper.make_node("MatMul", [node.input[0], name], [product], name=node.name))
        products.add(product)
        if biased:
            nodes.append(
                helper.make_node("Sum", [product, node.input[2]], node.output, name=f"{node.name}/bias")
            )
    for node in nodes:
        if node.op_type == "Add" and products & set(node.input):
            node.op_type = "Sum"
    del graph.node[:]
    graph.node.extend(nodes)
    drop_unused(graph)
    return result


def products(model: onnx.ModelProto, stage: str, plan: Plan) -> dict[str, str]:
    """The MatMul nodes of a prepared model that the plan quantizes: node name -> precision."""
    shapes = {i.name: i.dims for i in model.graph.initializer}
    found: dict[str, str] = {}
    for node in model.graph.node:
        precision = plan.choice(stage, node).precision
        weights = shapes.get(node.input[1]) if node.op_type == "MatMul" else None
        if node.op_type == "MatMul" and precision in QUANTIZED and node.input[0] not in shapes:
            is_matrix = weights is not None and len(weights) == 2
            if is_matrix or (weights is None and precision != "int8_weights"):
                found[node.name] = precision
    return found


def activations(model: onnx.ModelProto, stage: str, plan: Plan) -> set[str]:
    """The tensors that need a limit before `quantized` can write this plan."""
    chosen, weights = products(model, stage, plan), {i.name for i in model.graph.initializer}
    return {
        name
        for node in model.graph.node
        if chosen.get(node.name, "int8_weights") != "int8_weights"
        for name in node.input
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
    source = onnx.ModelProto()
    source.CopyFrom(model)
    if not chosen:
        return source
    weights = {i.name: i for i in model.graph.initializer}
    weights_only = {name for name, precision in chosen.items() if precision == "int8_weights"}
    bounds = {name: (np.float32(-c), np.float32(c)) for name, c in limits.items()}
    for node in model.graph.node:  # a limit for the quantizer's sake; these pairs are removed below
        if node.name in weights_only and node.input[0] not in bounds:
            bounds[node.input[0]] = (np.float32(-1), np.float32(1))
    source = onnx.shape_inference.infer_shapes(source)
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
        op_types_to_quantize=["MatMul"],
        extra_options=QUANTIZER_OPTIONS,
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    result: onnx.ModelProto = quantizer.model.model
    del result.graph.value_info[:]
    keep_outputs(result.graph)
    read_directly(result.graph, {name for name, p in chosen.items() if p != "int8_weights"})
    if plan.precision == "fp8":
        _as_fp8(result.graph, {name for name, p in chosen.items() if p == "fp8"}, weights, limits)
    if plan.precision == "fp8" or plan.half:
        for entry in (o for o in result.opset_import if not o.domain):
            entry.version = max(entry.version, OPSET)
    drop_unused(result.graph)
    own_pairs(result.graph)
    verify(result, chosen)
    return result


def drop_unused(graph: onnx.GraphProto) -> None:
    """Remove nodes and initializers that no output of the graph needs."""
    needed = {v.name for v in graph.output}
    nodes = []
    for node in reversed(graph.node):
        if needed & set(node.output):
            needed |= set(node.input)
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(reversed(nodes))
    kept = [i for i in graph.initializer if i.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _constant(
    name: str, weights: dict[str, TensorProto], makers: dict[str, onnx.NodeProto]
) -> npt.NDArray[np.float32] | None:
    """The value of a tensor made of initializers alone (a slice of a larger weight), None if it depends on an input."""
    if name in weights:
        return numpy_helper.to_array(weights[name])
    maker = makers.get(name)
    if maker is None or maker.op_type not in ("Gather", "Slice", "Transpose", "Reshape", "Squeeze"):
        return None
    inputs = {n: _constant(n, weights, makers) for n in maker.input}
    if any(value is None for value in inputs.values()):
        return None
    (value,) = ReferenceEvaluator(maker).run(None, inputs)
    return np.asarray(value)


def _as_fp8(
    graph: onnx.GraphProto, names: set[str], weights: dict[str, TensorProto], limits: dict[str, float]
) -> None:
    """Retype the pairs that feed these products from INT8 to FP8 E4M3, from the fp32 weights and the limits."""
    makers = {name: node for node in graph.node for name in node.output}
    initializers = {i.name: i for i in graph.initializer}
    done: set[str] = set()
    for node in graph.node:
        for name in node.input[:2] if node.name in names else ():
            dequantize = makers[name]
            stored, scale, zero = dequantize.input
            if scale in done:
                continue
            done.add(scale)
            if stored in initializers:
                weight = numpy_helper.to_array(weights[stored.removesuffix("_quantized")])
                largest = np.maximum(np.abs(weight).max(axis=0), np.finfo(np.float32).tiny)
                new_scale = (largest / LARGEST["fp8"]).astype(np.float32)
                levels = (weight / new_scale).astype(ml_dtypes.float8_e4m3fn)
                initializers[stored].CopyFrom(numpy_helper.from_array(levels, stored))
            else:
                tensor = makers[stored].input[0]
                new_scale = np.asarray(limits[tensor] / LARGEST["fp8"], np.float32)
            zeros = np.zeros(new_scale.shape, ml_dtypes.float8_e4m3fn)
            initializers[scale].CopyFrom(numpy_helper.from_array(new_scale, scale))
            initializers[zero].CopyFrom(numpy_helper.from_array(zeros, zero))


def verify(model: onnx.ModelProto, chosen: dict[str, str]) -> None:
    """Compare every product with the plan.

    Raises:
        ArtifactError: one reads something else than the plan says.
    """
    makers = {name: node for node in model.graph.node for name in node.output}
    types = {i.name: i.data_type for i in model.graph.initializer}
    wanted = {
        "int8": (TensorProto.INT8, 2),
        "int8_weights": (TensorProto.INT8, 1),
        "fp8": (TensorProto.FLOAT8E4M3FN, 2),
    }
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear":
            continue
        pairs = [makers[n] for n in node.input if n in makers and makers[n].op_type == "DequantizeLinear"]
        found = ({types[p.input[2]] for p in pairs}, len(pairs))
        expected = wanted.get(chosen.get(node.name, ""))
        if found != (({expected[0]}, expected[1]) if expected else (set(), 0)):
            raise ArtifactError(
                f"{node.name} was to be {chosen.get(node.name, 'floating point')}, the quantizer wrote something else; "
                f"update onnxruntime or keep the node in the plan"
            )
