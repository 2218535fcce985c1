"""Networks of convolutions, small, from a bundle to INT8: recorded, searched, quantized, gated, built."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from m3ad.bundle import Bundle, file_entry, write_json
from m3ad.errors import ArtifactError
from m3ad.frames import find_samples, read_sample
from m3ad_calibrate.cli import app
from m3ad_calibrate.gate import failures, gate
from m3ad_calibrate.quantize import Settings, quantize
from m3ad_calibrate.record import read_record, record
from m3ad_export.engine import build_engines
from m3ad_export.graphs.plan import default_plan, read_plan
from m3ad_export.methods.btf import BtfSettings
from m3ad_export.nets.configs import EfficientNetConfig, WideResNetConfig
from m3ad_export.train.ast import AstSettings
from m3ad_export.train.crd import CrdSettings
from m3ad_export.training import Encoders
from m3ad_export.weights import load_efficientnet, load_teacher
from m3ad_runtime.pipeline import Inspector
from onnx import numpy_helper
from tiny import Trained, trained_on_images
from typer.testing import CliRunner

WIDE = WideResNetConfig(name="tiny", stem=8, inner=8, blocks=(1, 1, 1))
EFFICIENT = EfficientNetConfig(
    name="tiny", stem=8, rows=((1, 3, 2, 1, 8), (1, 5, 2, 2, 8), (1, 3, 2, 2, 8), (2, 5, 2, 2, 8))
)
SETTINGS: dict[str, Any] = {
    "crd": CrdSettings(steps=3, batch=2, checkpoint_steps=1),
    "ast": AstSettings(steps=3, batch=2, student_width=16, lr=1e-3, checkpoint_steps=1),
    "btf": BtfSettings(bank_fraction=0.02),
}
NOTHING = r"^$"
# Each method's networks, and which of their convolutions the default plan keeps.
KEPT = {
    "crd": {"teacher": r"^network\.conv1/", "rgb_student": NOTHING, "depth_student": NOTHING},
    "ast": {"rgb_encoder": r"^_conv_stem/|_depthwise_|_se_", "teacher": NOTHING, "student": NOTHING},
    "btf": {"rgb_rows": r"^network\.conv1/"},
}
# A group of each network in a search, as a method declares them.
GROUPS = {
    "crd": {"teacher layer 2", "RGB decoder", "depth filter", "depth amplifier", "RGB bottleneck"},
    "ast": {"encoder blocks 0 to 9", "coupling 3", "residual 0", "student conv1", "student conv2"},
    "btf": {"image layer 1", "image layer 2", "image layer 3"},
}

pytestmark = pytest.mark.usefixtures("one_thread")
each = pytest.mark.parametrize("method", SETTINGS)
Get = Callable[[str], Trained]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Get:
    """Each method's detector, made when it is first asked for, with the inputs of its graphs recorded."""
    made: dict[str, Trained] = {}

    def get(method: str) -> Trained:
        if method not in made:
            if method == "ast":
                encoder, weights = load_efficientnet(EFFICIENT, None)
                encoders = Encoders(efficientnet=encoder, efficientnet_weights=weights)
            else:
                teacher, weights = load_teacher(WIDE, None)
                encoders = Encoders(teacher=teacher, teacher_weights=weights)
            root = tmp_path_factory.mktemp(method)
            made[method] = trained_on_images(root, method, encoders, SETTINGS[method])
            record(made[method].bundle, made[method].data, megabytes=60)
        return made[method]

    return get


def quantized(trained: Trained, out: Path) -> Bundle:
    feeds = read_record(trained.bundle)
    return quantize(trained.bundle, out, default_plan("int8"), feeds, Settings(), None)


