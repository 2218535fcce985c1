"""The function bodies of the ops, run by ONNX Runtime over the case table."""

from typing import Any

import numpy as np
import pytest
from cases import FULL, SMALL, Case
from m3ad.contract import OP_DOMAIN, OP_VERSION, OPS
from m3ad_plugins import reference

onnx = pytest.importorskip("onnx", reason="function bodies are ONNX; pip install m3ad[export]")
ort = pytest.importorskip("onnxruntime", reason="function bodies run in ONNX Runtime; pip install m3ad[cpu]")
from m3ad_plugins.onnx_functions import OPSET, function_protos  # noqa: E402

RNG = np.random.default_rng(0)


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


def check(case: Case, width: int, rtol: float = 1e-5) -> None:
    sampling = {"num_samples": case.num_samples, "min_norm_sq": case.min_norm_sq}
    expected_idx = reference.farthest_point_sample(case.points, **sampling)
    (idx,) = run("FarthestPointSample", {"points": case.points}, **sampling)
    assert idx.dtype == np.int32
    np.testing.assert_array_equal(idx, expected_idx)

    neighborhood, knn_idx = run("KnnGroup", {"points": case.points, "idx": idx}, group_size=case.group_size)
    expected, expected_knn = reference.knn_group(case.points, idx, case.group_size)
    assert knn_idx.dtype == np.int32
    np.testing.assert_array_equal(knn_idx, expected_knn)
    np.testing.assert_array_equal(neighborhood, expected)

    inputs = {
        "points": case.points,
        "point_pixel": case.point_pixel,
        "centers": case.points[idx],
        "tokens": RNG.normal(0, 1, (case.num_samples, width)).astype(np.float32),
        "scored_pixel": reference.scored_pixels(case.point_pixel, case.image_size),
    }
    (rows,) = run("TokenInterpolate", inputs, image_size=case.image_size)
    expected = reference.token_interpolate(*inputs.values(), case.image_size)
    np.testing.assert_allclose(rows, expected, rtol=rtol, atol=2e-6)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_functions_equal_reference(case: Case) -> None:
    check(case, 5)


@pytest.mark.slow
@pytest.mark.parametrize("case", FULL, ids=str)
def test_functions_equal_reference_at_full_size(case: Case) -> None:
    check(case, 70)


def test_interpolate_keeps_half_precision_tokens() -> None:
    case = SMALL[0]
    tokens = RNG.normal(0, 1, (128, 5)).astype(np.float16)
    inputs = {"points": case.points, "point_pixel": case.point_pixel, "centers": case.points[:128]}
    inputs |= {"tokens": tokens, "scored_pixel": np.arange(0, case.image_size**2, 5, dtype=np.int32)}
    (rows,) = run("TokenInterpolate", inputs, image_size=case.image_size)
    inputs["tokens"] = tokens.astype(np.float32)
    expected = reference.token_interpolate(*inputs.values(), case.image_size)
    assert rows.dtype == np.float16
    np.testing.assert_allclose(rows.astype(np.float32), expected, rtol=2**-11, atol=2e-6)  # rounded once


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize(("rows", "width", "vectors"), [(1, 1, 1), (300, 6, 40)])
def test_one_class_svm_equals_reference(kernel: str, rows: int, width: int, vectors: int) -> None:
    x, support = (RNG.normal(0, 1, (count, width)).astype(np.float32) for count in (rows, vectors))
    coefficients = RNG.normal(0, 1, vectors).astype(np.float32)
    inputs = {"x": x, "support_vectors": support, "coefficients": coefficients, "rho": np.float32([0.25])}
    (decision,) = run("OneClassSvm", inputs, kernel=kernel, gamma=0.3)
    expected = reference.one_class_svm(x, support, coefficients, 0.25, kernel, 0.3)
    np.testing.assert_allclose(decision, expected, rtol=1e-5, atol=2e-5)


def test_signatures_are_the_contracts() -> None:
    for proto in function_protos():
        spec = OPS[proto.name]
        assert (tuple(proto.input), tuple(proto.output)) == (spec.inputs, spec.outputs)
        assert set(proto.attribute) == set(spec.attributes)
        assert proto.domain == OP_DOMAIN


def test_unknown_kernel_is_named() -> None:
    with pytest.raises(ValueError, match="svm_kernel: expected one of linear, rbf, got 'poly'"):
        function_protos("poly")
