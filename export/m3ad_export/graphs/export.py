"""Detector -> the ONNX files of a bundle.

Each stage becomes one file whose inputs and outputs are the contract's: its modules are traced, then composed with the
custom ops as the stage's CPU form says.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx
from m3ad.contract import Layout, Stage, Tensor
from m3ad.method import Contract
from m3ad_runtime.onnx_graph import TILE_ROWS
from onnx import helper
from torch import nn

from m3ad_export.detector import Detector
from m3ad_export.graphs.compose import xyz_encoder_stage
from m3ad_export.graphs.head import CPU_TILE_ROWS
from m3ad_export.graphs.stages import compose_stages
from m3ad_export.graphs.trace import dense_model
from m3ad_export.graphs.vote import with_svm
from m3ad_export.heads.tiled import FusedHead, PairScores, pair_names
from m3ad_export.methods import IMPLEMENTATIONS
from m3ad_export.nets.folded_pointnet import folded_encoder


def write_graphs(detector: Detector, layouts: Sequence[Layout], folder: Path) -> None:
    """Write every ONNX file of the layouts into `folder`: the dense graphs, then the stages that hold custom ops.

    Raises:
        ArtifactError: a graph does not depend on its inputs as it must.
    """
    contract = detector.contract
    implementation = IMPLEMENTATIONS[contract.method.name]
    modules = {**implementation.graphs(detector)}
    if detector.rgb:
        modules["rgb_extractor"] = detector.rgb
    if detector.xyz:
        modules["xyz_encoder"] = folded_encoder(detector.xyz)
    weights = implementation.pixel_weights(detector) if implementation.pixel_weights else None
    hidden = weights.shape[1] if weights is not None else 0
    described = {name: (module, dense_stage(contract, name, hidden)) for name, module in modules.items()}
    if implementation.fused and "fused" in layouts:
        described |= head_stages(contract, implementation.fused(detector))
    for graph in contract.method.graphs_of(layouts):
        model = dense_model(*described[graph.name])
        if graph.name == "head_rows":
            helper.set_model_props(model, {TILE_ROWS: str(CPU_TILE_ROWS)})
        if graph.axis == "map" and implementation.svm:
            model = with_svm(model, *implementation.svm(detector))
        onnx.save(model, folder / f"{graph.name}.onnx")
    if weights is not None:
        for file in {form.files[1] for form in contract.method.cpu.values() if form.kind == "pixel_layer"}:
            weights.tofile(folder / file)
    compose_stages(contract, layouts, folder)


def dense_stage(contract: Contract, graph: str, hidden: int) -> Stage:
    """A dense graph of the chain described like a stage; `hidden` is the width of a layer of pixel weights."""
    if graph == "xyz_encoder":
        return xyz_encoder_stage(contract)
    for name, form in contract.method.cpu.items():
        if form.kind == "halves" and graph in contract.method.graphs_in(name):
            whole = contract.stages[name]
            at = contract.method.graphs_in(name).index(graph)
            read, made = whole.inputs[at], whole.outputs[at]
            if at == 1:  # of the cells a CPU asks some
                read, made = (replace(t, dims=("K", *t.dims[1:])) for t in (read, made))
            return Stage(graph, (read,), (made,))
        if form.kind == "pixel_layer" and contract.method.graphs_in(name) == [graph]:
            stage = contract.stages[name]
            (rows,) = stage.outputs
            layer = Tensor("weights", ("K", hidden))
            features = Tensor("features", ("K", contract.dims.xyz_width))
            return Stage(graph, (layer, features, stage.inputs[-1]), (rows,))
        if form.kind == "windowed" and contract.method.graphs_in(name) == [graph]:
            stage = contract.stages[name]
            tokens, scored_pixel = stage.inputs
            window_pixel = Tensor("window_pixel", ("K", form.window), "int32")
            crop_row = Tensor("crop_row", ("H", "W"), "int32")
            return Stage(graph, (tokens, window_pixel, crop_row, scored_pixel), stage.outputs)
    return contract.stages[graph]


def head_stages(contract: Contract, head: FusedHead) -> dict[str, tuple[nn.Module, Stage]]:
    """The dense parts of `head`, each with its module, described like stages.

    A CPU runs them one by one, and the scores as a custom op.
    """
    stage, pairs = contract.stages["head"], contract.method.pairs
    inputs = {t.name: t for t in stage.inputs}
    rgb_tokens, xyz_tokens = inputs["rgb_tokens"], inputs["xyz_tokens"]
    side = {"rgb": rgb_tokens.dims[0], "xyz": xyz_tokens.dims[0]}
    projected = tuple(Tensor(n, (side[n.partition("_")[0]], width)) for n, width in head.projected.items())
    widths = {t.name: t.dims[1] for t in stage.inputs if len(t.dims) > 1}
    widths |= {**head.projected, **head.outputs}

    def rows(names: Sequence[str]) -> tuple[Tensor, ...]:
        return tuple(Tensor(name, ("R", widths[name])) for name in names)

    scores = Tensor("scores", (len(pairs), "R"))
    taken = ("scored_pixel",) if contract.lattice == "all" else ("scored_pixel", "point_pixel")
    pixels = tuple(inputs[name] for name in taken)
    return {
        "head_tokens": (head.tokens, Stage("head_tokens", (rgb_tokens, xyz_tokens), projected)),
        "head_rows": (head.rows, Stage("head_rows", rows(head.inputs), rows([*head.outputs]))),
        "head_scores": (PairScores(pairs), Stage("head_scores", rows(pair_names(pairs)), (scores,))),
        "head_vote": (head.vote, Stage("head_vote", (scores, *pixels), stage.outputs)),
    }
