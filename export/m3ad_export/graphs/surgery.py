"""Graph surgery is onnx-graphsurgeon's; here is what of a model it does not carry over, or keep tidy, by itself."""

import gc
import math
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx.checker
import onnx_graphsurgeon as gs
from m3ad.errors import ArtifactError, one_line
from onnx import TensorProto
from onnx_graphsurgeon.exporters.onnx_exporter import dtype_to_onnx
from onnx_graphsurgeon.logger import G_LOGGER

# It warns on stdout, where `--json` has its one document, of every bf16 and FP8 tensor; those pass through unread.
G_LOGGER.severity = G_LOGGER.ERROR
# Weights, by number. Nodes and tensors refer to each other, so an edited graph stays until Python's collector runs: by
# itself that is several edits later, and each of a ViT-B holds a gigabyte (measured). A collection takes 0.1 s.
LEFT_TO_COLLECTOR = 2 << 20


def load_graph(path: Path) -> onnx.ModelProto:
    """A graph of a bundle with its weights.

    Raises:
        ArtifactError: weights beside it cannot be read; onnx takes no file that has several hard links.
    """
    try:
        return onnx.load(path)
    except onnx.checker.ValidationError as error:
        raise ArtifactError(
            f"{path} cannot be read with its weights: {one_line(error)} "
            "Copy the bundle without links (cp -r) and use the copy"
        ) from error


def edited(model: onnx.ModelProto, edit: Callable[[gs.Graph], None]) -> onnx.ModelProto:
    """A copy of a model after `edit`, without the nodes and weights that no output needs any more.

    Metadata and the order of the weights stay; shapes of inner values, which may be stale, do not. Not for graphs with
    loops: the library would move weights that a body reads from outside into it.
    """
    graph = gs.import_onnx(model)
    edit(graph)
    result: onnx.ModelProto = gs.export_onnx(graph.cleanup(recurse_functions=False))
    del graph
    if sum(math.prod(weight.dims) for weight in model.graph.initializer) > LEFT_TO_COLLECTOR:
        gc.collect()
    del result.graph.value_info[:]
    result.metadata_props.MergeFrom(model.metadata_props)
    result.graph.metadata_props.MergeFrom(model.graph.metadata_props)
    places = {weight.name: place for place, weight in enumerate(model.graph.initializer)}
    result.graph.initializer.sort(key=lambda weight: places.get(weight.name, len(places)))
    return result


def element_type(tensor: gs.Tensor) -> int:
    """The ONNX type of a tensor's elements, where the library has NumPy's if NumPy knows it and None if nobody does."""
    return TensorProto.UNDEFINED if tensor.dtype is None else int(dtype_to_onnx(tensor.dtype))


def cast(source: gs.Tensor, target: gs.Tensor, element: int) -> gs.Node:
    """The node that makes `target` of `source` in another type."""
    return gs.Node("Cast", f"{target.name}/Cast", {"to": element}, [source], [target])
