"""M3DM without its fusion: each modality's features against a bank of those of good parts; nothing is trained.

How far a feature lies from its nearest row of the bank is a score. RGB stays on its own grid, the 3D features lie on 56
x 56 cells. Both maps are upsampled and blurred, and a one-class SVM's weights add them up.
"""

from m3ad.contract import Dims, Stage, Tensor
from m3ad.method import CpuForm, DenseGraph, Method, Use
from m3ad.methods import common

CELL_SIDE = 56
CELLS = CELL_SIDE * CELL_SIDE
UNIT = 1000.0  # M3DM with two banks divides distances by it before it weighs them


def stages(dims: Dims) -> dict[str, Stage]:
    """extractors -> cells -> bank -> vote."""
    rgb_tokens, (centers, xyz_tokens) = common.rgb_tokens(dims), common.xyz_tokens(dims)
    cells = Tensor("xyz_cells", (CELLS, dims.xyz_width))
    rgb_distance = Tensor("rgb_distance", (dims.rgb_tokens,), unit="to the nearest row of the bank, scaled")
    xyz_distance = Tensor("xyz_distance", (CELLS,), unit="to the nearest row of the bank, scaled")
    largest = Tensor("bank_scores", (2,), unit="largest distance of RGB and XYZ, weighed by its neighbours")
    table = (
        common.rgb_extractor(dims),
        common.xyz_extractor(dims),
        Stage("cells", (xyz_tokens, centers, common.POINTS, common.POINT_PIXEL), (cells,)),
        Stage("bank", (rgb_tokens, cells), (rgb_distance, xyz_distance, largest)),
        Stage(
            "vote",
            (rgb_distance, xyz_distance, largest),
            common.verdict(dims, "weighted sum of both distances", "distance to the bank, blurred"),
        ),
    )
    return {stage.name: stage for stage in table}


METHOD = Method(
    name="m3dm",
    title="M3DM",
    inputs=("image", "points", "point_pixel"),
    stages=stages,
    layouts={"chain": (*common.EXTRACTORS, Use("cells"), Use("bank"), Use("vote"))},
    cpu={
        "rgb_extractor": common.RGB_CPU,
        "xyz_extractor": common.XYZ_CPU,
        "cells": CpuForm("cells", output_size=CELL_SIDE),
        "bank": CpuForm("nearest", ("bank.onnx", "bank_rgb.rows", "bank_xyz.rows", "bank.npz")),
        "vote": CpuForm("graph", ("vote.onnx",)),
    },
    # A product of lower precision would choose other candidates; what is gained is in the extractors.
    graphs=(
        common.RGB_GRAPH,
        common.XYZ_GRAPH,
        DenseGraph("bank", ("chain",), may_quantize=False),
        DenseGraph("vote", ("chain",), "map"),
    ),
    score_maps=2,
    group_size=128,
    reduced={"frames": 8},
)
