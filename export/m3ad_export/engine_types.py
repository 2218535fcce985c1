"""In which types an engine computes its products and convolutions: asked for, parsed, and as its inspector tells it."""

import json
from typing import Any

from m3ad.errors import ArtifactError, M3adError

from m3ad_export.graphs.precision import INT8_WEIGHTS

# FP8 products exist from Ada on; TensorRT-RTX builds INT8 for every target it knows.
BEFORE_FP8 = ("sm80", "sm86")
# How the engine inspector calls a type; a fused layer names several, the narrowest is what its products run in.
INSPECTOR_MARKS = (
    ("FP8", "FLOAT8E4M3FN"),
    ("Int8", "INT8"),
    ("Half", "FLOAT16"),
    ("BFloat16", "BFLOAT16"),
)


def verify_target(target: str, precision: str) -> None:
    """Check that a target computes in the type a bundle was quantized to.

    Raises:
        M3adError: FP8 for a GPU before Ada.
    """
    if precision == "fp8" and target in BEFORE_FP8:
        raise M3adError(
            f"{target} has no FP8 units, they come with sm89: build for sm89, sm120 or sm121, or quantize to int8"
        )


def verify_precision(stage: str, asked: dict[str, int], built: dict[str, int]) -> None:
    """Compare the types in which matrix products were built with those the ONNX file asks for.

    Raises:
        ArtifactError: fewer of them run in a reduced type than asked.
    """
    for name, count in asked.items():
        if name != "FLOAT" and built.get(name, 0) < count:
            raise ArtifactError(
                f"engine of stage {stage} has {built.get(name, 0)} matrix products in {name}, the ONNX file asks for "
                f"{count}; an engine of silent fp32 is not written. Update the builder or ask for another precision"
            )


def network_types(trt: Any, network: Any) -> dict[str, int]:
    """Types of matrix products as parsed: in a strongly typed network the engine must keep them."""
    names = {"HALF": "FLOAT16", "BF16": "BFLOAT16", "FP8": "FLOAT8E4M3FN"}
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    makers = {layer.get_output(i).name: layer for layer in layers for i in range(layer.num_outputs)}
    products = (trt.LayerType.MATRIX_MULTIPLY, trt.LayerType.CONVOLUTION, trt.LayerType.DECONVOLUTION)
    counts: dict[str, int] = {}
    for layer in layers:
        if layer.type in products:
            operands = [layer.get_input(i) for i in range(min(layer.num_inputs, 2))]
            stored = [_stored_type(trt, makers, tensor) for tensor in operands]
            name = next((n for n in stored if n), layer.get_output(0).dtype.name)
            name = INT8_WEIGHTS if name == "INT8" and None in stored else names.get(name, name)
            counts[name] = counts.get(name, 0) + 1
    return counts


def _stored_type(trt: Any, makers: dict[str, Any], tensor: Any) -> str | None:
    """The type a tensor was dequantized from, looking through what only moves values; None if it was not."""
    layer = makers.get(tensor.name)
    while layer is not None and layer.type in (trt.LayerType.SHUFFLE, trt.LayerType.CAST):
        layer = makers.get(layer.get_input(0).name)
    if layer is None or layer.type != trt.LayerType.DEQUANTIZE:
        return None
    return str(layer.get_input(0).dtype.name)


def inspector_types(trt: Any, logger: Any, plan: Any) -> dict[str, int]:
    """Types of the layers that hold matrix products, as the engine inspector of the built plan tells them."""
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        raise ArtifactError(f"the engine just built cannot be read back:\n{logger.text()}")
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    counts: dict[str, int] = {}
    for layer in json.loads(text)["Layers"]:
        described = json.dumps(layer)
        products = sum(described.count(op) for op in ("/MatMul", "/Gemm", "/Conv"))
        name = next((name for mark, name in INSPECTOR_MARKS if mark in described), "FLOAT")
        if products:
            counts[name] = counts.get(name, 0) + products
    return counts
