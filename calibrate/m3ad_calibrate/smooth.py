"""SmoothQuant: outliers of an activation moved into the weights it meets, where a LayerNorm stands before the product.

References: Xiao et al. 2023, arXiv 2211.10438, eq. 4, with a migration strength of one half.
"""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from m3ad_export.graphs.surgery import edited

from m3ad_calibrate.ranges import Observed

STRENGTH = 0.5


def smoothable(model: onnx.ModelProto) -> list[str]:
    """LayerNorm outputs that feed one MatMul with weights and nothing else."""
    return [norm.outputs[0].name for norm, _ in _smoothable(gs.import_onnx(model))]


def smoothed(model: onnx.ModelProto, seen: dict[str, Observed]) -> onnx.ModelProto:
    """A copy that computes the same with smaller outliers: X W = (X / s) (s W), s_j = sqrt(max|X_j| / max|W_j|).

    1 / s goes into the gain and the bias of the LayerNorm, s into the rows of the weight.

    Args:
        model: prepared for quantization.
        seen: what was observed of the tensors in `smoothable`.

    Returns:
        The model, equal to fp32 rounding.
    """
    return edited(model, lambda graph: _smooth(graph, seen))


def _smooth(graph: gs.Graph, seen: dict[str, Observed]) -> None:
    for norm, product in _smoothable(graph):
        tensor, weight = norm.outputs[0].name, product.inputs[1]
        inputs, rows = seen[tensor].channel_largest, np.abs(weight.values).max(axis=1)
        usable = (inputs > 0) & (rows > 0)
        ratio = np.divide(inputs**STRENGTH, rows ** (1 - STRENGTH), out=np.ones_like(inputs), where=usable)
        scale = ratio.astype(np.float32)
        weight.values = weight.values * scale[:, None]
        for i, name in ((1, "gain"), (2, "bias")):  # norms may share their gains, so each gets its own
            value = (norm.inputs[i].values / scale).astype(np.float32)
            norm.inputs[i] = gs.Constant(f"{tensor}.{name}", value)


def _smoothable(graph: gs.Graph) -> list[tuple[gs.Node, gs.Node]]:
    found = []
    for norm in graph.nodes:
        if norm.op != "LayerNormalization" or len(norm.inputs) < 3 or norm.outputs[0] in graph.outputs:
            continue
        readers = norm.outputs[0].outputs
        if len(readers) == 1 and readers[0].op == "MatMul" and readers[0].inputs[0] is norm.outputs[0]:
            weight = readers[0].inputs[1]
            if isinstance(weight, gs.Constant) and len(weight.outputs) == 1:
                found.append((norm, readers[0]))
    return found
