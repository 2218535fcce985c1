"""Detector -> the ONNX files of a bundle.

Each stage becomes one file whose inputs and outputs are the contract's. The custom ops stand in it as nodes of domain
`m3ad` with their function bodies beside them: any ONNX runtime can run the file, TensorRT puts its plugins there. The
ops are never traced, so no sampled index can be frozen into a constant; `verify_not_frozen` proves it on the result.
"""

import ast
import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from m3ad.contract import IMAGE_SIZE, MIN_POINTS, OP_DOMAIN, OP_VERSION, OPS, Dims, Stage, Tensor, stages
from m3ad.errors import ArtifactError
from m3ad.stages import CPU_FILES
from m3ad_plugins.onnx_functions import function_protos
from onnx import helper
from onnx.external_data_helper import set_external_data
from torch import nn

from m3ad_export.detector import Detector, RgbRows
from m3ad_export.graphs.row_tiling import in_parts
from m3ad_export.nets.folded_pointnet import folded_encoder

OPSET = 18  # TensorRT 10.3 reads up to 20; 18 is what torch's exporter writes without conversion
SMALLEST_EXTERNAL = (
    1024  # bytes of a weight that lies outside its graph; smaller ones are read while a graph is loaded
)
ENCODER_GRAPH = "xyz_encoder.onnx"  # the plain one, which is quantized and composed; a CPU runs it in parts
ENCODER_IN_PARTS, ENCODER_WEIGHTS = CPU_FILES["xyz_extractor"]

_TORCH_DTYPES = {"float32": torch.float32, "int32": torch.int32}


def xyz_encoder_stage(dims: Dims) -> Stage:
    """The plugin-free part of xyz_extractor, described like a stage; only this room and the CPU stage see it."""
    neighborhood = Tensor("neighborhood", (dims.groups, dims.group_size, 3), unit="m")
    centers, xyz_tokens = stages(dims)["xyz_extractor"].outputs
    return Stage("xyz_encoder", (neighborhood, centers), (xyz_tokens,))


def write_chain(detector: Detector, folder: Path) -> None:
    """Write every ONNX file of the chain layout, and the plugin-free parts the CPU runtime uses, into `folder`.

    Raises:
        ArtifactError: a graph does not depend on its inputs as it must.
    """
    table = stages(detector.dims)
    modules = detector.modules()
    for name in ("rgb_extractor", "mfm", "mgm", "vm"):
        onnx.save(dense_model(modules[name], table[name]), folder / f"{name}.onnx")
    encoder = dense_model(folded_encoder(detector.xyz), xyz_encoder_stage(detector.dims))
    write_xyz_extractor(encoder, detector.dims, folder)
    onnx.save(project_model(detector), folder / "project.onnx")
    for name in table:
        path = folder / f"{name}.onnx"
        if path.exists():
            verify_interface(path, table[name])
    verify_not_frozen(folder / "xyz_extractor.onnx")
    verify_not_frozen(folder / "project.onnx")


def write_xyz_extractor(encoder: onnx.ModelProto, dims: Dims, folder: Path) -> None:
    """Write the encoder, plain, in parts for a CPU and as `xyz_extractor.onnx`; all three refer to one weights file."""
    others = {ENCODER_IN_PARTS: in_parts(encoder), "xyz_extractor.onnx": xyz_extractor_model(encoder, dims)}
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


def dense_model(module: nn.Module, stage: Stage) -> onnx.ModelProto:
    """Export a module whose forward takes and returns the stage's tensors, dynamic in N and R."""
    axes = {"N": MIN_POINTS + 1, "R": MIN_POINTS + 1}  # an odd size, so that no constant matches it by chance
    symbols = {letter: torch.export.Dim(letter, min=2, max=IMAGE_SIZE**2) for letter in axes}
    examples, shapes = [], []
    for tensor in stage.inputs:
        size = [axes.get(d, 0) if isinstance(d, str) else d for d in tensor.dims]
        dtype = _TORCH_DTYPES[tensor.dtype]
        examples.append(torch.rand(size) if dtype is torch.float32 else torch.arange(size[0], dtype=dtype))
        shapes.append({i: symbols[d] for i, d in enumerate(tensor.dims) if isinstance(d, str)})
    with _quiet():
        program = torch.onnx.export(
            module.eval(),
            tuple(examples),
            dynamo=True,
            opset_version=OPSET,
            input_names=[t.name for t in stage.inputs],
            output_names=[t.name for t in stage.outputs],
            dynamic_shapes=tuple(shapes),
            verbose=False,
        )
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    for value, tensor in zip(
        (*model.graph.input, *model.graph.output), (*stage.inputs, *stage.outputs), strict=True
    ):
        value.CopyFrom(value_info(tensor))
    reorder_gelu(model.graph)
    del model.graph.value_info[:]  # the exporter's intermediate shapes carry source paths and go stale
    name_nodes(model.graph)
    model.graph.name = stage.name
    return model


def reorder_gelu(graph: onnx.GraphProto) -> None:
    """Write x (0.5 (1 + erf)) as 0.5 (x (1 + erf)), in place: the order in which runtimes know GELU and fuse it.

    Halving is exact, so no value changes.
    """
    halves = {i.name for i in graph.initializer if not i.dims and onnx.numpy_helper.to_array(i) == 0.5}
    made_by = {node.output[0]: node for node in graph.node}
    readers = Counter(name for node in graph.node for name in node.input)
    for node in graph.node:
        inner = made_by.get(node.input[1]) if node.op_type == "Mul" else None
        if inner is None or inner.op_type != "Mul" or inner.input[0] not in halves:
            continue
        if readers[inner.output[0]] == 1 and made_by[inner.input[1]].op_type == "Add":
            x, half = node.input[0], inner.input[0]
            inner.input[0], node.input[0] = x, half


