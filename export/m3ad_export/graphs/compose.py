"""ONNX graphs put together from parts, without torch: where the engines are built there is none.

The custom ops stand in a graph as nodes of domain `m3ad` with their function bodies beside them: any ONNX runtime can
run the file, TensorRT puts its plugins there. The ops are never traced, so no sampled index can be frozen into a
constant; `verify_not_frozen` proves it on the result.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from m3ad.contract import IMAGE_SIZE, MAX_POINTS, OP_DOMAIN, OP_VERSION, OPS, Dims, Stage, Tensor
from m3ad.method import Contract, CpuForm
from m3ad.methods.common import XYZ_CPU
from m3ad_plugins.onnx_functions import function_protos
from m3ad_runtime.stages import bilinear_taps
from m3ad_runtime.windows import whole_grid
from onnx import compose, helper, numpy_helper, parser
from onnx.external_data_helper import set_external_data

from m3ad_export.graphs.fused_attention import fused_attention
from m3ad_export.graphs.row_tiling import row_tiled

OPSET = 18  # TensorRT 10.3 reads up to 20; 18 is what torch's exporter writes without conversion
SMALLEST_EXTERNAL = (
    1024  # bytes of a weight that lies outside its graph; smaller ones are read while a graph is loaded
)
ENCODER_GRAPH = "xyz_encoder.onnx"  # the plain one, which is quantized and composed; a CPU runs another form
ENCODER_FOR_CPU, ENCODER_WEIGHTS = XYZ_CPU.files
PIXEL_WEIGHTS = "pixel_weights"


def value_info(tensor: Tensor) -> onnx.ValueInfoProto:
    """A contract tensor as ONNX writes it; N and R become named dimensions."""
    dtype = {"float32": onnx.TensorProto.FLOAT, "int32": onnx.TensorProto.INT32}[tensor.dtype]
    return helper.make_tensor_value_info(tensor.name, dtype, list(tensor.dims))


def op_node(name: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> onnx.NodeProto:
    """A node of domain `m3ad` with every attribute the contract's op table lists.

    Raises:
        ValueError: attributes or tensors differ from the op table.
    """
    op = OPS[name]
    if (
        set(attributes) != set(op.attributes)
        or len(inputs) != len(op.inputs)
        or len(outputs) != len(op.outputs)
    ):
        raise ValueError(f"{name} takes {op.inputs} -> {op.outputs} with attributes {sorted(op.attributes)}")
    # Up to TensorRT 10.9 the parser looks a plugin up by these two and not by the node's domain.
    lookup = {"plugin_version": str(op.version), "plugin_namespace": OP_DOMAIN}
    return helper.make_node(
        name, list(inputs), list(outputs), name=name, domain=OP_DOMAIN, **attributes, **lookup
    )


def model_with_ops(
    stage: Stage,
    nodes: Sequence[onnx.NodeProto],
    initializers: Sequence[onnx.TensorProto],
    opset: int = OPSET,
) -> onnx.ModelProto:
    """A stage's graph, with the function bodies of the custom ops it uses, all of one opset."""
    graph = helper.make_graph(
        nodes,
        stage.name,
        [value_info(t) for t in stage.inputs],
        [value_info(t) for t in stage.outputs],
        list(initializers),
    )
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(OP_DOMAIN, OP_VERSION)],
        functions=op_bodies(nodes, opset),
        ir_version=9,
    )


def op_bodies(nodes: Iterable[onnx.NodeProto], opset: int) -> list[onnx.FunctionProto]:
    """The function bodies of the custom ops among these nodes, in one version of the standard ops."""
    used = {node.op_type: node for node in nodes if node.domain == OP_DOMAIN}
    svm = used.get("OneClassSvm")
    kernel = helper.get_node_attr_value(svm, "kernel").decode() if svm else "linear"
    bodies = [f for f in function_protos(kernel) if f.name in used]
    for imported in (i for f in bodies for i in f.opset_import if not i.domain):
        imported.version = opset
    return bodies


