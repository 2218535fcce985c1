"""NVIDIA ModelOpt as the quantizer of a graph, where it is installed. It pins other versions of onnx and ONNX Runtime.

Its placement follows TensorRT's fusions; the plan's kept nodes are handed to it by name.
"""

import copy
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
from m3ad.errors import M3adError, MissingDependencyError
from m3ad_export.graphs.plan import Plan
from m3ad_export.graphs.surgery import edited

from m3ad_calibrate import qdq
from m3ad_calibrate.pairs import keep_outputs, own_pairs

Engine = Literal["onnxruntime", "modelopt"]


def quantized_by_modelopt(
    model: onnx.ModelProto,
    stage: str,
    plan: Plan,
    runs: list[dict[str, npt.NDArray[Any]]],
    method: str,
) -> onnx.ModelProto:
    """Quantize a prepared model with ModelOpt.

    Raises:
        MissingDependencyError: it is not installed.
        M3adError: it has no such method, cannot store weights alone, or is asked for convolutions.
        ArtifactError: it left a product of the plan as it was.
    """
    chosen = qdq.products(model, stage, plan)
    if qdq.has_convolutions(model, stage, plan):
        raise M3adError(
            f"{stage} has convolutions, which --engine modelopt does not quantize here; use --engine onnxruntime"
        )
    try:
        from modelopt.onnx.quantization import quantize
    except ImportError as error:
        raise MissingDependencyError(
            "nvidia-modelopt is not installed; give it an environment of its own (pip install "
            "'m3ad[calibrate,modelopt]') or use --engine onnxruntime"
        ) from error
    if method not in ("max", "entropy"):
        raise M3adError(
            f"ModelOpt calibrates by max or entropy, got {method!r}; use --engine onnxruntime for it"
        )
    if not chosen:
        return copy.deepcopy(model)
    if "int8_weights" in chosen.values():
        raise M3adError(
            "the plan has int8_weights entries, which ModelOpt cannot write; use --engine onnxruntime"
        )
    kept = [
        n.name for n in model.graph.node if n.op_type in ("MatMul", "Gemm", "Conv") and n.name not in chosen
    ]
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.onnx", Path(folder) / "out.onnx"
        onnx.save(model, source)
        data = {name: np.concatenate([run[name] for run in runs]) for name in runs[0]}
        # Else ModelOpt takes a dynamic number of rows for 1, the products for matrix times vector, and skips them.
        shapes = ",".join(f"{name}:{'x'.join(map(str, value.shape))}" for name, value in runs[0].items())
        quantize(
            str(source),
            quantize_mode=plan.precision,
            calibration_data=data,
            calibration_method=method,
            calibration_shapes=shapes,
            calibration_eps=["cpu"],
            op_types_to_quantize=["MatMul"],
            nodes_to_exclude=kept,
            high_precision_dtype="fp32",
            output_path=str(target),
        )
        written = onnx.load(target)

    def store_and_place(graph: gs.Graph) -> None:
        _store_weights(graph)
        keep_outputs(graph)
        own_pairs(graph.cleanup())
        qdq.verify(graph, chosen)

    return edited(written, store_and_place)


def _store_weights(graph: gs.Graph) -> None:
    """Replace each QuantizeLinear of an initializer, as ModelOpt leaves them, by what it computes."""
    for node in graph.nodes:
        if node.op != "QuantizeLinear" or not isinstance(node.inputs[0], gs.Constant):
            continue
        weight, scale, zero = (tensor.values for tensor in node.inputs)
        if scale.ndim:
            axis = node.attrs.get("axis", 1)
            scale = np.expand_dims(scale, [d for d in range(weight.ndim) if d != axis])
        steps = weight / scale
        if zero.dtype == np.int8:
            steps = np.clip(np.rint(steps), -128, 127)
        (stored,) = node.outputs
        node.outputs.clear()
        stored.to_constant(steps.astype(zero.dtype))
