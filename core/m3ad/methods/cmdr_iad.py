"""CMDR-IAD: each modality mapped to the other's features and rebuilt from its own; with one modality, rebuilt alone.

The paper's missing-modality modes are by our reading: `rgb` and `xyz` are the limits of the weighted reconstruction in
which the other error has no weight. Their bundles hold and run that modality's networks only.
"""

from collections.abc import Callable
from typing import Literal

from m3ad.contract import Dims, Layout, Stage, Tensor
from m3ad.method import CpuForm, DenseGraph, Method, Pair, Use
from m3ad.methods import common
from m3ad.methods.common import rows

Modality = Literal["both", "rgb", "xyz"]
MODALITIES: tuple[Modality, ...] = ("both", "rgb", "xyz")

WEIGHTS = "xyz_decoder.weights"  # of the XYZ decoder's first layer, one row a pixel of the grid
WINDOW = 128  # consecutive row-major pixels whose attention the RGB decoder has
REACH = 3  # pixels to each side that its three 3 x 3 convolutions look at


def pairs_of(modality: Modality) -> tuple[tuple[str, str], ...]:
    """The features and reconstructions that `vote` compares, in the order of its score rows."""
    mapped = (("rgb_features", "rgb_reconstructed"), ("xyz_features", "xyz_reconstructed"))
    rebuilt = (("rgb_features", "rgb_rebuilt"), ("xyz_features", "xyz_rebuilt"))
    return (
        (*mapped, *rebuilt) if modality == "both" else tuple(p for p in rebuilt if p[0].startswith(modality))
    )


def stages_of(modality: Modality) -> Callable[[Dims], dict[str, Stage]]:
    """The stages of a modality's layouts."""

    def stages(dims: Dims) -> dict[str, Stage]:
        rgb_tokens, (centers, xyz_tokens) = common.rgb_tokens(dims), common.xyz_tokens(dims)
        pixel = common.SCORED_PIXEL
        cloud = (centers, xyz_tokens, common.POINTS, common.POINT_PIXEL, pixel)
        rgb, xyz = common.features(dims)
        rgb_rec, xyz_rec = (
            rows("rgb_reconstructed", dims.rgb_width),
            rows("xyz_reconstructed", dims.xyz_width),
        )
        rgb_new, xyz_new = rows("rgb_rebuilt", dims.rgb_width), rows("xyz_rebuilt", dims.xyz_width)
        by_name = {t.name: t for t in (rgb, xyz, rgb_rec, xyz_rec, rgb_new, xyz_new)}
        compared: tuple[Tensor, ...] = tuple(by_name[n] for pair in pairs_of(modality) for n in pair)
        verdict = common.verdict(
            dims,
            "errors of mapping and reconstruction, fused and smoothed",
            "chords and what they are fused to",
        )
        rgb_decoder = Stage("rgb_decoder", (rgb_tokens, pixel), (rgb_new,))
        xyz_token_decoder = Stage("xyz_token_decoder", cloud, (xyz_new,))
        vote = Stage("vote", (*dict.fromkeys(compared), pixel), verdict)
        tables: dict[Modality, tuple[Stage, ...]] = {
            "both": (
                common.rgb_extractor(dims),
                common.xyz_extractor(dims),
                common.project(dims),
                Stage("map", (rgb, xyz), (rgb_rec, xyz_rec)),
                rgb_decoder,
                Stage("xyz_decoder", (xyz, pixel), (xyz_new,)),
                xyz_token_decoder,
                vote,
                Stage("head", (*common.tokens(dims), rgb_new, xyz_new), verdict),
            ),
            "rgb": (
                common.rgb_extractor(dims),
                Stage("project", (rgb_tokens, pixel), (rgb,)),
                rgb_decoder,
                vote,
            ),
            "xyz": (
                common.xyz_extractor(dims),
                Stage("project", cloud, (xyz,)),
                xyz_token_decoder,
                vote,
            ),
        }
        return {stage.name: stage for stage in tables[modality]}

    return stages


