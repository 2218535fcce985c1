"""AST, small, from training to a real server: an image of 768, depth of 192, a map of 192, stretched."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from m3ad.errors import ArtifactError, M3adError
from m3ad.frames import find_samples, read_sample
from m3ad.preprocess import prepare
from m3ad.serving import ServingRecord
from m3ad_calibrate.gate import gate
from m3ad_calibrate.quantize import Settings, quantize
from m3ad_calibrate.record import read_record, record
from m3ad_client.evaluate import evaluate_samples
from m3ad_client.infer import inspect_samples
from m3ad_client.triton import TritonInspector
from m3ad_export.baselines.forms import dense, runner
from m3ad_export.engine import build_engines
from m3ad_export.graphs.plan import default_plan
from m3ad_export.heads.ast import Coupling, Student, Teacher
from m3ad_export.methods.ast import load_official
from m3ad_export.nets.configs import EfficientNetConfig
from m3ad_export.official_files import require_official_encoders
from m3ad_export.saved import load_detector
from m3ad_export.train.ast import AstSettings, likelihood_loss, train_pair
from m3ad_export.train.features import FeatureExtractor
from m3ad_export.training import Encoders
from m3ad_export.weights import load_efficientnet
from m3ad_runtime.pipeline import Inspector
from m3ad_triton.repository import write_repository
from m3ad_triton.server import LocalServer
from PIL import Image
from tiny import Trained, trained_on_images

TINY = EfficientNetConfig(
    name="tiny", stem=4, rows=((1, 3, 2, 1, 4), (1, 5, 2, 2, 4), (1, 3, 2, 2, 6), (2, 5, 2, 2, 8))
)
SHORT = AstSettings(steps=3, batch=2, student_width=8, lr=1e-3, checkpoint_steps=1)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    encoder, weights = load_efficientnet(TINY, None)
    encoders = Encoders(efficientnet=encoder, efficientnet_weights=weights)
    return trained_on_images(tmp_path_factory.mktemp("ast"), "ast", encoders, SHORT)


def test_the_bundle_has_the_published_form_and_its_threshold(trained: Trained) -> None:
    bundle, detector = trained.bundle, load_detector(trained.folder)
    assert bundle.preprocessing.geometry == "relief"
    assert bundle.manifest.dims.rgb_width == TINY.channels
    assert [t.name for t in bundle.contract.inputs] == ["image", "relief", "relief_mask"]
    assert ServingRecord.of(bundle, "chain").weights == "efficientnet tiny (random weights)"
    inspector = Inspector(bundle)
    served = runner("dense", trained.folder, 1, "cpu")
    scores = []
    for sample in find_samples(trained.data, "validation"):
        prepared = prepare(read_sample(sample), bundle.preprocessing)
        assert prepared.relief is not None
        assert prepared.relief_mask is not None
        with torch.inference_mode():
            tensors = map(torch.from_numpy, (prepared.image, prepared.relief, prepared.relief_mask))
            expected = dense(detector)(*tensors).numpy()
        np.testing.assert_allclose(served.run(prepared)[0], expected, atol=1e-6 * np.abs(expected).max())
        found = inspector.inspect_prepared(prepared, with_maps=True)
        assert found.anomaly_map.shape == (192, 192)
        np.testing.assert_allclose(found.anomaly_map, expected, atol=1e-4 * np.abs(expected).max())
        np.testing.assert_array_equal(found.score_maps, found.anomaly_map[None])
        scores.append(found.score)
    assert max(scores) == pytest.approx(detector.record["threshold"]["value"], rel=1e-3)


def test_the_flows_loss_is_a_likelihood_with_the_determinant_of_its_jacobian() -> None:
    """One coupling on grids of one cell: autograd's Jacobian says what log det must be."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        coupling = Coupling(8, 3).double()
        for net in coupling.children():
            torch.nn.init.constant_(net.gamma, 2.0)  # type: ignore[arg-type]
        x, codes = torch.randn(1, 8, 1, 1).double(), torch.randn(1, 32, 1, 1).double()
    jacobian = torch.autograd.functional.jacobian(
        lambda v: coupling(v.reshape(1, 8, 1, 1), codes)[0].flatten(), x.flatten()
    )
    with torch.no_grad():
        z, log_det = coupling(x, codes)
    torch.testing.assert_close(log_det.flatten(), jacobian.slogdet().logabsdet[None])
    mask = torch.ones(1, 1, 1, 1).double()
    normal = torch.distributions.Normal(torch.zeros(()).double(), 1.0)
    expected = -(normal.log_prob(z).sum() + log_det.sum()) - 8 * 0.5 * np.log(2 * np.pi)
    torch.testing.assert_close(likelihood_loss(z, log_det, mask), expected)
    assert float(likelihood_loss(z, log_det, mask * 0)) == 0


