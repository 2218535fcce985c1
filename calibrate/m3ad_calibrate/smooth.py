"""SmoothQuant: outliers of an activation moved into the weights it meets, where a LayerNorm stands before the product.

References: Xiao et al. 2023, arXiv 2211.10438, eq. 4, with a migration strength of one half.
"""

import numpy as np
import onnx
from onnx import numpy_helper

from m3ad_calibrate.ranges import Observed

STRENGTH = 0.5


def smoothable(model: onnx.ModelProto) -> dict[str, tuple[onnx.NodeProto, onnx.NodeProto]]:
    """LayerNorm outputs that feed one MatMul with weights and nothing else: tensor -> (norm, product)."""
    weights = {i.name for i in model.graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = {}
    for norm in model.graph.node:
        if norm.op_type != "LayerNormalization" or len(norm.input) < 3:
            continue
        (product, *others) = readers.get(norm.output[0], [norm])
        alone = not others and product.op_type == "MatMul" and product.input[0] == norm.output[0]
        if alone and product.input[1] in weights and len(readers[product.input[1]]) == 1:
            found[norm.output[0]] = (norm, product)
    return found


def smoothed(model: onnx.ModelProto, seen: dict[str, Observed]) -> onnx.ModelProto:
    """A copy that computes the same with smaller outliers: X W = (X / s) (s W), s_j = sqrt(max|X_j| / max|W_j|).

    1 / s goes into the gain and the bias of the LayerNorm, s into the rows of the weight.

    Args:
        model: prepared for quantization.
        seen: what was observed of the tensors in `smoothable`.

    Returns:
        The model, equal to fp32 rounding.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    initializers = {i.name: i for i in result.graph.initializer}
    for tensor, (norm, product) in smoothable(result).items():
        weight = numpy_helper.to_array(initializers[product.input[1]])
        inputs, rows = seen[tensor].channel_largest, np.abs(weight).max(axis=1)
        usable = (inputs > 0) & (rows > 0)
        ratio = np.divide(inputs**STRENGTH, rows ** (1 - STRENGTH), out=np.ones_like(inputs), where=usable)
        scale = ratio.astype(np.float32)
        initializers[product.input[1]].CopyFrom(
            numpy_helper.from_array(weight * scale[:, None], product.input[1])
        )
        for i, name in enumerate(
            norm.input[1:3], start=1
        ):  # norms may share their gains, so each gets its own
            own = f"{tensor}.{'gain' if i == 1 else 'bias'}"
            value = numpy_helper.to_array(initializers[name]) / scale
            result.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), own))
            norm.input[i] = own
    return result
