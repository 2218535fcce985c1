"""Mentor3AD: a mentor feature fused from both modalities (MFM) guides the reconstruction of each (MGM); VM votes."""

from m3ad.contract import Dims, Stage
from m3ad.method import CpuForm, DenseGraph, Method, Pair, Use
from m3ad.methods import common
from m3ad.methods.common import rows


def stages(dims: Dims) -> dict[str, Stage]:
    """The stages of both layouts."""
    rgb, xyz = common.features(dims)
    mentor = rows("mentor", dims.mentor_width)
    rgb_rec = rows("rgb_reconstructed", dims.rgb_width)
    xyz_rec = rows("xyz_reconstructed", dims.xyz_width)
    mentor_rec = rows("mentor_reconstructed", dims.mentor_width)
    verdict = common.verdict(dims, "one-class SVM decision", "1 - cos in multiples of the expected, smoothed")
    table = (
        common.rgb_extractor(dims),
        common.xyz_extractor(dims),
        common.project(dims),
        Stage("mfm", (rgb, xyz), (mentor,)),
        Stage("mgm", (rgb, xyz, mentor), (rgb_rec, xyz_rec)),
        Stage("vm", (rgb, rgb_rec, xyz, xyz_rec, mentor, mentor_rec, common.SCORED_PIXEL), verdict),
        Stage("head", common.tokens(dims), verdict),
    )
    return {stage.name: stage for stage in table}


SECOND_PASS = {
    "rgb_features": "rgb_reconstructed",
    "xyz_features": "xyz_reconstructed",
    "mentor": "mentor_reconstructed",
}
METHOD = Method(
    name="mentor3ad",
    title="Mentor3AD",
    inputs=common.INPUTS,
    stages=stages,
    layouts={
        "chain": (
            *common.EXTRACTORS,
            Use("project"),
            Use("mfm"),
            Use("mgm"),
            Use("mfm", SECOND_PASS),
            Use("vm"),
        ),
        "fused": (*common.EXTRACTORS, Use("head")),
    },
    cpu=common.CPU
    | {
        "mfm": CpuForm("graph", ("mfm.onnx",)),
        "mgm": CpuForm("graph", ("mgm.onnx",)),
        "vm": CpuForm("graph", ("vm.onnx",)),
    },
    graphs=(
        common.RGB_GRAPH,
        common.XYZ_GRAPH,
        DenseGraph("mfm", ("chain",), "rows"),
        DenseGraph("mgm", ("chain",), "rows"),
        DenseGraph("vm", ("chain",), "map"),
        *common.HEAD_GRAPHS,
    ),
    # The reconstructions come in the basis of MFM's first layer: the columns it reads, and the rest.
    pairs=(
        Pair("rgb_rotated", ("rgb_reconstructed_row_space", "rgb_reconstructed_null_space")),
        Pair("xyz_rotated", ("xyz_reconstructed_row_space", "xyz_reconstructed_null_space")),
        Pair("mentor", ("mentor_reconstructed",)),
    ),
    # The same layers in both layouts; the fused head runs MFM's first layers and the feature half of MGM's on tokens.
    groups={
        "MFM's first layers, chain": r"^mfm:\w+_branch\.first/",
        "first layers": r"^head_tokens:|^mgm:to_\w+\.input/",
        "branches": r"^(mfm:|head_rows:mfm\.)\w+_branch\.last/",
        "fusion": r"^(mfm:|head_rows:mfm\.)fusion\.",
        "guidance": r"^mgm:mentor_to_|^head_rows:to_\w+(\.mentor_layer)?/",
        "projection": r"^(mgm|head_rows):to_\w+\.projection/",
        "output": r"^mgm:to_\w+\.output/|^head_rows:\w+_output\.",
        "second pass": r"^head_rows:\w+_again/",
    },
    takes_lattice=True,
    reduced={"align_steps": 100, "guide_steps": 150},
)