def opset_of(model: onnx.ModelProto) -> int:
    """The version of the standard ops that a model is written in."""
    return next(int(entry.version) for entry in model.opset_import if not entry.domain)


def xyz_encoder_stage(contract: Contract) -> Stage:
    """The dense part of xyz_extractor, described like a stage; only this room and the CPU stage see it."""
    dims = contract.dims
    neighborhood = Tensor("neighborhood", (dims.groups, dims.group_size, 3), unit="m")
    centers, xyz_tokens = contract.stages["xyz_extractor"].outputs
    return Stage("xyz_encoder", (neighborhood, centers), (xyz_tokens,))


def group_nodes(dims: Dims) -> list[onnx.NodeProto]:
    """points, point_pixel -> idx, neighborhood, knn_idx."""
    sampled = {"num_samples": dims.groups, "min_norm_sq": dims.min_norm_sq}
    return [
        op_node("FarthestPointSample", ["points", "point_pixel"], ["idx"], **sampled),
        op_node("KnnGroup", ["points", "idx"], ["neighborhood", "knn_idx"], group_size=dims.group_size),
    ]


def xyz_extractor_model(encoder: onnx.ModelProto, contract: Contract) -> onnx.ModelProto:
    """points, point_pixel -> FarthestPointSample -> KnnGroup -> the encoder's graph -> centers, xyz_tokens."""
    stage, dims = contract.stages["xyz_extractor"], contract.dims
    nodes = [
        *group_nodes(dims),
        helper.make_node("Gather", ["points", "idx"], ["centers"], name="centers"),
        *encoder.graph.node,
    ]
    return model_with_ops(stage, nodes, encoder.graph.initializer, opset_of(encoder))


def patches_model(stage: Stage, dims: Dims) -> onnx.ModelProto:
    """points, point_pixel -> FarthestPointSample -> KnnGroup -> neighborhood, knn_idx."""
    return model_with_ops(stage, group_nodes(dims), [])


def write_xyz_extractor(encoder: onnx.ModelProto, contract: Contract, folder: Path) -> None:
    """Write the encoder, plain, as a CPU runs it best and as `xyz_extractor.onnx`; all refer to one weights file."""
    others = {
        ENCODER_FOR_CPU: fused_attention(row_tiled(encoder)),
        "xyz_extractor.onnx": xyz_extractor_model(encoder, contract),
    }
    # Not by onnx.save's own option: that refuses a file of this name in the working directory (onnx 1.23).
    for initializer in encoder.graph.initializer:
        if len(initializer.raw_data) >= SMALLEST_EXTERNAL:
            set_external_data(initializer, ENCODER_WEIGHTS)
    onnx.save(encoder, folder / ENCODER_GRAPH)
    external = {i.name: i for i in encoder.graph.initializer if i.data_location == onnx.TensorProto.EXTERNAL}
    for name, model in others.items():
        for initializer in model.graph.initializer:
            if initializer.name in external:
                initializer.CopyFrom(external[initializer.name])
        onnx.save(model, folder / name)
    # onnx writes weights for their owner alone; a server that runs as someone else must read them too.
    (folder / ENCODER_WEIGHTS).chmod((folder / ENCODER_GRAPH).stat().st_mode)


def interpolate_node(tokens: str, rows: str) -> onnx.NodeProto:
    """TokenInterpolate from values of these names, the cloud's by the contract's."""
    inputs = ["points", "point_pixel", "centers", tokens, "scored_pixel"]
    return op_node("TokenInterpolate", inputs, [rows], image_size=IMAGE_SIZE, output_size=IMAGE_SIZE)