@pytest.mark.slow
@each
def test_int8_passes_its_gate_and_becomes_engines(method: str, trained: Get, tmp_path: Path) -> None:
    source = trained(method)
    written = quantized(source, tmp_path / "int8")
    products = written.document["precision"]["products"]
    for name, kept in KEPT[method].items():
        nodes = onnx.load(source.bundle.file(f"onnx/{name}.onnx")).graph.node
        convolutions = [node.name for node in nodes if node.op_type in ("Conv", "ConvTranspose")]
        assert products[name]["INT8"] == sum(not re.search(kept, each) for each in convolutions) > 0
    assert written.document["precision"]["weight_bytes"]["ratio"] < 0.5 or method == "btf"  # has a bank
    found = gate(written, source.bundle, find_samples(source.data, "test"), budget=1.0)
    assert failures(found["figures"], 1.0) == []
    with pytest.raises(ArtifactError, match="is quantized and"):
        build_engines(written, "sm89")
    files = json.loads((build_engines(written.update(gate=found), "sm89") / "manifest.json").read_text())[
        "files"
    ]
    assert files.keys() == {f"{step.stage}.plan" for step in written.contract.steps("chain")}
    for name in KEPT[method]:
        assert files[f"{name}.plan"]["precision_histogram"]["INT8"] == products[name]["INT8"]


@pytest.mark.parametrize("method", ["crd", "ast"])  # BTF's maps are made of its histograms, nearly alone
def test_wrong_scales_fail_the_gate(method: str, trained: Get, tmp_path: Path) -> None:
    """What the first network's convolutions read clipped to a thousandth, written as if nothing had happened."""
    source = trained(method)
    written = quantized(source, tmp_path / "int8")
    relative = f"onnx/{next(iter(KEPT[method]))}.onnx"
    model = onnx.load(written.file(relative))
    scales = {node.input[1] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    for stored in (i for i in model.graph.initializer if i.name in scales):
        stored.CopyFrom(
            numpy_helper.from_array(numpy_helper.to_array(stored) / np.float32(1000), stored.name)
        )
    onnx.save(model, written.path / relative)
    files = {**written.document["files"], relative: file_entry(written.path / relative)}
    write_json(written.path / "manifest.json", {**written.document, "files": files})
    found = gate(Bundle.open(written.path), source.bundle, find_samples(source.data, "test"), budget=1.0)
    assert any("maps rank alike by" in line for line in failures(found["figures"], 1.0))


@pytest.mark.slow
@each
def test_a_search_ranks_the_networks_and_writes_a_plan(method: str, trained: Get, tmp_path: Path) -> None:
    source, out = trained(method), tmp_path / "plan.json"
    where = [str(source.bundle.path), "--data", str(source.data), "--frames", "1"]
    result = CliRunner().invoke(app, ["sensitivity", *where, "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    groups = json.loads(result.stdout)["groups"]
    assert GROUPS[method] <= {group["name"] for group in groups}
    assert sum(group["share"] for group in groups) == pytest.approx(1, abs=1e-3)
    assert all(group["share"] > 0 for group in groups)
    assert read_plan(out).precision == "int8"


@each
def test_the_quantized_network_is_near_and_not_the_same(method: str, trained: Get, tmp_path: Path) -> None:
    source = trained(method)
    written = quantized(source, tmp_path / "int8")
    for sample in find_samples(source.data, "validation"):
        frame = read_sample(sample)
        full, found = (Inspector(b).inspect(frame).anomaly_map for b in (source.bundle, written))
        error = np.abs(found - full).max() / np.abs(full).max()
        assert 1e-6 < error < 0.2


@each
def test_fp8_is_refused_in_a_sentence(method: str, trained: Get, tmp_path: Path) -> None:
    source = trained(method)
    with pytest.raises(ArtifactError, match=r"no matrix product for fp8, .*; quantize it to int8 or fp16$"):
        quantize(
            source.bundle, tmp_path / "fp8", default_plan("fp8"), read_record(source.bundle), Settings(), None
        )
    assert not (tmp_path / "fp8").exists()
    where = [str(source.bundle.path), "--data", str(source.data), "--frames", "1"]
    result = CliRunner().invoke(app, ["sensitivity", *where, "--precision", "fp8"])
    assert isinstance(result.exception, ArtifactError)
    assert "which is not for convolutions" in str(result.exception)