def name_nodes(graph: onnx.GraphProto) -> None:
    """Name every node `module/operation/OpType`, so that precision plans and engine inspectors can be read."""
    seen: Counter[str] = Counter()
    for node in graph.node:
        properties = {p.key: p.value for p in node.metadata_props}
        scopes = ast.literal_eval(properties.get("pkg.torch.onnx.name_scopes", "['']"))
        name = "/".join([*scopes[-2:], node.op_type])
        node.name = f"{name}_{seen[name]}" if seen[name] else name
        seen[name] += 1
        del node.metadata_props[:]


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


def xyz_extractor_model(encoder: onnx.ModelProto, dims: Dims) -> onnx.ModelProto:
    """points -> FarthestPointSample -> KnnGroup -> the encoder's graph -> centers, xyz_tokens."""
    stage = stages(dims)["xyz_extractor"]
    nodes = [
        op_node(
            "FarthestPointSample",
            ["points"],
            ["idx"],
            num_samples=dims.groups,
            min_norm_sq=dims.min_norm_sq,
        ),
        op_node("KnnGroup", ["points", "idx"], ["neighborhood", "knn_idx"], group_size=dims.group_size),
        helper.make_node("Gather", ["points", "idx"], ["centers"], name="centers"),
        *encoder.graph.node,
    ]
    return model_with_ops(stage, nodes, encoder.graph.initializer, opset_of(encoder))


def project_model(detector: Detector) -> onnx.ModelProto:
    """TokenInterpolate for the 3D tokens, bilinear taps for the RGB tokens, at the same scored pixels."""
    dims = detector.dims
    stage = stages(dims)["project"]
    rgb_features, _ = stage.outputs
    *_, scored_pixel = stage.inputs
    rgb = dense_model(
        RgbRows(dims.rgb_side), Stage("rgb_rows", (stage.inputs[0], scored_pixel), (rgb_features,))
    )
    node = op_node(
        "TokenInterpolate",
        ["points", "point_pixel", "centers", "xyz_tokens", "scored_pixel"],
        ["xyz_features"],
        image_size=IMAGE_SIZE,
    )
    return model_with_ops(stage, [node, *rgb.graph.node], rgb.graph.initializer)


def model_with_ops(
    stage: Stage,
    nodes: Sequence[onnx.NodeProto],
    initializers: Sequence[onnx.TensorProto],
    opset: int = OPSET,
) -> onnx.ModelProto:
    """A stage's graph, with the function bodies of the custom ops it uses, all of one opset."""
    used = {node.op_type for node in nodes if node.domain == OP_DOMAIN}
    graph = helper.make_graph(
        nodes,
        stage.name,
        [value_info(t) for t in stage.inputs],
        [value_info(t) for t in stage.outputs],
        list(initializers),
    )
    functions = [f for f in function_protos() if f.name in used]
    for imported in (i for f in functions for i in f.opset_import if not i.domain):
        imported.version = opset
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(OP_DOMAIN, OP_VERSION)],
        functions=functions,
        ir_version=9,
    )


def opset_of(model: onnx.ModelProto) -> int:
    """The version of the standard ops that a model is written in."""
    return next(int(entry.version) for entry in model.opset_import if not entry.domain)


def verify_interface(path: Path, stage: Stage) -> None:
    """Check that a file's inputs and outputs are the contract's and that the ONNX checker accepts it.

    Raises:
        ArtifactError: it differs.
    """
    onnx.checker.check_model(str(path), full_check=False)
    model = onnx.load(path, load_external_data=False)
    found = [v.SerializeToString() for v in (*model.graph.input, *model.graph.output)]
    wanted = [value_info(t).SerializeToString() for t in (*stage.inputs, *stage.outputs)]
    if found != wanted:
        names = [v.name for v in (*model.graph.input, *model.graph.output)]
        raise ArtifactError(f"{path} has the tensors {names}, the contract's stage {stage.name} has others")


def values_read(node: onnx.NodeProto) -> set[str]:
    """The values a node reads, those that the body of a loop takes from the graph around it included."""
    inner = (n for attribute in node.attribute for n in attribute.g.node)
    return set(node.input).union(*(values_read(n) for n in inner))


def verify_not_frozen(path: Path) -> None:
    """Check that every graph input reaches an output and that nothing a custom op reads is a constant.

    A tracer that samples once writes the indices as constants; the graph then no longer depends on `points`.

    Raises:
        ArtifactError: an input is unused, or a custom op reads indices or points that are constants.
    """
    model = onnx.load(path, load_external_data=False)
    needed = {v.name for v in model.graph.output}
    for node in reversed(model.graph.node):
        if needed & set(node.output):
            needed |= values_read(node)
    ignored = [v.name for v in model.graph.input if v.name not in needed]
    live = {v.name for v in model.graph.input}
    for node in model.graph.node:
        if node.domain == OP_DOMAIN:
            data = (
                OPS[node.op_type].inputs if node.op_type != "OneClassSvm" else ("x",)
            )  # the rest are its weights
            ignored += [
                f"{node.op_type}'s {n}" for n, v in zip(data, node.input, strict=False) if v not in live
            ]
        if live & set(node.input):
            live |= set(node.output)
    if ignored or not any(node.domain == OP_DOMAIN for node in model.graph.node):
        raise ArtifactError(
            f"{path}: sampling was frozen into the graph ({', '.join(ignored) or 'no m3ad node'} does not depend on "
            f"the points); keep the m3ad ops out of the traced module"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's exporter from talking about torchvision and its own progress."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
