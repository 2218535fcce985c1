"""The function bodies of the ops, run by ONNX Runtime over the case table."""

from typing import Any

import numpy as np
import pytest
from m3ad.contract import OP_DOMAIN, OP_VERSION, OPS
from m3ad_plugins.gpu.cases import FULL, OWN_ROWS, SMALL, Case, Row, rows_on

onnx = pytest.importorskip("onnx", reason="function bodies are ONNX; pip install m3ad[export]")
ort = pytest.importorskip("onnxruntime", reason="function bodies run in ONNX Runtime; pip install m3ad[cpu]")
from m3ad_plugins.onnx_functions import OPSET, function_protos  # noqa: E402
from m3ad_plugins.ops import KERNELS  # noqa: E402


def model(op: str, inputs: dict[str, np.ndarray], **attributes: Any) -> Any:
    """One node of the op and the functions of all, the inputs' first axis free."""
    spec = OPS[op]
    ints = {"idx", "knn_idx", "scored_pixel"}
    infos = [
        onnx.helper.make_tensor_value_info(
            name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), [f"{name}_rows", *array.shape[1:]]
        )
        for name, array in inputs.items()
    ]
    kind = onnx.helper.np_dtype_to_tensor_dtype(inputs.get("tokens", np.zeros(0, np.float32)).dtype)
    ranks = {"neighborhood": 3, "knn_idx": 2, "rows": 2}
    outs = [
        onnx.helper.make_tensor_value_info(
            name, onnx.TensorProto.INT32 if name in ints else kind, [None] * ranks.get(name, 1)
        )
        for name in spec.outputs
    ]
    node = onnx.helper.make_node(op, spec.inputs, spec.outputs, domain=OP_DOMAIN, **attributes)
    opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(OP_DOMAIN, OP_VERSION)]
    return onnx.helper.make_model(
        onnx.helper.make_graph([node], op, infos, outs),
        functions=function_protos(attributes.get("kernel", "linear")),
        opset_imports=opsets,
        ir_version=10,
    )


def run(op: str, inputs: dict[str, np.ndarray], **attributes: Any) -> list[np.ndarray]:
    built = model(op, inputs, **attributes)
    onnx.checker.check_model(built, full_check=True)
    session = ort.InferenceSession(built.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def check(row: Row) -> None:
    row.check(tuple(run(row.op, row.inputs, **row.attributes)))


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_functions_equal_reference(case: Case) -> None:
    for row in rows_on(case, 5):
        check(row)


@pytest.mark.slow
@pytest.mark.parametrize("case", FULL, ids=str)
def test_functions_equal_reference_at_full_size(case: Case) -> None:
    for row in rows_on(case, 70):
        check(row)


@pytest.mark.parametrize("row", OWN_ROWS, ids=str)
def test_functions_of_ops_without_a_cloud_equal_reference(row: Row) -> None:
    check(row)


def test_interpolate_keeps_half_precision_tokens() -> None:
    for row in rows_on(SMALL[0], 5, np.float16):
        check(row)


def test_signatures_are_the_contracts() -> None:
    for proto in function_protos():
        spec = OPS[proto.name]
        assert (tuple(proto.input), tuple(proto.output)) == (spec.inputs, spec.outputs)
        assert set(proto.attribute) == set(spec.attributes)
        assert proto.domain == OP_DOMAIN


def values_read(nodes: Any) -> set[str]:
    """What these nodes and the bodies of their loops read."""
    inner = (values_read(a.g.node) for node in nodes for a in node.attribute)
    return {name for node in nodes for name in node.input}.union(*inner)


@pytest.mark.parametrize("kernel", KERNELS)
def test_bodies_read_every_input(kernel: str) -> None:
    """A parser may drop an input of the graph that no node reads."""
    for proto in function_protos(kernel):
        assert set(proto.input) <= values_read(proto.node)


def test_unknown_kernel_is_named() -> None:
    with pytest.raises(ValueError, match="svm_kernel: expected one of linear, rbf, got 'poly'"):
        function_protos("poly")
