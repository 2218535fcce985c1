"""A detector's chain as stages in PyTorch; with the custom ops between the modules they are what parity is held to."""

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
from m3ad.contract import Stage
from m3ad.method import CpuForm
from m3ad_plugins import ops
from m3ad_runtime.stages import Interpolated, Patches, StageFunction, operators
from m3ad_runtime.windows import whole_grid
from torch import nn

from m3ad_export.detector import Detector, call
from m3ad_export.methods import IMPLEMENTATIONS

Arrays = Mapping[str, npt.NDArray[Any]]


def stage_functions(detector: Detector) -> dict[str, StageFunction]:
    """Each stage of the chain layout in PyTorch.

    They run in `m3ad_runtime.pipeline.Pipeline` like any runtime's.
    """
    contract = detector.contract
    implementation = IMPLEMENTATIONS[contract.method.name]
    graphs = implementation.graphs(detector)
    functions: dict[str, StageFunction] = {}
    for name in dict.fromkeys(step.stage for step in contract.steps("chain")):
        form, stage = contract.method.cpu[name], contract.stages[name]
        if form.kind == "grouped":
            functions[name] = _grouped(detector)
        elif form.kind == "patches":
            functions[name] = Patches(contract.dims)
        elif form.kind == "interpolated":
            functions[name] = Interpolated(contract.dims)
        elif form.kind == "pixel_layer":
            functions[name] = _pixel_layer(detector, graphs[form.files[0].removesuffix(".onnx")])
        elif form.kind == "windowed":
            functions[name] = _windowed(graphs[form.files[0].removesuffix(".onnx")], stage, form)
        else:
            functions[name] = _dense(detector.rgb if name == "rgb_extractor" else graphs[name], stage)
    return functions


def _dense(module: nn.Module | None, stage: Stage) -> StageFunction:
    assert module is not None
    inputs, outputs = [t.name for t in stage.inputs], [t.name for t in stage.outputs]

    def run(arrays: Arrays) -> dict[str, npt.NDArray[Any]]:
        return dict(zip(outputs, call(module, *(arrays[name] for name in inputs)), strict=True))

    return run


def _grouped(detector: Detector) -> StageFunction:
    xyz = detector.xyz
    assert xyz is not None
    config = xyz.config

    def run(arrays: Arrays) -> dict[str, npt.NDArray[Any]]:
        points = arrays["points"]
        idx, neighborhood, _ = ops.point_group(
            points, config.groups, config.group_size, config.min_norm_sq, arrays["point_pixel"]
        )
        (tokens,) = call(xyz, neighborhood, points[idx])
        return {"centers": points[idx], "xyz_tokens": tokens}

    return run


def _pixel_layer(detector: Detector, rest: nn.Module) -> StageFunction:
    weights_of = IMPLEMENTATIONS[detector.record["method"]].pixel_weights
    assert weights_of is not None
    weights, dims = weights_of(detector), detector.dims

    def run(arrays: Arrays) -> dict[str, npt.NDArray[Any]]:
        pixel = arrays["scored_pixel"]
        rows = arrays.get("xyz_features")
        if rows is None:  # every row is formed here, which the CPU stage does not do
            rows = operators(arrays, dims)["xyz"].apply(arrays["xyz_tokens"])
        (rebuilt,) = call(rest, weights[pixel], rows, pixel)
        return {"xyz_rebuilt": rebuilt}

    return run


def _windowed(module: nn.Module, stage: Stage, form: CpuForm) -> StageFunction:
    (output,) = stage.outputs
    (tokens, _) = stage.inputs

    def run(arrays: Arrays) -> dict[str, npt.NDArray[Any]]:
        # The whole grid is computed here, which the CPU stage does not do.
        (rows,) = call(module, arrays[tokens.name], *whole_grid(arrays["scored_pixel"], form.window))
        return {output.name: rows}

    return run
