"""The fused head in ONNX: one graph for TensorRT and any ONNX runtime, and its plugin-free parts for the CPU."""

from pathlib import Path

import onnx
from m3ad.contract import IMAGE_SIZE, Dims, Stage, Tensor, stages
from onnx import compose, helper, parser
from torch import nn

from m3ad_export.detector import Detector, RgbRows
from m3ad_export.fused import HeadRows, HeadTokens
from m3ad_export.onnx_export import (
    dense_model,
    model_with_ops,
    op_node,
    opset_of,
    verify_interface,
    verify_not_frozen,
)
from m3ad_export.voting import HeadVote

# Rows of a tile. On a CPU a smaller one stays in the caches (per row 0.93 of 2048's time, measured) and wastes less of
# the last tile; on a device it would be all launches.
CPU_TILE_ROWS, DEVICE_TILE_ROWS = 512, 2048
HEAD_PARTS = ("head_tokens", "head_rows", "head_vote")


def head_stages(detector: Detector) -> dict[str, tuple[nn.Module, Stage]]:
    """The plugin-free parts of `head`, each with its module, described like stages; the CPU runs them one by one."""
    dims = detector.dims
    table = stages(dims)
    rgb_tokens, _, xyz_tokens, *_ = table["head"].inputs
    tokens = HeadTokens(detector.mfm, detector.mgm)
    rgb_width = dims.rgb_width + len(tokens.rgb_weight)
    xyz_width = dims.xyz_width + len(tokens.xyz_weight)
    tables = (
        Tensor("rgb_table", (dims.rgb_tokens, rgb_width)),
        Tensor("xyz_table", (dims.groups, xyz_width)),
    )
    rows = (Tensor("rgb_rows", (CPU_TILE_ROWS, rgb_width)), Tensor("xyz_rows", (CPU_TILE_ROWS, xyz_width)))
    scored_pixel = table["vm"].inputs[-1]
    return {
        "head_tokens": (tokens, Stage("head_tokens", (rgb_tokens, xyz_tokens), tables)),
        "head_rows": (
            HeadRows(detector.mfm, detector.mgm),
            Stage("head_rows", rows, (Tensor("scores", (3, CPU_TILE_ROWS)),)),
        ),
        "head_vote": (
            HeadVote(detector.vm),
            Stage("head_vote", (Tensor("scores", (3, "R")), scored_pixel), table["head"].outputs),
        ),
    }


def write_head(detector: Detector, folder: Path) -> None:
    """Write `head.onnx` of the fused layout and the plugin-free parts of it that the CPU runs into `folder`."""
    parts = {name: dense_model(module, stage) for name, (module, stage) in head_stages(detector).items()}
    for name, part in parts.items():
        onnx.save(part, folder / f"{name}.onnx")
    onnx.save(head_model(detector.dims, **parts), folder / "head.onnx")
    verify_interface(folder / "head.onnx", stages(detector.dims)["head"])
    verify_not_frozen(folder / "head.onnx")


def head_model(
    dims: Dims, head_tokens: onnx.ModelProto, head_rows: onnx.ModelProto, head_vote: onnx.ModelProto
) -> onnx.ModelProto:
    """The three parts as one graph: TokenInterpolate and bilinear taps between them, the rows in a loop over tiles."""
    stage = stages(dims)["head"]
    head_rows = with_tile(head_rows, DEVICE_TILE_ROWS)
    opset = max(opset_of(part) for part in (head_tokens, head_rows, head_vote))
    rgb_table, xyz_table = (_tensor(v) for v in head_tokens.graph.output)
    rgb_rows, xyz_rows = (_tensor(v) for v in head_rows.graph.input)
    scored_pixel = stages(dims)["vm"].inputs[-1]
    bilinear = dense_model(
        RgbRows(dims.rgb_side),
        Stage("bilinear", (rgb_table, Tensor("tile_pixel", (DEVICE_TILE_ROWS,), "int32")), (rgb_rows,)),
    )
    interpolate = op_node(
        "TokenInterpolate",
        ["points", "point_pixel", "centers", xyz_table.name],
        ["xyz_all", scored_pixel.name],
        image_size=IMAGE_SIZE,
    )
    bilinear, head_rows = (prefixed(m, m.graph.name) for m in (bilinear, head_rows))
    body = tile_loop_body(bilinear.graph, head_rows.graph)
    width = xyz_rows.dims[1]
    tiling = parser.parse_graph(f"""
    tiling (int32[R] scored_pixel, float[R, {width}] xyz_all) => (float[3, R] scores) {{
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
    dense = [prefixed(m, m.graph.name) for m in (head_tokens, head_vote)]
    return model_with_ops(
        stage,
        [*dense[0].graph.node, interpolate, *nodes, *dense[1].graph.node],
        [i for m in (*dense, bilinear, head_rows) for i in m.graph.initializer],
        opset,
    )


def with_tile(head_rows: onnx.ModelProto, rows: int) -> onnx.ModelProto:
    """A copy of `head_rows` for tiles of another size; nothing in it but its inputs and outputs speaks of the size."""
    resized = onnx.ModelProto()
    resized.CopyFrom(head_rows)
    for value in resized.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = rows
    resized.graph.output[0].type.tensor_type.shape.dim[1].dim_value = rows
    del resized.graph.value_info[:]
    return resized


def tile_loop_body(bilinear: onnx.GraphProto, head_rows: onnx.GraphProto) -> onnx.GraphProto:
    """One trip: the tile's pixels and rows cut out, both tables' rows, scores [3, T] stacked by the loop.

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
    return helper.make_graph(
        [*cut.node, *bilinear.node, *head_rows.node], "tile", list(cut.input), list(cut.output)
    )


def prefixed(model: onnx.ModelProto, prefix: str) -> onnx.ModelProto:
    """A copy whose inner values and weights are named apart; inputs and outputs keep their names."""
    kept = {v.name for v in (*model.graph.input, *model.graph.output)}
    renamed = compose.add_prefix(model, f"{prefix}.", rename_inputs=False, rename_outputs=False)
    assert kept == {v.name for v in (*renamed.graph.input, *renamed.graph.output)}
    return renamed


def _tensor(value: onnx.ValueInfoProto) -> Tensor:
    return Tensor(value.name, tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim))