def test_a_run_that_was_interrupted_ends_with_the_same_networks(trained: Trained, tmp_path: Path) -> None:
    samples = find_samples(trained.data, "train")
    encoder, _ = load_efficientnet(TINY, None)
    extract = FeatureExtractor(None, None, trained.bundle.preprocessing, tmp_path / "features", encoder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = Teacher(TINY.channels), Student(TINY.channels, 8)
    states = [network.state_dict() for network in first]
    runs = [first]
    for _ in range(2):
        pair = Teacher(TINY.channels), Student(TINY.channels, 8)
        for network, state in zip(pair, states, strict=True):
            network.load_state_dict(state)
        runs.append(pair)
    expected = train_pair(samples, extract, *runs[0], tmp_path / "whole", SHORT)
    assert all(each[-1] < each[0] and len(each) == SHORT.steps for each in expected.values())
    train_pair(samples, extract, *runs[1], tmp_path / "again", SHORT, lambda steps, _d, _t: list(steps)[:2])
    assert train_pair(samples, extract, *runs[2], tmp_path / "again", SHORT) == expected
    for whole, again in zip(runs[0], runs[2], strict=True):
        for key, value in whole.state_dict().items():
            assert torch.equal(value, again.state_dict()[key]), key


def test_engines_hold_whole_stages_and_half_precision_is_gated(trained: Trained, tmp_path: Path) -> None:
    bundle = trained.bundle
    folder = build_engines(bundle, "sm89", "fp16")
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert files.keys() == {f"{s}.plan" for s in ("rgb_encoder", "teacher", "student", "vote")}
    for name in ("rgb_encoder", "teacher", "student"):
        nodes = onnx.load(bundle.path / "onnx" / f"{name}.onnx").graph.node
        assert "BatchNormalization" not in {node.op_type for node in nodes}
        assert "Conv" in {node.op_type for node in nodes}
    record(bundle, trained.data, megabytes=60)
    assert read_record(bundle).keys() == {"rgb_encoder", "teacher", "student"}
    written = quantize(bundle, tmp_path / "fp16", default_plan("fp16"), {}, Settings(), None)
    found = gate(written, bundle, find_samples(trained.data, "test"), budget=1.0)
    assert found["figures"]["chain"]["rank_correlation"]["lowest"] > 0.9


def test_a_server_and_the_client_give_what_the_process_gives(trained: Trained, tmp_path: Path) -> None:
    write_repository(trained.bundle.path, tmp_path / "repository", "onnxruntime")
    samples = find_samples(trained.data, "test")
    here = Inspector(trained.bundle)
    with (
        LocalServer([tmp_path / "repository"]) as server,
        TritonInspector(server.grpc_url, "tiny") as there,
    ):
        frame = read_sample(samples[0])
        found, expected = (i.inspect(frame, with_maps=True) for i in (there, here))
        assert found.anomaly_map.shape == (192, 192)
        np.testing.assert_array_equal(found.anomaly_map, expected.anomaly_map)
        assert (found.score, found.is_anomalous) == (expected.score, expected.is_anomalous)
        whole = there.inspect_frame(frame)
        assert (whole.score, whole.defects) == (expected.score, expected.defects)
        np.testing.assert_array_equal(whole.anomaly_map, expected.anomaly_map)
    document = evaluate_samples(here, samples, with_maps=True)
    assert document["score_maps"].keys() == {"latent_error"}
    (told, *_) = inspect_samples(here, samples[:1], tmp_path / "out")
    assert told.error is None
    assert Image.open(told.overlay).size[0] >= frame.rgb.shape[1]


def test_official_files_load_strictly_and_others_say_why(tmp_path: Path) -> None:
    (tmp_path / "rope").mkdir()
    networks = {"teacher": Teacher(8), "student": Student(8, 16)}
    for name, network in networks.items():
        torch.save(network.state_dict(), tmp_path / "rope" / f"ast_rope_{name}.pth")
    settings = AstSettings(student_width=16)
    fitted, infos = load_official(tmp_path, "rope", settings, channels=8)
    for name, network in networks.items():
        for key, value in network.state_dict().items():
            assert torch.equal(fitted.networks[name].state_dict()[key], value), key
        assert infos[name].licence == "MIT"
    state = networks["teacher"].state_dict()
    state["module_list.4.s1.gamma"] = state.pop("module_list.3.s1.gamma")
    torch.save(state, tmp_path / "rope" / "ast_rope_teacher.pth")
    with pytest.raises(
        ArtifactError,
        match=r"not a checkpoint of Teacher.*lacks 1 \(module_list.3.s1.gamma\).*unknown 1 \(module_list.4.s1.gamma\)",
    ):
        load_official(tmp_path, "rope", settings, channels=8)
    _, random = load_efficientnet(TINY, None)
    with pytest.raises(M3adError, match=r"see what the published efficientnet-b5 .* random weights: add"):
        require_official_encoders(None, None, None, None, None, random)


def test_the_published_encoder_loads_strictly(tmp_path: Path) -> None:
    network, info = load_efficientnet(TINY, None, seed=3)
    assert info.kind == "random"
    image = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3, 768, 768)).astype(np.float32))
    with torch.inference_mode():
        assert 0.1 < float(network(image).std()) < 10  # noise does not vanish on its way
    rest = {"_blocks.5._bn1.weight": torch.zeros(1), "_conv_head.weight": torch.zeros(1)}
    rest |= {"_bn1.bias": torch.zeros(1), "_fc.bias": torch.zeros(1)}
    torch.save({**network.state_dict(), **rest}, tmp_path / "file.pth")
    loaded, info = load_efficientnet(TINY, tmp_path / "file.pth")
    assert info.kind == "pretrained"
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in network.state_dict().items())
    state = {k: v for k, v in network.state_dict().items() if k != "_blocks.4._bn2.running_mean"}
    torch.save({**state, "layer5.weight": torch.zeros(1)}, tmp_path / "file.pth")
    with pytest.raises(
        ArtifactError, match=r"lacks 1 \(_blocks.4._bn2.running_mean\); it has unknown 1 \(layer5.weight\)"
    ):
        load_efficientnet(TINY, tmp_path / "file.pth")


def test_the_published_schedule_is_the_default() -> None:
    published = replace(AstSettings(), epochs=72, batch=8, lr=2e-4, weight_decay=1e-5, student_width=1024)
    assert AstSettings() == published
