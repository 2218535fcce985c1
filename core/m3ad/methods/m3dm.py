"""M3DM: each modality's features against a bank of those of good parts, and with UFF the fused ones against a third.

Nothing is trained. How far a feature lies from its nearest row of the bank is a score. RGB stays on its own grid, the
3D features lie on 56 x 56 cells. All maps are upsampled and blurred, and a one-class SVM's weights add them up. The
network that fuses features (UFF) is the authors' alone; `m3dm` does without it, `m3dm_uff` wants their file.
"""

import numpy as np
import numpy.typing as npt

from m3ad.contract import Dims, Stage, Tensor
from m3ad.method import CpuForm, DenseGraph, Method, Use
from m3ad.methods import common

CELL_SIDE = 56
CELLS = CELL_SIDE * CELL_SIDE
UNIT = 1000.0  # M3DM with two banks divides distances by it before it weighs them, with three it does not
SIDES = ("rgb", "xyz")  # the banks, in the order of scores and maps
UFF_SIDES = ("xyz", "rgb", "fusion")
SCALED = "to the nearest row of the bank, scaled"
MAPS_UNIT = "distance to the bank, blurred"


def token_of_cell(rgb_side: int) -> npt.NDArray[np.int32]:
    """The RGB token that each cell lies on, [3136] int32, where tokens are repeated to the cells' grid.

    Raises:
        ValueError: the grid is no multiple of the tokens'.
    """
    if CELL_SIDE % rgb_side:
        raise ValueError(
            f"UFF repeats RGB tokens to {CELL_SIDE} x {CELL_SIDE} cells, got {rgb_side} x {rgb_side}"
        )
    at = np.arange(CELL_SIDE, dtype=np.int32) // (CELL_SIDE // rgb_side)
    return (at[:, None] * rgb_side + at).reshape(-1)


def stages(dims: Dims) -> dict[str, Stage]:
    """extractors -> cells -> bank -> vote."""
    before, (rgb_tokens, cells), by_side = _shared(dims)
    largest = Tensor("bank_scores", (2,), unit="largest distance of RGB and XYZ, weighed by its neighbours")
    distances = tuple(by_side[side] for side in SIDES)
    table = (
        *before,
        Stage("bank", (rgb_tokens, cells), (*distances, largest)),
        Stage(
            "vote",
            (*distances, largest),
            common.verdict(dims, "weighted sum of both distances", MAPS_UNIT),
        ),
    )
    return {stage.name: stage for stage in table}


def uff_stages(dims: Dims) -> dict[str, Stage]:
    """extractors -> cells -> uff -> bank -> vote."""
    before, (rgb_tokens, cells), by_side = _shared(dims)
    halves = (
        Tensor("rgb_half", (dims.rgb_tokens, dims.rgb_width), unit="of a fused row, on RGB's own grid"),
        Tensor("xyz_half", (CELLS, dims.xyz_width), unit="of a fused row"),
    )
    largest = Tensor(
        "bank_scores", (3,), unit="largest distance of XYZ, RGB and fusion, weighed by its neighbours"
    )
    distances = tuple(by_side[side] for side in UFF_SIDES)
    table = (
        *before,
        Stage("uff", (rgb_tokens, cells), halves),
        Stage("bank", (rgb_tokens, cells, *halves), (*distances, largest)),
        Stage(
            "vote",
            (*distances, largest),
            common.verdict(dims, "weighted sum of three distances", MAPS_UNIT),
        ),
    )
    return {stage.name: stage for stage in table}


def _shared(dims: Dims) -> tuple[tuple[Stage, ...], tuple[Tensor, Tensor], dict[str, Tensor]]:
    """The stages before the banks, what those are asked, and their distances."""
    rgb_tokens, (centers, xyz_tokens) = common.rgb_tokens(dims), common.xyz_tokens(dims)
    cells = Tensor("xyz_cells", (CELLS, dims.xyz_width))
    before = (
        common.rgb_extractor(dims),
        common.xyz_extractor(dims),
        Stage("cells", (xyz_tokens, centers, common.POINTS, common.POINT_PIXEL), (cells,)),
    )
    distances = {
        "rgb": Tensor("rgb_distance", (dims.rgb_tokens,), unit=SCALED),
        "xyz": Tensor("xyz_distance", (CELLS,), unit=SCALED),
        "fusion": Tensor("fusion_distance", (CELLS,), unit=SCALED),
    }
    return before, (rgb_tokens, cells), distances


CPU = {
    "rgb_extractor": common.RGB_CPU,
    "xyz_extractor": common.XYZ_CPU,
    "cells": CpuForm("cells", output_size=CELL_SIDE),
    "vote": CpuForm("graph", ("vote.onnx",)),
}
GRAPHS = (
    common.RGB_GRAPH,
    common.XYZ_GRAPH,
    DenseGraph("bank", ("chain",), may_quantize=False),
    DenseGraph("vote", ("chain",), "map"),
)
METHOD = Method(
    name="m3dm",
    title="M3DM",
    inputs=("image", "points", "point_pixel"),
    stages=stages,
    layouts={"chain": (*common.EXTRACTORS, Use("cells"), Use("bank"), Use("vote"))},
    cpu={
        **CPU,
        "bank": CpuForm("nearest", ("bank.onnx", "bank_rgb.rows", "bank_xyz.rows", "bank.npz")),
    },
    # A product of lower precision would choose other candidates; what is gained is in the extractors.
    graphs=GRAPHS,
    score_maps=len(SIDES),
    group_size=128,
    reduced={"frames": 8},
)
UFF_METHOD = Method(
    name="m3dm_uff",
    title="M3DM with UFF",
    inputs=METHOD.inputs,
    stages=uff_stages,
    layouts={"chain": (*common.EXTRACTORS, Use("cells"), Use("uff"), Use("bank"), Use("vote"))},
    cpu={
        **CPU,
        "uff": CpuForm("halves", ("uff_rgb.onnx", "uff_xyz.onnx", "uff.weights")),
        "bank": CpuForm(
            "nearest",
            (
                "bank.onnx",
                "bank_rgb.rows",
                "bank_xyz.rows",
                "bank_fusion_xyz.rows",
                "bank_fusion_rgb.rows",
                "bank.npz",
            ),
        ),
    },
    # The bank's rows were made in fp32, too.
    graphs=(
        *GRAPHS[:2],
        DenseGraph("uff_rgb", ("chain",), may_quantize=False),
        DenseGraph("uff_xyz", ("chain",), may_quantize=False),
        *GRAPHS[2:],
    ),
    score_maps=len(UFF_SIDES),
    group_size=METHOD.group_size,
    reduced=METHOD.reduced,
)
METHODS = (METHOD, UFF_METHOD)