CPU = common.CPU | {
    "map": CpuForm("graph", ("map.onnx",)),
    "rgb_decoder": CpuForm("windowed", ("rgb_decoder_windows.onnx",), window=WINDOW, reach=REACH),
    "xyz_decoder": CpuForm("pixel_layer", ("xyz_decoder_rest.onnx", WEIGHTS)),
    "xyz_token_decoder": CpuForm("pixel_layer", ("xyz_decoder_rest.onnx", WEIGHTS)),
    "vote": CpuForm("graph", ("vote.onnx",)),
}
LAYOUTS: dict[Modality, dict[Layout, tuple[str, ...]]] = {
    "both": {
        "chain": ("rgb_extractor", "xyz_extractor", "project", "map", "rgb_decoder", "xyz_decoder", "vote"),
        "fused": ("rgb_extractor", "xyz_extractor", "rgb_decoder", "xyz_token_decoder", "head"),
    },
    "rgb": {"chain": ("rgb_extractor", "project", "rgb_decoder", "vote")},
    "xyz": {"chain": ("xyz_extractor", "project", "xyz_token_decoder", "vote")},
}
GRAPHS: dict[Modality, tuple[DenseGraph, ...]] = {
    "both": (
        common.RGB_GRAPH,
        common.XYZ_GRAPH,
        DenseGraph("map", ("chain",), "rows"),
        DenseGraph("rgb_decoder_windows"),
        DenseGraph("xyz_decoder_rest"),
        DenseGraph("vote", ("chain",), "map"),
        *common.HEAD_GRAPHS,
    ),
    "rgb": (common.RGB_GRAPH, DenseGraph("rgb_decoder_windows"), DenseGraph("vote", axis="map")),
    "xyz": (common.XYZ_GRAPH, DenseGraph("xyz_decoder_rest"), DenseGraph("vote", axis="map")),
}
INPUTS: dict[Modality, tuple[str, ...]] = {
    "both": common.INPUTS,
    "rgb": ("image", "scored_pixel"),
    "xyz": ("points", "point_pixel", "scored_pixel"),
}
GROUPS = {
    "first layers": r"^head_tokens:|^map:to_\w+\.input/",
    "hidden layers": r"^(map|head_rows):(networks\.)?to_\w+\.projection",
    "output": r"^(map|head_rows):(networks\.)?to_\w+\.output/",
    "RGB windows": r"^rgb_decoder_windows:decoder\.(projection|attn)\b",
    "RGB convolutions": r"^rgb_decoder_windows:decoder\.conv_decoder\b",
    "RGB last layers": r"^rgb_decoder_windows:decoder\.reconstruct\b",
    "XYZ second layer": r"^xyz_decoder_rest:decoder\.projection\b",
    "XYZ deconvolutions": r"^xyz_decoder_rest:decoder\.decoder\b",
    "XYZ gate": r"^xyz_decoder_rest:decoder\.attention\b",
}


def _method(modality: Modality) -> Method:
    wirings = LAYOUTS[modality]
    used = dict.fromkeys(stage for stages in wirings.values() for stage in stages)
    return Method(
        name="cmdr_iad" if modality == "both" else f"cmdr_iad_{modality}",
        title="CMDR-IAD" if modality == "both" else f"CMDR-IAD, {modality} only (our reading)",
        inputs=INPUTS[modality],
        stages=stages_of(modality),
        layouts={layout: tuple(map(Use, stages)) for layout, stages in wirings.items()},
        cpu={stage: CPU[stage] for stage in used},
        graphs=GRAPHS[modality],
        pairs=(
            Pair("rgb_tokens", ("rgb_reconstructed",)),
            Pair("xyz_tokens", ("xyz_reconstructed",)),
            Pair("rgb_tokens", ("rgb_rebuilt",)),
            Pair("xyz_tokens", ("xyz_rebuilt",)),
        )
        if modality == "both"
        else (),
        groups=GROUPS,
        score_maps=6 if modality == "both" else 1,
        group_size=128,
        reduced={"steps": 12},
    )


METHODS = tuple(map(_method, MODALITIES))
