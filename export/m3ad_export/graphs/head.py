"""The fused head in ONNX: one graph for TensorRT and any ONNX runtime, and its plugin-free parts for the CPU."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
from m3ad.contract import IMAGE_SIZE, Dims, Stage, Tensor, stages
from m3ad.onnx_graph import TILE_ROWS
from m3ad.stages import BLOCKS, TURNED, by_modality
from onnx import compose, helper, parser
from torch import nn

from m3ad_export.detector import Detector, RgbRows
from m3ad_export.graphs.export import (
    dense_model,
    model_with_ops,
    op_node,
    opset_of,
    verify_interface,
    verify_not_frozen,
)
from m3ad_export.heads.fused import FIRST_LAYERS, HeadRows, HeadTokens, TurnedScores
from m3ad_export.heads.voting import HeadVote

# Rows of a tile. On a CPU a smaller one stays in the caches (per row 0.93 of 2048's time, measured); on a device it
# would be all launches.
CPU_TILE_ROWS, DEVICE_TILE_ROWS = 512, 2048
HEAD_PARTS = ("head_tokens", "head_rows", "head_scores", "head_vote")
TILED_PARTS = ("head_rows", "head_scores")


def head_stages(detector: Detector) -> dict[str, tuple[nn.Module, Stage]]:
    """The plugin-free parts of `head`, each with its module, described like stages.

    A CPU runs them one by one, and the scores as a custom op.
    """
    table = stages(detector.dims)
    rgb_tokens, _, xyz_tokens, *_ = table["head"].inputs
    *_, mentor, mentor_rec, scored_pixel = table["vm"].inputs
    tokens, rows = HeadTokens(detector.mfm, detector.mgm), HeadRows(detector.mfm, detector.mgm)
    columns = zip((rgb_tokens, xyz_tokens), by_modality(tokens.widths), strict=True)
    tables = tuple(Tensor(n, (side.dims[0], width)) for side, each in columns for n, width in each.items())
    tiles = {name: Tensor(name, ("R", width)) for name, width in tokens.widths.items()}
    turned = {
        side: tuple(
            Tensor(name, ("R", layer.out_features))
            for name, layer in zip(BLOCKS[side], (output.read, output.rest), strict=True)
        )
        for side, output in (("rgb", rows.rgb_output), ("xyz", rows.xyz_output))
    }
    mentors = (mentor, mentor_rec)
    rgb, xyz = ((tiles[TURNED[side]], *blocks) for side, blocks in turned.items())
    pairs = (*rgb, *xyz, *mentors)
    scores = Tensor("scores", (3, "R"))
    described: list[tuple[nn.Module, Stage]] = [
        (tokens, Stage("head_tokens", (rgb_tokens, xyz_tokens), tables)),
        (
            rows,
            Stage(
                "head_rows",
                tuple(tiles[name] for name in FIRST_LAYERS),
                (*turned["rgb"], *turned["xyz"], *mentors),
            ),
        ),
        (TurnedScores(), Stage("head_scores", pairs, (scores,))),
        (HeadVote(detector.vm), Stage("head_vote", (scores, scored_pixel), table["head"].outputs)),
    ]
    return {stage.name: (module, stage) for module, stage in described}


def write_head(detector: Detector, folder: Path) -> None:
    """Write `head.onnx` of the fused layout and its plugin-free parts into `folder`."""
    parts = {name: dense_model(module, stage) for name, (module, stage) in head_stages(detector).items()}
    helper.set_model_props(parts["head_rows"], {TILE_ROWS: str(CPU_TILE_ROWS)})
    for name, part in parts.items():
        onnx.save(part, folder / f"{name}.onnx")
    onnx.save(head_model(detector.dims, parts), folder / "head.onnx")
    verify_interface(folder / "head.onnx", stages(detector.dims)["head"])
    verify_not_frozen(folder / "head.onnx")


def read_parts(folder: Path) -> dict[str, onnx.ModelProto]:
    """The plugin-free parts from the `onnx` folder of a bundle."""
    return {name: onnx.load(folder / f"{name}.onnx") for name in HEAD_PARTS}


def head_model(dims: Dims, parts: Mapping[str, onnx.ModelProto]) -> onnx.ModelProto:
    """The parts as one graph: TokenInterpolate and bilinear taps between them, the rows in a loop over tiles.

    A modality's tables stand side by side in one, so that they are spread in one go.
    """
    stage = stages(dims)["head"]
    opset = max(opset_of(part) for part in parts.values())
    columns = {v.name: v.type.tensor_type.shape.dim[1].dim_value for v in parts["head_tokens"].graph.output}
    widths = dict(zip(("rgb", "xyz"), by_modality(columns), strict=True))
    rgb_width, xyz_width = (sum(columns.values()) for columns in widths.values())
    bilinear = dense_model(
        RgbRows(dims.rgb_side),
        Stage(
            "bilinear",
            (
                Tensor("rgb_table", (dims.rgb_tokens, rgb_width)),
                Tensor("tile_pixel", (DEVICE_TILE_ROWS,), "int32"),
            ),
            (Tensor("rgb_rows", (DEVICE_TILE_ROWS, rgb_width)),),
        ),
    )
    interpolate = op_node(
        "TokenInterpolate",
        ["points", "point_pixel", "centers", "xyz_table", "scored_pixel"],
        ["xyz_all"],
        image_size=IMAGE_SIZE,
    )
    # The rows carry these names inside the loop.
    tokens = compose.add_prefix(parts["head_tokens"], "head_tokens.", rename_inputs=False)
    joined = [
        helper.make_node(
            "Concat",
            [f"head_tokens.{name}" for name in columns],
            [f"{modality}_table"],
            name=f"{modality}_table",
            axis=1,
        )
        for modality, columns in widths.items()
    ]
    tiled = [prefixed(m, m.graph.name) for m in (bilinear, *(with_tile(parts[n]) for n in TILED_PARTS))]
    body = tile_loop_body(tiled[0].graph, widths, [m.graph for m in tiled[1:]])
    tiling = parser.parse_graph(f"""
    tiling (int32[R] scored_pixel, float[R, {xyz_width}] xyz_all) => (float[3, R] scores) {{
        tile = Constant <value_ints = [{DEVICE_TILE_ROWS}]> ()
        one = Constant <value_ints = [1]> ()
        always = Constant <value = bool {{1}}> ()
        zero = Constant <value_ints = [0]> ()
        flat = Constant <value_ints = [3, -1]> ()
        count = Shape (scored_pixel)
        short = Sub (tile, one)
        padded = Add (count, short)
        tiles = Div (padded, tile)
        trips = Squeeze (tiles, zero)
        rows = Mul (tiles, tile)
        missing = Sub (rows, count)
        pixel_pads = Concat <axis = 0> (zero, missing)
        row_pads = Concat <axis = 0> (zero, zero, missing, zero)
        all_pixel = Pad (scored_pixel, pixel_pads)
        all_rows = Pad (xyz_all, row_pads)
        per_tile = Identity (trips)
        ordered = Transpose <perm = [1, 0, 2]> (tile_scores)
        padded_scores = Reshape (ordered, flat)
        scores = Slice (padded_scores, zero, count, one)
    }}""")
    nodes = list(tiling.node)
    at = next(i for i, n in enumerate(nodes) if n.output[0] == "per_tile")
    nodes[at] = helper.make_node("Loop", ["trips", "always"], ["tile_scores"], name="head_rows", body=body)
    vote = prefixed(parts["head_vote"], "head_vote")
    return model_with_ops(
        stage,
        [*tokens.graph.node, *joined, interpolate, *nodes, *vote.graph.node],
        [i for m in (tokens, vote, *tiled) for i in m.graph.initializer],
        opset,
    )


def with_tile(part: onnx.ModelProto, rows: int = DEVICE_TILE_ROWS) -> onnx.ModelProto:
    """A copy of a part whose tensors have this many rows; nothing else in it speaks of their number."""
    resized = onnx.ModelProto()
    resized.CopyFrom(part)
    for value in (*resized.graph.input, *resized.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == "R":
                dim.dim_value = rows
    del resized.graph.value_info[:]
    return resized


def tile_loop_body(
    bilinear: onnx.GraphProto, widths: Mapping[str, Mapping[str, int]], parts: Sequence[onnx.GraphProto]
) -> onnx.GraphProto:
    """One trip: the tile's pixels, their rows cut out and split, the parts; scores [3, T] are stacked by the loop.

    It reads all_pixel, all_rows and the RGB table of the graph around it.
    """
    cut = parser.parse_graph(f"""
    cut (int64 trip, bool go) => (bool go_on, float[3, {DEVICE_TILE_ROWS}] scores) {{
        go_on = Identity (go)
        rows_of_tile = Constant <value_ints = [{DEVICE_TILE_ROWS}]> ()
        tile_axis = Constant <value_ints = [0]> ()
        start = Mul (trip, rows_of_tile)
        stop = Add (start, rows_of_tile)
        tile_pixel = Slice (all_pixel, start, stop, tile_axis)
        xyz_rows = Slice (all_rows, start, stop, tile_axis)
    }}""")
    split = [
        node
        for modality, columns in widths.items()
        for node in (
            helper.make_node(
                "Constant", [], [f"{modality}_widths"], name=f"{modality}_widths", value_ints=columns.values()
            ),
            helper.make_node(
                "Split",
                [f"{modality}_rows", f"{modality}_widths"],
                list(columns),
                name=f"{modality}_columns",
                axis=1,
            ),
        )
    ]
    nodes = [*cut.node, *bilinear.node, *split, *(node for part in parts for node in part.node)]
    return helper.make_graph(nodes, "tile", list(cut.input), list(cut.output))


def prefixed(model: onnx.ModelProto, prefix: str) -> onnx.ModelProto:
    """A copy whose inner values and weights are named apart; inputs and outputs keep their names."""
    kept = {v.name for v in (*model.graph.input, *model.graph.output)}
    renamed = compose.add_prefix(model, f"{prefix}.", rename_inputs=False, rename_outputs=False)
    assert kept == {v.name for v in (*renamed.graph.input, *renamed.graph.output)}
    return renamed
