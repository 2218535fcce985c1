"""The one-class SVM stands in the voting graphs as the op, and decides as scikit-learn, PyTorch and the C++ op do."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from m3ad.bundle import Bundle
from m3ad.contract import OP_DOMAIN
from m3ad_export.detector import Detector, call
from m3ad_export.graphs.head import head_model, read_parts
from m3ad_export.graphs.plan import Keep, Plan, default_plan
from m3ad_export.graphs.precision import half_model
from m3ad_export.graphs.verify import verify_not_frozen
from m3ad_export.graphs.vote import with_svm
from m3ad_export.heads.voting import OneClassSvm, SvmRows, Vm, VotingConfig
from m3ad_plugins import ops
from onnx import TensorProto, helper, numpy_helper
from sklearn.svm import OneClassSVM

ROWS = 2000
RNG = np.random.default_rng(0)
SCORES = {
    "scores": RNG.gamma(2.0, 0.1, (3, ROWS)).astype(np.float32),
    "scored_pixel": np.sort(RNG.choice(224 * 224, ROWS, replace=False)).astype(np.int32),
}


def svm_node(model: onnx.ModelProto) -> onnx.NodeProto:
    (node,) = (n for n in model.graph.node if n.op_type == "OneClassSvm")
    return node


def weights_of(model: onnx.ModelProto) -> list[np.ndarray]:
    arrays = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    return [arrays[name] for name in svm_node(model).input[1:]]


def run(model: onnx.ModelProto, *names: str) -> list[np.ndarray]:
    """Values of a vote, inner ones too, in ONNX Runtime: the op's function body."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    outputs = {v.name for v in model.graph.output}
    watched.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in names if n not in outputs)
    session = ort.InferenceSession(watched.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(list(names), SCORES)


def fitted(kernel: str, x: np.ndarray) -> tuple[OneClassSVM, OneClassSvm]:
    """Scikit-learn's SVM of some rows, and ours with its numbers."""
    gamma = 1 / float(np.square(x).sum(axis=1).max())
    theirs = OneClassSVM(kernel=kernel, nu=0.3, gamma=gamma, tol=1e-6).fit(x[:: len(x) // 120].astype(float))
    ours = OneClassSvm(x.shape[1], len(theirs.support_vectors_), kernel)  # type: ignore[arg-type]
    ours.gamma = gamma
    ours.support_vectors = torch.from_numpy(theirs.support_vectors_).float()
    ours.coefficients = torch.from_numpy(theirs.dual_coef_[0]).float()
    ours.rho = torch.tensor([-float(theirs.intercept_[0])])
    return theirs, ours


@pytest.mark.parametrize("name", ["vm", "head_vote", "head"])
def test_every_voting_graph_holds_the_op_once_with_the_detector_s_weights(
    tiny_bundle: Bundle, tiny_detector: Detector, name: str
) -> None:
    path = tiny_bundle.file(f"onnx/{name}.onnx")
    model = onnx.load(path)
    svm = tiny_detector.networks["vm"].svm
    for found, expected in zip(
        weights_of(model), (svm.support_vectors, svm.coefficients, svm.rho), strict=True
    ):
        np.testing.assert_array_equal(found, expected.numpy())
    attributes = {a.name: helper.get_attribute_value(a) for a in svm_node(model).attribute}
    assert (attributes["kernel"], attributes["gamma"]) == (b"linear", 1.0)
    assert "OneClassSvm" in {f.name for f in model.functions if f.domain == OP_DOMAIN}
    verify_not_frozen(path)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("svm_input", ["product", "terms"])
def test_the_decision_is_scikit_learn_s_torch_s_and_the_op_s(
    tiny_bundle: Bundle, kernel: str, svm_input: str
) -> None:
    config = VotingConfig(svm_input=svm_input)  # type: ignore[arg-type]
    plain = onnx.load(tiny_bundle.file("onnx/head_vote.onnx"))
    (maps,) = run(plain, "score_maps")
    (x,) = call(SvmRows(config), maps)
    theirs, ours = fitted(kernel, x)
    model = with_svm(plain, SvmRows(config), ours)
    onnx.checker.check_model(model, full_check=True)
    anomaly_map, score = run(model, "anomaly_map", "score")
    (seen,) = run(model, "svm_rows")  # by itself: a value that is watched is not fused away
    np.testing.assert_allclose(seen, x, rtol=1e-6)
    decision = anomaly_map.ravel()
    scale = np.abs(ours.coefficients.numpy()).sum()  # what the sum's terms add up to, were they of one sign
    np.testing.assert_allclose(decision, theirs.decision_function(x.astype(float)), rtol=0, atol=2e-6 * scale)
    assert score.shape == (1,)
    assert score[0] == decision.max()

    by_op = ops.one_class_svm(seen, *weights_of(model)[:2], float(ours.rho), kernel, ours.gamma)
    np.testing.assert_allclose(decision, by_op, rtol=0, atol=2e-6 * scale)
    vm = Vm(config)
    vm.svm = ours
    with torch.inference_mode():
        np.testing.assert_allclose(anomaly_map, vm.vote(torch.from_numpy(maps)), rtol=0, atol=2e-6 * scale)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_another_svm_replaces_the_first_and_leaves_nothing_of_it(tiny_bundle: Bundle, kernel: str) -> None:
    config = VotingConfig(svm_input="terms")
    plain = onnx.load(tiny_bundle.file("onnx/head_vote.onnx"))
    ours = fitted(kernel, RNG.random((500, 4)).astype(np.float32))[1]
    once = with_svm(plain, SvmRows(config, torch.tensor([1.0, 2.0, 3.0, 4.0])), ours)
    (body,) = once.functions
    assert ("Scan" in {n.op_type for n in body.node}) == (kernel == "rbf")
    again = with_svm(with_svm(once, SvmRows(VotingConfig()), OneClassSvm(1)), SvmRows(config), ours)
    assert again.SerializeToString() == with_svm(plain, SvmRows(config), ours).SerializeToString()
    names = [i.name for i in once.graph.initializer]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_the_op_stays_fp32_in_any_plan(tiny_bundle: Bundle, kernel: str) -> None:
    config = VotingConfig(svm_input="terms")
    svm = fitted(kernel, RNG.random((500, 4)).astype(np.float32))[1]
    model = with_svm(onnx.load(tiny_bundle.file("onnx/head_vote.onnx")), SvmRows(config), svm)
    kept = half_model(model, "head_vote", default_plan("fp16"))
    assert kept.SerializeToString() == model.SerializeToString()  # the whole vote is fp32

    only_op = Plan("fp16", "fp16", (Keep(rf":{OP_DOMAIN}\.", "the op alone"), Keep("/Pow", "too small")))
    halved = half_model(model, "head_vote", only_op)
    onnx.checker.check_model(halved, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(halved, strict_mode=True)
    types = {v.name: v.type.tensor_type.elem_type for v in inferred.graph.value_info}
    assert TensorProto.FLOAT16 in types.values()
    assert types[svm_node(halved).input[0]] == types[svm_node(halved).output[0]] == TensorProto.FLOAT
    for found, expected in zip(weights_of(halved), weights_of(model), strict=True):
        np.testing.assert_array_equal(found, expected)
    (rough,), (exact,) = run(halved, "anomaly_map"), run(model, "anomaly_map")
    assert 0 < np.abs(rough - exact).max() < 0.01 * np.abs(exact).max()


def test_a_head_of_parts_takes_the_kernel_s_body(tiny_bundle: Bundle, tmp_path: Path) -> None:
    parts = read_parts(tiny_bundle.path / "onnx")
    svm = fitted("rbf", RNG.random((500, 1)).astype(np.float32))[1]
    parts["head_vote"] = with_svm(parts["head_vote"], SvmRows(VotingConfig()), svm)
    head = head_model(tiny_bundle.contract, parts)
    bodies = {f.name: {n.op_type for n in f.node} for f in head.functions}
    assert bodies.keys() == {"TokenInterpolate", "OneClassSvm"}
    assert "Scan" in bodies["OneClassSvm"]
    assert len(svm_node(head).input) == 4
    onnx.save(head, tmp_path / "head.onnx")
    verify_not_frozen(tmp_path / "head.onnx")
