"""A torch module -> the plain ONNX graph of a stage, traced by torch's exporter. What holds custom ops is composed."""

import ast
import contextlib
import inspect
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator

import onnx
import torch
from m3ad.contract import IMAGE_SIZE, MIN_POINTS, Stage
from torch import nn

from m3ad_export.graphs.compose import OPSET, value_info

_TORCH_DTYPES = {"float32": torch.float32, "int32": torch.int32}


def dense_model(module: nn.Module, stage: Stage) -> onnx.ModelProto:
    """Export a module whose forward takes and returns the stage's tensors, dynamic in its letters."""
    axes = dict.fromkeys("NRKHW", MIN_POINTS + 1)  # an odd size, so that no constant matches it by chance
    symbols = {letter: torch.export.Dim(letter, min=2, max=IMAGE_SIZE**2) for letter in axes}
    examples, shapes = [], []
    for tensor in stage.inputs:
        size = [axes.get(d, 0) if isinstance(d, str) else d for d in tensor.dims]
        dtype = _TORCH_DTYPES[tensor.dtype]
        examples.append(torch.rand(size) if dtype is torch.float32 else torch.zeros(size, dtype=dtype))
        shapes.append({i: symbols[d] for i, d in enumerate(tensor.dims) if isinstance(d, str)})
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(module.forward).parameters.values())
    with _quiet():
        program = torch.onnx.export(
            module.eval(),
            tuple(examples),
            dynamo=True,
            opset_version=OPSET,
            input_names=[t.name for t in stage.inputs],
            output_names=[t.name for t in stage.outputs],
            dynamic_shapes=(tuple(shapes),) if takes_any else tuple(shapes),
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
