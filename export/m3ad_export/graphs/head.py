"""The fused head in ONNX: one graph for TensorRT and any ONNX runtime, composed of the parts that a CPU runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
from m3ad.contract import Tensor
from m3ad.method import Contract
from m3ad.methods.common import HEAD_PARTS
from m3ad_runtime.stages import modality_of
from onnx import compose, helper, parser

from m3ad_export.graphs.compose import interpolate_node, model_with_ops, opset_of, rgb_rows

# Rows of a tile. On a CPU a smaller one stays in the caches (per row 0.93 of 2048's time, measured); on a device it
# would be all launches.
CPU_TILE_ROWS, DEVICE_TILE_ROWS = 512, 2048
TILED_PARTS = ("head_rows", "head_scores")


def read_parts(folder: Path) -> dict[str, onnx.ModelProto]:
    """The parts of `head` from the `onnx` folder of a bundle."""
    return {name: onnx.load(folder / f"{name}.onnx") for name in HEAD_PARTS}


def head_model(contract: Contract, parts: Mapping[str, onnx.ModelProto]) -> onnx.ModelProto:
    """The parts as one graph: TokenInterpolate and bilinear taps between them, the rows in a loop over tiles.

    A modality's projected tokens stand side by side, so that they are spread in one go. Rows that the stage is given go
    into the loop as they are.
    """
    stage, dims = contract.stages["head"], contract.dims
    opset = max(opset_of(part) for part in parts.values())
    projected = [v.name for v in parts["head_tokens"].graph.output]
    read = {v.name: _width(v) for name in TILED_PARTS for v in parts[name].graph.input}
    own = [t.name for t in stage.inputs if t.name in read and t.dims[0] != "R"]
    given = [t for t in stage.inputs if t.name in read and t.dims[0] == "R"]
    widths = {
        side: {name: read[name] for name in (*projected, *own) if modality_of(name) == side}
        for side in ("rgb", "xyz")
    }
    bilinear = rgb_rows(dims.rgb_side, "rgb_projected", "tile_pixel", "rgb_rows")
    # The rows carry the tokens' names inside the loop.
    tokens = compose.add_prefix(parts["head_tokens"], "head_tokens.", rename_inputs=False)
    joined = [
        helper.make_node(
            "Concat",
            [f"head_tokens.{name}" if name in projected else name for name in columns],
            [f"{side}_projected"],
            name=f"{side}_projected",
            axis=1,
        )
        for side, columns in widths.items()
    ]
    tiled = [prefixed(with_tile(parts[name]), name).graph for name in TILED_PARTS]
    # A loop's body must not name a value as the graph around it does.
    outside = {t.name for t in stage.inputs}
    for node in (node for graph in tiled for node in graph.node):
        node.input[:] = [_in_tile(name) if name in outside else name for name in node.input]
    pairs = len(contract.method.pairs)
    columns_in_loop = {
        side: {_in_tile(name) if name in outside else name: width for name, width in columns.items()}
        for side, columns in widths.items()
    }
    body = tile_loop_body(bilinear, columns_in_loop, given, tiled, pairs)
    inputs = "".join(f", float[R, {t.dims[1]}] {t.name}" for t in given)
    padded = "".join(f"        all_{t.name} = Pad ({t.name}, row_pads)\n" for t in given)
    tiling = parser.parse_graph(f"""
    tiling (int32[R] scored_pixel, float[R, {sum(widths["xyz"].values())}] xyz_all{inputs})
        => (float[{pairs}, R] scores) {{
        tile = Constant <value_ints = [{DEVICE_TILE_ROWS}]> ()
        one = Constant <value_ints = [1]> ()
        always = Constant <value = bool {{1}}> ()
        zero = Constant <value_ints = [0]> ()
        flat = Constant <value_ints = [{pairs}, -1]> ()
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
{padded}        per_tile = Identity (trips)
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
        [*tokens.graph.node, *joined, interpolate_node("xyz_projected", "xyz_all"), *nodes, *vote.graph.node],
        [i for graph in (tokens.graph, vote.graph, bilinear, *tiled) for i in graph.initializer],
        opset,
    )


def _in_tile(name: str) -> str:
    """The name of a stage input's rows within the loop."""
    return f"{name}_of_tile"


def _width(value: onnx.ValueInfoProto) -> int:
    return int(value.type.tensor_type.shape.dim[1].dim_value)


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
    bilinear: onnx.GraphProto,
    widths: Mapping[str, Mapping[str, int]],
    given: Sequence[Tensor],
    parts: Sequence[onnx.GraphProto],
    pairs: int,
) -> onnx.GraphProto:
    """One trip: the tile's pixels, their rows cut out and split, the parts; scores [pairs, T] are stacked by the loop.

    It reads all_pixel, all_rows, the RGB tokens and the padded rows that are given of the graph around it.
    """
    cuts = "".join(
        f"        {_in_tile(t.name)} = Slice (all_{t.name}, start, stop, tile_axis)\n" for t in given
    )
    cut = parser.parse_graph(f"""
    cut (int64 trip, bool go) => (bool go_on, float[{pairs}, {DEVICE_TILE_ROWS}] scores) {{
        go_on = Identity (go)
        rows_of_tile = Constant <value_ints = [{DEVICE_TILE_ROWS}]> ()
        tile_axis = Constant <value_ints = [0]> ()
        start = Mul (trip, rows_of_tile)
        stop = Add (start, rows_of_tile)
        tile_pixel = Slice (all_pixel, start, stop, tile_axis)
        xyz_rows = Slice (all_rows, start, stop, tile_axis)
{cuts}    }}""")
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
    """A copy whose inner values and weights are named apart; inputs and outputs keep their names.

    It has no function bodies: `add_prefix` would rename the ops too, and the graph it goes into has them.
    """
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.functions[:]
    return compose.add_prefix(bare, f"{prefix}.", rename_inputs=False, rename_outputs=False)
