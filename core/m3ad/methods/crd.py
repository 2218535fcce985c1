"""CRD and TRD: each modality's levels of one frozen network, rebuilt by a student that leans on the other modality.

They differ in what the networks see of the cloud: CRD its depth as an image, TRD its surface normals. `rgb_width` of
the sizes is the channels of the network's first level; they double from level to level.
"""

from itertools import product

from m3ad.contract import GRID_SIZE, Dims, Geometry, Stage, Tensor
from m3ad.method import CpuForm, DenseGraph, Method, Use
from m3ad.methods import common

SIZE = GRID_SIZE["depth"]
SIDES = (64, 32, 16)  # of the levels
MODALITIES = ("rgb", "depth")


def levels(dims: Dims, name: str) -> tuple[Tensor, ...]:
    """Three maps of a modality: [1, C, 64, 64], [1, 2 C, 32, 32], [1, 4 C, 16, 16]."""
    return tuple(
        Tensor(f"{name}{i + 1}", (1, dims.rgb_width << i, side, side), values="finite")
        for i, side in enumerate(SIDES)
    )


def stages(dims: Dims) -> dict[str, Stage]:
    """teacher -> a student of each modality -> vote."""
    image, depth = (
        Tensor(name, (1, 3, SIZE, SIZE), unit=f"ImageNet-normalised {unit}")
        for name, unit in (("image", "RGB"), ("depth_image", "depth, three times, or surface normals"))
    )
    rgb, cloud = levels(dims, "rgb_level"), levels(dims, "depth_level")
    rgb_mixed, cloud_mixed = levels(dims, "rgb_mixed"), levels(dims, "depth_mixed")
    verdict = common.verdict(
        dims, "sum of both modalities' standardised errors", "the standardised error of a modality", SIZE
    )
    table = (
        Stage("teacher", (image, depth), (*rgb, *cloud)),
        Stage("rgb_student", (*rgb, *cloud), rgb_mixed),
        Stage("depth_student", (*cloud, *rgb), cloud_mixed),
        Stage("vote", (*rgb, *cloud, *rgb_mixed, *cloud_mixed), verdict),
    )
    return {stage.name: stage for stage in table}


STAGES = ("teacher", "rgb_student", "depth_student", "vote")
PARTS = {
    "filter": r"projector_filter\b",
    "amplifier": r"projector_amply\b",
    "bottleneck": r"bn(\.bn_layer\.\d+)?\b",
    "decoder": r"decoder\b",
}


def _method(name: str, title: str, geometry: Geometry) -> Method:
    return Method(
        name=name,
        title=title,
        inputs=("image", "depth_image"),
        stages=stages,
        layouts={"chain": tuple(map(Use, STAGES))},
        cpu={stage: CpuForm("graph", (f"{stage}.onnx",)) for stage in STAGES},
        graphs=(
            *(DenseGraph(stage, ("chain",)) for stage in STAGES[:-1]),
            DenseGraph("vote", ("chain",), "map"),
        ),
        groups={
            **{f"teacher layer {k}": rf"^teacher:network\.layer{k}\b" for k in (1, 2, 3)},
            **{
                f"{'RGB' if side == 'rgb' else geometry} {part}": rf"^{side}_student:{pattern}"
                for side, (part, pattern) in product(MODALITIES, PARTS.items())
            },
        },
        score_maps=2,
        geometry=geometry,
        plane="corners",
        reduced={"steps": 6, "batch": 1},
    )


METHODS = (_method("crd", "CRD", "depth"), _method("trd", "TRD", "normals"))
