"""What is put into a voting graph behind its score_maps: the op `OneClassSvm`, and what a lattice leaves out."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from m3ad.contract import IMAGE_SIZE, MAX_POINTS, OP_DOMAIN, OP_VERSION, Stage, Tensor
from m3ad.methods.common import POINT_PIXEL, SCORED_PIXEL
from onnx import helper, numpy_helper

from m3ad_export.graphs.compose import op_bodies, op_node, opset_of, value_info
from m3ad_export.graphs.head import prefixed
from m3ad_export.graphs.surgery import edited
from m3ad_export.graphs.trace import dense_model
from m3ad_export.heads.coverage import Coverage
from m3ad_export.heads.voting import OneClassSvm, SvmRows

WEIGHTS = ("support_vectors", "coefficients", "rho")


def with_svm(model: onnx.ModelProto, rows: SvmRows, svm: OneClassSvm) -> onnx.ModelProto:
    """A copy of a voting graph in which this SVM makes anomaly_map and score of its score_maps.

    What made them before is dropped; how the score_maps are made stays.
    """

    def keep_score_maps(graph: gs.Graph) -> None:
        graph.outputs = [tensor for tensor in graph.outputs if tensor.name == "score_maps"]

    result = edited(model, keep_score_maps)
    graph = result.graph
    (score_maps,) = graph.output
    del graph.output[:]
    graph.output.extend(model.graph.output)
    count = score_maps.type.tensor_type.shape.dim[0].dim_value
    stage = Stage(
        "svm",
        (Tensor("score_maps", (count, IMAGE_SIZE, IMAGE_SIZE)),),
        (Tensor("svm_rows", (MAX_POINTS, svm.support_vectors.shape[1])),),
    )
    seen = prefixed(dense_model(rows, stage), "svm").graph
    weights = {f"svm.{name}": getattr(svm, name).numpy() for name in WEIGHTS}
    op = op_node("OneClassSvm", ["svm_rows", *weights], ["svm.decision"], kernel=svm.kernel, gamma=svm.gamma)
    shape = numpy_helper.from_array(np.array([IMAGE_SIZE, IMAGE_SIZE]), "svm.grid")
    reshape = helper.make_node("Reshape", ["svm.decision", shape.name], ["anomaly_map"], name="svm/Reshape")
    largest = helper.make_node("ReduceMax", ["svm.decision"], ["score"], name="svm/ReduceMax", keepdims=1)
    graph.node.extend([*seen.node, op, reshape, largest])
    graph.initializer.extend([*seen.initializer, shape])
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    del result.functions[:]
    result.functions.extend(op_bodies(graph.node, opset_of(result)))
    if all(entry.domain != OP_DOMAIN for entry in result.opset_import):
        result.opset_import.append(helper.make_opsetid(OP_DOMAIN, OP_VERSION))
    return result


def with_coverage(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a voting graph for all pixels that votes on those of a lattice: its score_maps times `Coverage`.

    It takes `point_pixel` besides. What follows the score_maps stays.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    ratio = Tensor("coverage", (1, IMAGE_SIZE, IMAGE_SIZE))
    part = prefixed(
        dense_model(Coverage(), Stage("coverage", (SCORED_PIXEL, POINT_PIXEL), (ratio,))), "lattice"
    )
    nodes = list(graph.node)
    at, smoothed = next((i, node) for i, node in enumerate(nodes) if "score_maps" in node.output)
    smoothed.output[:] = ["smoothed" if name == "score_maps" else name for name in smoothed.output]
    product = helper.make_node("Mul", ["smoothed", ratio.name], ["score_maps"], name="lattice/Mul")
    del graph.node[:]
    graph.node.extend([*part.graph.node, *nodes[: at + 1], product, *nodes[at + 1 :]])
    graph.initializer.extend(part.graph.initializer)
    graph.input.append(value_info(POINT_PIXEL))
    return result
