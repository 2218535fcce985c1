"""Tensors and stages that several methods share: extractors, interpolation, and what a frame comes back as."""

from m3ad.contract import IMAGE_SIZE, Dims, Stage, Tensor
from m3ad.method import CpuForm, DenseGraph, Use

PIXEL = "row-major pixel of the 224 x 224 grid"
# The stage does not look at the image's values: Triton's ensemble can wait for ever when its first step answers with an
# error before the second is started. What is not finite makes tokens that are not, which the next stage refuses.
IMAGE = Tensor("image", (1, 3, IMAGE_SIZE, IMAGE_SIZE), unit="ImageNet-normalised RGB")
POINTS = Tensor("points", ("N", 3), unit="m", values="finite")
POINT_PIXEL = Tensor("point_pixel", ("N",), "int32", unit=PIXEL, values="pixels")
SCORED_PIXEL = Tensor("scored_pixel", ("R",), "int32", unit=PIXEL, values="pixels")

RGB_CPU = CpuForm("graph", ("rgb_extractor.onnx",))
XYZ_CPU = CpuForm("grouped", ("xyz_encoder_cpu.onnx", "xyz_encoder.weights"))
PROJECT_CPU = CpuForm("interpolated")
HEAD_CPU = CpuForm("tiled", ("head_tokens.onnx", "head_rows.onnx", "head_vote.onnx"))
CPU = {
    "rgb_extractor": RGB_CPU,
    "xyz_extractor": XYZ_CPU,
    "project": PROJECT_CPU,
    "head": HEAD_CPU,
}
INPUTS = ("image", "points", "point_pixel", "scored_pixel")
EXTRACTORS = (Use("rgb_extractor"), Use("xyz_extractor"))

RGB_GRAPH, XYZ_GRAPH = DenseGraph("rgb_extractor"), DenseGraph("xyz_encoder")
HEAD_GRAPHS = (
    DenseGraph("head_tokens", ("fused",)),
    DenseGraph("head_rows", ("fused",), "rows"),
    DenseGraph("head_scores", ("fused",), "rows", may_quantize=False),
    DenseGraph("head_vote", ("fused",), "map"),
)
HEAD_PARTS = tuple(graph.name for graph in HEAD_GRAPHS)


def rows(name: str, width: int) -> Tensor:
    """One row of features per scored pixel: [R, width]."""
    return Tensor(name, ("R", width))


def rgb_tokens(dims: Dims) -> Tensor:
    """What the RGB encoder makes of the image: [P, D]."""
    return Tensor("rgb_tokens", (dims.rgb_tokens, dims.rgb_width), values="finite")


def xyz_tokens(dims: Dims) -> tuple[Tensor, Tensor]:
    """Centres [G, 3] and tokens [G, D'] of the groups."""
    return Tensor("centers", (dims.groups, 3), unit="m"), Tensor("xyz_tokens", (dims.groups, dims.xyz_width))


def tokens(dims: Dims) -> tuple[Tensor, ...]:
    """All that a stage needs to spread both modalities' tokens over the scored pixels."""
    return (rgb_tokens(dims), *xyz_tokens(dims), POINTS, POINT_PIXEL, SCORED_PIXEL)


def features(dims: Dims) -> tuple[Tensor, Tensor]:
    """Both modalities' rows."""
    return rows("rgb_features", dims.rgb_width), rows("xyz_features", dims.xyz_width)


def rgb_extractor(dims: Dims) -> Stage:
    """image -> rgb_tokens."""
    return Stage("rgb_extractor", (IMAGE,), (rgb_tokens(dims),))


def xyz_extractor(dims: Dims) -> Stage:
    """points, and their pixels for sampling by pixel tiles -> centers, xyz_tokens."""
    return Stage("xyz_extractor", (POINTS, POINT_PIXEL), xyz_tokens(dims))


def project(dims: Dims) -> Stage:
    """Tokens -> one row of features per scored pixel and modality."""
    return Stage("project", tokens(dims), features(dims))


def verdict(
    dims: Dims, map_unit: str, maps_unit: str, size: int = IMAGE_SIZE
) -> tuple[Tensor, Tensor, Tensor]:
    """What every pipeline ends with; maps are size x size."""
    return (
        Tensor("anomaly_map", (size, size), unit=f"{map_unit}, larger is more anomalous"),
        Tensor("score", (1,), unit="image score; a part whose score lies above the threshold is anomalous"),
        Tensor(
            "score_maps",
            (dims.score_maps, size, size),
            unit=f"{maps_unit}; named in the manifest",
        ),
    )