def project_model(stage: Stage, dims: Dims) -> onnx.ModelProto:
    """Rows of the modalities that the stage has: TokenInterpolate for 3D tokens, bilinear taps for RGB tokens."""
    outputs = {t.name for t in stage.outputs}
    nodes: list[onnx.NodeProto] = []
    initializers: list[onnx.TensorProto] = []
    if "xyz_features" in outputs:
        nodes.append(interpolate_node("xyz_tokens", "xyz_features"))
    if "rgb_features" in outputs:
        rgb = rgb_rows(dims.rgb_side, "rgb_tokens", "scored_pixel", "rgb_features")
        nodes += rgb.node
        initializers += rgb.initializer
    return model_with_ops(stage, nodes, initializers)


def cells_model(stage: Stage, form: CpuForm) -> onnx.ModelProto:
    """One row of features for each cell of a coarser grid: TokenInterpolate asked for all of them, background too."""
    every = np.arange(form.output_size**2, dtype=np.int32)
    node = op_node(
        "TokenInterpolate",
        ["points", "point_pixel", "centers", "xyz_tokens", "every_cell"],
        [stage.outputs[0].name],
        image_size=IMAGE_SIZE,
        output_size=form.output_size,
    )
    return model_with_ops(stage, [node], [numpy_helper.from_array(every, "every_cell")])


def pixel_layer_model(stage: Stage, form: CpuForm, rest: onnx.ModelProto, hidden: int) -> onnx.ModelProto:
    """A layer with a weight for each pixel: its rows of the scored pixels, their features, then the graph behind it.

    The weights lie in a file of their own, `form.files[1]`, whose bytes are the matrix [50176, hidden].
    """
    features = "xyz_features"
    nodes: list[onnx.NodeProto] = []
    if features not in {t.name for t in stage.inputs}:
        nodes.append(interpolate_node("xyz_tokens", features))
    nodes.append(helper.make_node("Gather", [PIXEL_WEIGHTS, "scored_pixel"], ["weights"], name="weights"))
    renamed = onnx.ModelProto()
    renamed.CopyFrom(rest)
    for node in renamed.graph.node:
        node.input[:] = [features if name == "features" else name for name in node.input]
    weights = onnx.TensorProto(
        name=PIXEL_WEIGHTS, data_type=onnx.TensorProto.FLOAT, dims=[MAX_POINTS, hidden]
    )
    weights.data_location = onnx.TensorProto.EXTERNAL
    length = 4 * MAX_POINTS * hidden
    for key, value in (("location", form.files[1]), ("offset", "0"), ("length", str(length))):
        weights.external_data.add(key=key, value=value)
    initializers = [*renamed.graph.initializer, weights]
    return model_with_ops(stage, [*nodes, *renamed.graph.node], initializers, opset_of(rest))


def windowed_model(stage: Stage, form: CpuForm, windows: onnx.ModelProto) -> onnx.ModelProto:
    """A windowed graph on the whole grid: no size depends on the frame, which is what an engine wants."""
    grid = whole_grid(np.empty(0, np.int32), form.window)
    constants = [
        numpy_helper.from_array(grid.window_pixel, "window_pixel"),
        numpy_helper.from_array(grid.crop_row, "crop_row"),
    ]
    initializers = [*windows.graph.initializer, *constants]
    return model_with_ops(stage, windows.graph.node, initializers, opset_of(windows))


def write_halves(stage: Stage, form: CpuForm, folder: Path) -> None:
    """The stage's graph from those of its two halves; the weights of all three lie in `form.files[2]`."""
    *files, weights = form.files
    parts = [onnx.load(folder / file) for file in files]
    (folder / weights).unlink(missing_ok=True)
    for file, part in zip(files, parts, strict=True):
        for initializer in part.graph.initializer:
            if len(initializer.raw_data) >= SMALLEST_EXTERNAL:
                set_external_data(initializer, weights)
        onnx.save(part, folder / file)
    (folder / weights).chmod((folder / files[0]).stat().st_mode)  # onnx writes it for its owner alone
    both = [
        compose.add_prefix_graph(
            part.graph, f"{file.removesuffix('.onnx')}.", rename_inputs=False, rename_outputs=False
        )
        for file, part in zip(files, parts, strict=True)
    ]
    nodes = [node for part in both for node in part.node]
    initializers = [initializer for part in both for initializer in part.initializer]
    onnx.save(model_with_ops(stage, nodes, initializers, opset_of(parts[0])), folder / f"{stage.name}.onnx")


