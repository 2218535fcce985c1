"""CFM: each modality's features mapped to the other's; where a part is as it should be, both mappings meet."""

from m3ad.contract import Dims, Stage
from m3ad.method import CpuForm, DenseGraph, Method, Pair, Use
from m3ad.methods import common
from m3ad.methods.common import rows


def stages(dims: Dims) -> dict[str, Stage]:
    """The stages of both layouts."""
    rgb, xyz = common.features(dims)
    rgb_rec, xyz_rec = rows("rgb_reconstructed", dims.rgb_width), rows("xyz_reconstructed", dims.xyz_width)
    verdict = common.verdict(dims, "product of both chords, smoothed", "chords, smoothed")
    table = (
        common.rgb_extractor(dims),
        common.xyz_extractor(dims),
        common.project(dims),
        Stage("map", (rgb, xyz), (rgb_rec, xyz_rec)),
        Stage("vote", (rgb, rgb_rec, xyz, xyz_rec, common.SCORED_PIXEL), verdict),
        Stage("head", common.tokens(dims), verdict),
    )
    return {stage.name: stage for stage in table}


METHOD = Method(
    name="cfm",
    title="CFM",
    inputs=common.INPUTS,
    stages=stages,
    layouts={
        "chain": (
            *common.EXTRACTORS,
            Use("project"),
            Use("map"),
            Use("vote"),
        ),
        "fused": (*common.EXTRACTORS, Use("head")),
    },
    cpu=common.CPU
    | {
        "map": CpuForm("graph", ("map.onnx",)),
        "vote": CpuForm("graph", ("vote.onnx",)),
    },
    graphs=(
        common.RGB_GRAPH,
        common.XYZ_GRAPH,
        DenseGraph("map", ("chain",), "rows"),
        DenseGraph("vote", ("chain",), "map"),
        *common.HEAD_GRAPHS,
    ),
    pairs=(Pair("rgb_tokens", ("rgb_reconstructed",)), Pair("xyz_tokens", ("xyz_reconstructed",))),
    groups={
        "first layers": r"^head_tokens:|^map:to_\w+\.input/",
        "hidden layers": r"^(map|head_rows):(networks\.)?to_\w+\.projection\w*/",
        "output": r"^(map|head_rows):(networks\.)?to_\w+\.output/",
    },
    score_maps=3,
    group_size=128,
    takes_lattice=True,
    reduced={"steps": 150},
)
