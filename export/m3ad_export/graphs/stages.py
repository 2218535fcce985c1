"""The stages that hold custom ops, composed from a bundle's dense graphs, without torch."""

from collections.abc import Sequence
from pathlib import Path

import onnx
from m3ad.contract import MAX_POINTS, OP_DOMAIN, Layout
from m3ad.method import Contract

from m3ad_export.graphs.compose import (
    ENCODER_GRAPH,
    cells_model,
    patches_model,
    pixel_layer_model,
    project_model,
    windowed_model,
    write_banks,
    write_halves,
    write_xyz_extractor,
)
from m3ad_export.graphs.head import head_model, read_parts
from m3ad_export.graphs.verify import verify_interface, verify_not_frozen


def compose_stages(contract: Contract, layouts: Sequence[Layout], folder: Path) -> None:
    """Write `<stage>.onnx` of every stage that is more than a dense graph, from the dense graphs in `folder`.

    Raises:
        ArtifactError: a graph does not have the contract's tensors, or does not depend on its inputs.
    """
    used = dict.fromkeys(step.stage for layout in layouts for step in contract.steps(layout))
    for name in used:
        form, stage, path = contract.method.cpu[name], contract.stages[name], folder / f"{name}.onnx"
        if form.kind == "grouped":
            write_xyz_extractor(onnx.load(folder / ENCODER_GRAPH), contract, folder)
        elif form.kind == "patches":
            onnx.save(patches_model(stage, contract.dims), path)
        elif form.kind == "interpolated":
            onnx.save(project_model(stage, contract.dims), path)
        elif form.kind == "cells":
            onnx.save(cells_model(stage, form), path)
        elif form.kind == "pixel_layer":
            rest = onnx.load(folder / form.files[0])
            hidden = (folder / form.files[1]).stat().st_size // (4 * MAX_POINTS)
            onnx.save(pixel_layer_model(stage, form, rest, hidden), path)
        elif form.kind == "windowed":
            onnx.save(windowed_model(stage, form, onnx.load(folder / form.files[0])), path)
        elif form.kind == "halves":
            write_halves(stage, form, folder)
        elif form.kind == "nearest":
            write_banks(path, form)
        elif form.kind == "tiled":
            onnx.save(head_model(contract, read_parts(folder)), path)
        verify_interface(path, stage)
        graph = onnx.load(path, load_external_data=False).graph
        if "points" in {t.name for t in stage.inputs} or any(n.domain == OP_DOMAIN for n in graph.node):
            verify_not_frozen(path, has_ops=form.kind != "graph")
