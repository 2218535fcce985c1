import shutil
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from m3ad.bundle import Bundle
from m3ad.errors import ArtifactError, FrameError, M3adError
from m3ad.preprocess import ModelInput
from m3ad_calibrate.cli import app
from m3ad_calibrate.svm import MAX_VECTORS, config_of, fit_svm, write_svm
from m3ad_calibrate.threshold import Kernel, SvmInput, reliability
from m3ad_export.sample_data import write_sample_data
from m3ad_runtime.pipeline import Inspector
from sklearn.svm import OneClassSVM
from typer.testing import CliRunner

INT8 = {"type": "int8", "half": None, "source_onnx": "0" * 64}


@pytest.fixture
def bundle(tiny_bundle: Bundle, tmp_path: Path) -> Bundle:
    shutil.copytree(tiny_bundle.path, tmp_path / "bundle")
    manifest = Bundle.open(tmp_path / "bundle")
    if manifest.manifest.voting is None:  # the trained detector's record has it, the tiny one's need not
        exponents = [[1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]]
        return manifest.update(voting={"exponents": exponents, "svm_input": "product"})
    return manifest


@pytest.fixture
def maps() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.gamma(2.0, 0.1, size=(7, 224, 224)).astype(np.float32) for _ in range(2)]


@pytest.mark.parametrize("svm_input", ["product", "terms"])
def test_rbf_decides_as_scikit_learn(bundle: Bundle, maps: list[np.ndarray], svm_input: SvmInput) -> None:
    config = config_of(bundle, svm_input)
    vote = fit_svm(maps, config, "rbf", 0.1)
    terms = np.stack([m[3:].reshape(4, -1) for m in maps], axis=1).reshape(4, -1).T.astype(np.float64)
    rows = terms if svm_input == "terms" else (terms ** (1 / 4)).prod(axis=1, keepdims=True)
    unit = rows.mean(axis=0)
    picked = (rows / unit)[np.linspace(0, len(rows) - 1, int(MAX_VECTORS / 0.1 * 0.9)).astype(int)]
    gamma = 1 / np.square(rows / unit).sum(axis=1).max()
    theirs = OneClassSVM(kernel="rbf", nu=0.1, gamma=gamma, tol=1e-6).fit(picked)
    first = rows[: 224 * 224] / unit
    with torch.inference_mode():
        decision, score = vote(torch.from_numpy(maps[0]))
    expected = -theirs.decision_function(first)  # theirs is larger for what is normal
    np.testing.assert_allclose(decision.numpy().ravel(), expected, atol=2e-4)
    assert float(score) == decision.max()
    assert len(vote.svm.support_vectors) <= MAX_VECTORS


@pytest.mark.parametrize(("kernel", "svm_input"), [("linear", "terms"), ("rbf", "product")])
def test_the_refitted_svm_is_in_every_graph_and_golden_value(
    bundle: Bundle, maps: list[np.ndarray], kernel: Kernel, svm_input: SvmInput
) -> None:
    before = np.load(bundle.file("golden/anomaly_map.npy"))
    original = (bundle.path / "onnx" / "mgm.onnx").read_bytes()
    vote = fit_svm(maps, config_of(bundle, svm_input), kernel, 0.3)
    written = write_svm(bundle, vote, kernel, 0.3)
    assert written.document["svm"]["kernel"] == kernel
    assert written.document["voting"]["svm_input"] == svm_input
    golden = {n: np.load(written.file(f"golden/{n}.npy")) for n in ("anomaly_map", "score", "score_maps")}
    assert not np.array_equal(golden["anomaly_map"], before)
    with torch.inference_mode():
        expected, _ = vote(torch.from_numpy(golden["score_maps"]))
    np.testing.assert_allclose(golden["anomaly_map"], expected.numpy(), atol=1e-6)
    frame = ModelInput(
        **{n: np.load(written.file(f"golden/{n}.npy")) for n in written.contract.method.inputs}
    )
    for layout in ("chain", "fused"):
        found = Inspector(written, layout).inspect_prepared(frame)  # type: ignore[arg-type]
        np.testing.assert_allclose(found.anomaly_map, golden["anomaly_map"], atol=1e-3)
    head = ort.InferenceSession(
        str(written.file("onnx/head.onnx"))
    )  # composed again, for GPUs and any ONNX runtime
    names = ("rgb_tokens", "centers", "xyz_tokens", "points", "point_pixel", "scored_pixel")
    (composed,) = head.run(["anomaly_map"], {n: np.load(written.file(f"golden/{n}.npy")) for n in names})
    np.testing.assert_allclose(composed, golden["anomaly_map"], atol=1e-3)
    assert (written.path / "onnx" / "mgm.onnx").read_bytes() == original


def test_a_quantized_bundle_is_not_refitted(bundle: Bundle, maps: list[np.ndarray]) -> None:
    vote = fit_svm(maps, config_of(bundle, None), "linear", 0.5)
    with pytest.raises(ArtifactError, match="is quantized; refit the SVM of the bundle it was made from"):
        write_svm(bundle.update(precision=INT8), vote, "linear", 0.5)
    with pytest.raises(FrameError, match="there are no good frames to fit the one-class SVM to"):
        fit_svm([], config_of(bundle, None), "linear", 0.5)


def test_command_refits_then_sets_the_threshold(bundle: Bundle, tmp_path: Path) -> None:
    write_sample_data(tmp_path / "data", train=2, validation=2, test_per_kind=1, size=128)
    arguments = ["threshold", str(bundle.path), "--data", str(tmp_path / "data")]
    result = CliRunner().invoke(app, [*arguments, "--svm-input", "terms"])
    assert isinstance(result.exception, M3adError)
    assert "--svm-input is for a refit" in str(result.exception)
    result = CliRunner().invoke(app, [*arguments, "--svm", "rbf", "--svm-input", "terms"])
    assert result.exit_code == 0, result.output
    manifest = Bundle.open(bundle.path).document
    assert manifest["svm"]["kernel"] == "rbf"
    assert manifest["threshold"]["value"] == max(manifest["threshold"]["validation_scores"])


def test_reliability_is_leave_one_out() -> None:
    """By hand for three parts: the rule lets k of the two others pass, the third alarms if it lies above."""
    assert reliability([1.0]) == []
    rows = reliability([1.0, 2.0, 3.0])
    assert [r[0] for r in rows] == [1 / 3, 2 / 3]
    # rate 1/3 of two others: the larger one is the threshold; only the largest part lies above the others.
    assert rows[0][1] == 1 / 3
    # rate 2/3: the smaller one; the two larger parts lie above it.
    assert rows[1][1] == 2 / 3
    assert all(low <= found <= high for _, found, low, high in rows)