def write_banks(path: Path, form: CpuForm) -> None:
    """Put the rows of a graph's banks into files of their own, beside what a CPU reads besides: both share them.

    The rows of `<side>.rows` lie in `bank_<side>.rows`, bytes of [B, D] float32, those of `<side>.<half>_rows` in
    `bank_<side>_<half>.rows`; means, neighbours and the scale in the form's last file.
    """
    model = onnx.load(path)
    small: dict[str, Any] = {"scale": np.ones((), np.float32)}  # the exporter leaves out a division by 1
    for initializer in model.graph.initializer:
        side, _, kind = initializer.name.partition(".")
        if kind.endswith("rows"):
            (file,) = (f for f in form.files if f == f"bank_{side}_{kind}".replace("_rows", ".rows"))
            numpy_helper.to_array(initializer).tofile(path.parent / file)
            set_external_data(initializer, file)
            initializer.ClearField("raw_data")
        elif kind.endswith(("mean", "neighbors")) or side == "scale":
            small[initializer.name] = numpy_helper.to_array(initializer)
    np.savez(path.parent / form.files[-1], **small)
    path.write_bytes(model.SerializeToString())


def rgb_rows(side: int, tokens: str, pixel: str, rows: str) -> onnx.GraphProto:
    """`heads.rgb_rows.RgbRows` in ONNX, term by term: tokens [side * side, D], pixel [R] int32 -> rows [R, D].

    Its own values and weights are named `<rows>.*`, so that it can stand in any graph.
    """
    taps, weights = bilinear_taps(side)
    tables = {f"{axis}{i}": taps[:, i] * step for axis, step in (("y", side), ("x", 1)) for i in range(2)}
    corners = [(i, j) for i in range(2) for j in range(2)]
    graph = parser.parse_graph(
        f"""
    rgb_rows (float[P, D] {tokens}, int32[R] {pixel}) => (float[R, D] {rows}) {{
        wide = Cast <to = 7> ({pixel})
        size = Constant <value_int = {IMAGE_SIZE}> ()
        y = Div (wide, size)
        x = Mod (wide, size)
    """
        + "".join(
            f"""
        tap_{axis}{i} = Gather <axis = 0> (taps_{axis}{i}, {axis})
        weight_{axis}{i} = Gather <axis = 0> (weights_{i}, {axis})
    """
            for axis in ("y", "x")
            for i in range(2)
        )
        + "".join(
            f"""
        index_{i}{j} = Add (tap_y{i}, tap_x{j})
        token_{i}{j} = Gather <axis = 0> ({tokens}, index_{i}{j})
        weight_{i}{j} = Mul (weight_y{i}, weight_x{j})
        corner_{i}{j} = Mul (weight_{i}{j}, token_{i}{j})
    """
            for i, j in corners
        )
        + f"""
        top = Add (corner_00, corner_01)
        bottom = Add (corner_10, corner_11)
        {rows} = Add (top, bottom)
    }}"""
    )
    for node in graph.node:
        node.name = f"{node.output[0].removeprefix(rows) or 'sum'}/{node.op_type}"
    graph.initializer.extend(
        numpy_helper.from_array(table.astype(np.int64), f"taps_{name}") for name, table in tables.items()
    )
    graph.initializer.extend(numpy_helper.from_array(weights[:, i : i + 1], f"weights_{i}") for i in range(2))
    return compose.add_prefix_graph(graph, f"{rows}.", rename_inputs=False, rename_outputs=False)
