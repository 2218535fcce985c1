"""Shape-Guided: patches of the cloud and cells of the image, each rebuilt from a few of its neighbours in good parts.

A network gives each patch a code. Its nearest codes of good parts rebuild it; how far the patch's points lie off the
surface that the rebuilt code describes is the 3D score. The patches that were found say which features of good images
the cells of this image may be rebuilt from, and what is left of those is the RGB score. `rgb_width` of the sizes is the
channels of the image network's first level, the second has twice as many.
"""

from m3ad.contract import Dims, Stage, Tensor
from m3ad.method import CpuForm, DenseGraph, Method, Use
from m3ad.methods import common

CELL_SIDE = 28
CELLS = CELL_SIDE * CELL_SIDE
PATCH_POINTS = 500


def stages(dims: Dims) -> dict[str, Stage]:
    """patches -> codes -> dictionary -> signed distances -> vote, and rows of the image into the dictionary."""
    neighborhood = Tensor("neighborhood", (dims.groups, dims.group_size, 3), unit="m from a patch's centre")
    members = Tensor("knn_idx", (dims.groups, dims.group_size), "int32", unit="indices of a patch's points")
    rgb_rows = Tensor("rgb_rows", (CELLS, 3 * dims.rgb_width), values="finite")
    codes = Tensor("codes", (dims.groups, dims.xyz_width))
    rebuilt = Tensor("rebuilt_codes", (dims.groups, dims.xyz_width))
    left = Tensor(
        "rgb_residual", (CELLS,), unit="length of what a cell's feature is not made of; 0 off the part"
    )
    largest = Tensor("largest_residuals", (2,), unit="largest residual of RGB cells and of codes")
    distance = Tensor(
        "distance", (dims.groups, dims.group_size), unit="|signed distance| in a patch's extent"
    )
    table = (
        Stage("rgb_rows", (common.IMAGE,), (rgb_rows,)),
        Stage("patches", (common.POINTS, common.POINT_PIXEL), (neighborhood, members)),
        Stage("sdf_encoder", (neighborhood,), (codes,)),
        Stage("dictionary", (codes, rgb_rows, members, common.POINT_PIXEL), (rebuilt, left, largest)),
        Stage("sdf_decoder", (neighborhood, rebuilt), (distance,)),
        Stage(
            "vote",
            (distance, members, common.POINT_PIXEL, left, largest),
            common.verdict(dims, "larger of both scores, blurred", "the score of a modality, blurred"),
        ),
    )
    return {stage.name: stage for stage in table}


STAGES = ("rgb_rows", "patches", "sdf_encoder", "dictionary", "sdf_decoder", "vote")
METHOD = Method(
    name="shape_guided",
    title="Shape-Guided",
    inputs=("image", "points", "point_pixel"),
    stages=stages,
    layouts={"chain": tuple(map(Use, STAGES))},
    cpu={
        name: CpuForm("patches") if name == "patches" else CpuForm("graph", (f"{name}.onnx",))
        for name in STAGES
    },
    # A product of lower precision would choose other rows of the dictionary.
    graphs=(
        DenseGraph("rgb_rows", ("chain",)),
        DenseGraph("sdf_encoder", ("chain",)),
        DenseGraph("dictionary", ("chain",), may_quantize=False),
        DenseGraph("sdf_decoder", ("chain",)),
        DenseGraph("vote", ("chain",), "map"),
    ),
    score_maps=2,
    chooses=True,
    group_size=PATCH_POINTS,
    backbones=("teacher",),
    reduced={"frames": 4, "steps": 20, "batch": 4, "patches": 100},
)
