"""BTF: an image's features and the histograms of a cloud's points, side by side against a bank of those of good parts.

Nothing is trained. The histograms (`m3ad.fpfh`) are made as a frame is prepared and come as an input, so that every
stage is a graph of standard operations. `rgb_width` of the sizes is the channels of the image network's first level.
"""

from m3ad.contract import Dims, Stage, Tensor
from m3ad.fpfh import CELLS, WIDTH
from m3ad.method import CpuForm, DenseGraph, Method, Use
from m3ad.methods import common


def row_width(dims: Dims) -> int:
    """Columns of a cell's image features: the channels of the network's second and third level."""
    return 6 * dims.rgb_width


def stages(dims: Dims) -> dict[str, Stage]:
    """rgb_rows -> bank -> vote."""
    rows = Tensor("rgb_rows", (CELLS, row_width(dims)), values="finite")
    histograms = Tensor(
        "fpfh",
        (CELLS, WIDTH),
        unit="histograms, each block of 11 sums to 200 on a full cell",
        values="finite",
    )
    distances = tuple(
        Tensor(name, (CELLS,), unit=unit)
        for name, unit in (
            ("distance", "to the nearest row of the bank"),
            ("rgb_distance", "the image's share of it"),
            ("xyz_distance", "the histograms' share of it"),
        )
    )
    largest = Tensor("bank_score", (1,), unit="largest distance, weighed by its neighbours")
    table = (
        Stage("rgb_rows", (common.IMAGE,), (rows,)),
        Stage("bank", (rows, histograms), (*distances, largest)),
        Stage(
            "vote",
            (*distances, largest),
            common.verdict(
                dims, "distance to the bank, blurred", "a modality's share of the distance, blurred"
            ),
        ),
    )
    return {stage.name: stage for stage in table}


STAGES = ("rgb_rows", "bank", "vote")
METHOD = Method(
    name="btf",
    title="BTF",
    inputs=("image", "fpfh"),
    stages=stages,
    layouts={"chain": tuple(map(Use, STAGES))},
    cpu={stage: CpuForm("graph", (f"{stage}.onnx",)) for stage in STAGES},
    # A product of lower precision would choose other candidates; what is gained is in the image's network.
    graphs=(
        DenseGraph("rgb_rows"),
        DenseGraph("bank", ("chain",), may_quantize=False),
        DenseGraph("vote", ("chain",), "map"),
    ),
    groups={f"image layer {k}": rf"^rgb_rows:network\.layer{k}\b" for k in (1, 2, 3)},
    score_maps=2,
    geometry="fpfh",
    reduced={"frames": 8},
)
