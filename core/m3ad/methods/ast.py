"""AST: a normalising flow and a plain network see the features of an image and the depth of the part alike.

`rgb_width` of the sizes is the channels of the image's features; the depth adds 64, those of a cell's pixels.
"""

from m3ad.contract import GRID_SIZE, RGB_SIZE, Dims, Stage, Tensor
from m3ad.method import CpuForm, DenseGraph, Method, Use
from m3ad.methods import common

SIZE, IMAGE = GRID_SIZE["relief"], RGB_SIZE["relief"]
SIDE = IMAGE // 32  # of the grid
DEPTH_CHANNELS = (SIZE // SIDE) ** 2


def stages(dims: Dims) -> dict[str, Stage]:
    """rgb_encoder -> teacher and student -> vote."""
    image = Tensor("image", (1, 3, IMAGE, IMAGE), unit="ImageNet-normalised RGB")
    grid = Tensor("rgb_grid", (1, dims.rgb_width, SIDE, SIDE), values="finite")
    depth = Tensor(
        "relief", (1, 1, SIZE, SIZE), unit="cm about the part's mean, 0 off the part", values="finite"
    )
    mask = Tensor("relief_mask", (1, 1, SIDE, SIDE), unit="share of the part in a cell", values="finite")
    latents = tuple(
        Tensor(f"{name}_latent", (1, dims.rgb_width + DEPTH_CHANNELS, SIDE, SIDE), values="finite")
        for name in ("teacher", "student")
    )
    verdict = common.verdict(dims, "squared difference of both latents", "the same", SIZE)
    table = (
        Stage("rgb_encoder", (image,), (grid,)),
        Stage("teacher", (grid, depth), latents[:1]),
        Stage("student", (grid, depth), latents[1:]),
        Stage("vote", (*latents, mask), verdict),
    )
    return {stage.name: stage for stage in table}


STAGES = ("rgb_encoder", "teacher", "student", "vote")
METHOD = Method(
    name="ast",
    title="AST",
    inputs=("image", "relief", "relief_mask"),
    stages=stages,
    layouts={"chain": tuple(map(Use, STAGES))},
    cpu={stage: CpuForm("graph", (f"{stage}.onnx",)) for stage in STAGES},
    graphs=(
        *(DenseGraph(stage, ("chain",)) for stage in STAGES[:-1]),
        DenseGraph("vote", ("chain",), "map"),
    ),
    groups={
        **{
            f"encoder blocks {10 * k} to {10 * k + 9}": rf"^rgb_encoder:_blocks\.{k or ''}\d\."
            for k in range(4)
        },
        **{f"coupling {k}": rf"^teacher:.*couplings\.{k}\b" for k in range(4)},
        **{f"residual {k}": rf"^student:.*res\.{k}\b" for k in range(4)},
    },
    score_maps=1,
    geometry="relief",
    plane="corners",
    plane_distance_m=0.007,
    reduced={"steps": 6, "batch": 1},
)
