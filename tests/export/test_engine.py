import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from m3ad.bundle import Bundle, file_entry, sha256_of
from m3ad.contract import LAYOUTS, OPS
from m3ad.errors import ArtifactError, M3adError, MissingDependencyError
from m3ad.methods.common import HEAD_PARTS
from m3ad_export.engine import build_engines, source_files, stage_model
from m3ad_export.engine_builder import add_profile, begin_timing, keep_timing
from m3ad_export.engine_types import verify_precision
from m3ad_export.graphs.precision import histogram
from m3ad_export.graphs.vote import with_svm
from m3ad_export.heads.voting import OneClassSvm, SvmRows, VotingConfig

trt = pytest.importorskip("tensorrt_rtx", reason="extra rtx is not installed: pip install 'm3ad[rtx]'")


@pytest.fixture
def bundle(tiny_bundle: Bundle, tmp_path: Path) -> Bundle:
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle.path, copy)
    return Bundle.open(copy)


def test_a_bundle_of_hard_links_is_one_sentence(tiny_bundle: Bundle, tmp_path: Path) -> None:
    copy = tmp_path / "linked"
    shutil.copytree(tiny_bundle.path, copy, copy_function=os.link)  # as cp -al does
    with pytest.raises(
        ArtifactError, match=r"cannot be read with its weights: .*hard links.* Copy the bundle"
    ):
        build_engines(Bundle.open(copy), "sm89", "fp16", ("chain",), print)
    assert not list((copy / "engines").glob("*"))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_stage_builds_ahead_of_time(bundle: Bundle, precision: str) -> None:
    said: list[str] = []
    folder = build_engines(bundle, "sm89", precision, ("chain", "fused"), said.append)  # type: ignore[arg-type]
    manifest = json.loads((folder / "manifest.json").read_text())
    plans = {p.name for p in folder.glob("*.plan")}
    assert plans == set(manifest["files"])
    assert {
        "rgb_extractor.plan",
        "xyz_extractor.plan",
        "project.plan",
        "mfm.plan",
        "mgm.plan",
        "vm.plan",
    } <= plans
    assert (manifest["runtime"], manifest["compute_capability"], manifest["precision"]) == (
        "tensorrt_rtx",
        "8.9",
        precision,
    )
    for entry in manifest["files"].values():
        assert entry["bytes"] > 1000
        assert ("FLOAT16" in entry["precision_histogram"]) <= (precision == "fp16")
    told = [line for line in said if not line.startswith("no plugin library")]
    assert len(told) == len(plans)
    Bundle.open(bundle.path)  # engines are no tampering


# A box that has no torch: nothing named so is found, whoever asks.
WITHOUT_TORCH = """
import sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "onnxscript"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
sys.modules["torch"] = None
from m3ad.commands import export
export()
"""


def run_without_torch(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_builds_both_layouts_without_torch(bundle: Bundle) -> None:
    done = run_without_torch(
        "build-engine", str(bundle.path), "--target", "sm89", "--precision", "fp32", "--json"
    )
    assert done.returncode == 0, done.stderr
    (folder,) = map(Path, json.loads(done.stdout))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["layouts"] == ["chain", "fused"]
    stages = {step.stage for layout in LAYOUTS for step in bundle.contract.steps(layout)} - {"head"}
    assert manifest["files"].keys() == {f"{name}.plan" for name in stages.union(HEAD_PARTS)}
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == sha256_of(folder / name)


def test_head_for_plugins_is_composed_without_torch(bundle: Bundle) -> None:
    """Full TensorRT takes the head whole; it is put together from its parts while the engine is built."""
    program = f"""
from pathlib import Path
from m3ad.bundle import Bundle
from m3ad_export.engine import stage_model
bundle = Bundle.open(Path({str(bundle.path)!r}))
for stage in ("project", "head"):
    assert stage_model(bundle.path / "onnx", stage, bundle.contract, "fp16", with_plugins=True).graph.node
"""
    text = WITHOUT_TORCH.replace("from m3ad.commands import export\nexport()\n", program)
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_other_commands_work_or_name_what_they_need(bundle: Bundle, tmp_path: Path) -> None:
    found = run_without_torch("doctor", "--json")
    assert {entry["subject"] for entry in json.loads(found.stdout)} >= {"ONNX Runtime", "TensorRT-RTX"}
    assert "[Errno" not in found.stderr
    assert "Traceback" not in found.stderr
    assert "build-engine" in run_without_torch("--help").stdout
    refused = run_without_torch("train", str(tmp_path), str(tmp_path / "out"))
    assert refused.returncode == 1
    assert refused.stderr == (
        "error: torch is not installed, this command needs it: pip install 'm3ad[export]'\n"
    )


def engines_of(bundle: Bundle) -> dict[str, dict[str, object]]:
    folder = build_engines(bundle, "sm89", "fp16", ("chain", "fused"))
    files: dict[str, dict[str, object]] = json.loads((folder / "manifest.json").read_text())["files"]
    return files


def test_engines_name_what_they_were_built_from(bundle: Bundle) -> None:
    """The hash of the very model that the parser read: a byte of the weights beside it is a byte of it."""
    folder = bundle.path / "onnx"
    before = engines_of(bundle)
    assert before["xyz_extractor.plan"]["source_files"] == {
        name: sha256_of(folder / name) for name in ("xyz_extractor.onnx", "xyz_encoder.weights")
    }
    assert before["mfm.plan"]["source_files"] == {"mfm.onnx": sha256_of(folder / "mfm.onnx")}
    assert {path.name for path in source_files(bundle, "head")} == {f"{name}.onnx" for name in HEAD_PARTS}
    model = stage_model(folder, "mfm", bundle.contract, "fp16", with_plugins=False)
    assert before["mfm.plan"]["onnx_sha256"] == hashlib.sha256(model.SerializeToString()).hexdigest()

    weights = bytearray((folder / "xyz_encoder.weights").read_bytes())
    weights[-1] ^= 128  # the sign of the last weight
    (folder / "xyz_encoder.weights").write_bytes(weights)
    entry = file_entry(folder / "xyz_encoder.weights")
    changed = bundle.update(files={**bundle.document["files"], "onnx/xyz_encoder.weights": entry})
    after = engines_of(Bundle.open(changed.path))
    differ = {name for name in before if before[name]["onnx_sha256"] != after[name]["onnx_sha256"]}
    assert differ == {"xyz_extractor.plan"}
    assert {n for n in before if before[n]["source_files"] != after[n]["source_files"]} == differ


@pytest.mark.parametrize("with_plugins", [True, False])
@pytest.mark.parametrize("stage", ["project", "head"])
def test_no_size_depends_on_data(bundle: Bundle, stage: str, with_plugins: bool) -> None:
    """R is the length of an input, and a node of an op has as many outputs as its plugin."""
    model = stage_model(bundle.path / "onnx", stage, bundle.contract, "fp32", with_plugins=with_plugins)
    assert [v.name for v in model.graph.input][-1] == "scored_pixel"
    nodes = list(model.graph.node)
    assert not {"NonZero", "Unique", "Compress"} & {n.op_type for n in nodes}
    spread = [n for n in nodes if n.op_type == "TokenInterpolate"]
    assert len(spread) == with_plugins
    for node in spread:
        assert (len(node.input), len(node.output)) == (5, 1)
        given = {a.name: a.s or a.i for a in node.attribute}
        assert given["plugin_version"] == b"2"
        assert (given["image_size"], given["output_size"]) == (224, 224)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_a_vote_of_either_kernel_builds(bundle: Bundle, kernel: str) -> None:
    """TensorRT-RTX takes the op's function body, full TensorRT the op as a plugin."""
    svm = OneClassSvm(4, 3, kernel)  # type: ignore[arg-type]
    svm.support_vectors = torch.rand(3, 4)
    config = VotingConfig(svm_input="terms")
    for name in ("vm", "head_vote"):
        path = bundle.file(f"onnx/{name}.onnx")
        onnx.save(with_svm(onnx.load(path), SvmRows(config), svm), path)
    for stage in ("vm", "head"):
        model = stage_model(bundle.path / "onnx", stage, bundle.contract, "fp16", with_plugins=True)
        (op,) = (n for n in model.graph.node if n.op_type == "OneClassSvm")
        assert (len(op.input), len(op.output), len(model.functions)) == (4, 1, 0)
        inlined = stage_model(bundle.path / "onnx", stage, bundle.contract, "fp16", with_plugins=False)
        assert not {n.op_type for n in inlined.graph.node} & OPS.keys()
    plans = engines_of(bundle)
    assert {"vm.plan", "head_vote.plan"} <= plans.keys()
    assert "FLOAT16" not in plans["head_vote.plan"]["precision_histogram"]  # type: ignore[operator]


def test_plugins_leave_no_function_body_to_be_taken_instead(bundle: Bundle) -> None:
    model = stage_model(bundle.path / "onnx", "xyz_extractor", bundle.contract, "fp16", with_plugins=True)
    assert not model.functions
    sampler, grouper = (n for n in model.graph.node if n.domain == "m3ad")
    assert (sampler.op_type, grouper.op_type) == ("FarthestPointSample", "KnnGroup")
    assert list(sampler.input) == [v.name for v in model.graph.input] == ["points", "point_pixel"]
    assert {a.name: a.s for a in sampler.attribute}["plugin_version"] == b"2"
    assert (
        histogram(model)["FLOAT16"] >= 2 * 6
    )  # of each block: qkv, both of attention, its output, two of the MLP


def test_a_silent_fp32_engine_is_refused() -> None:
    verify_precision("mgm", {"FLOAT16": 8}, {"FLOAT16": 8, "FLOAT": 1})
    with pytest.raises(
        ArtifactError, match="stage mgm has 2 matrix products in FLOAT16, the ONNX file asks for 8"
    ):
        verify_precision("mgm", {"FLOAT16": 8}, {"FLOAT16": 2, "FLOAT": 6})


@pytest.mark.parametrize("target", ["sm87", "sm999", "gpu"])
def test_an_unknown_target_is_named(bundle: Bundle, target: str) -> None:
    with pytest.raises(M3adError, match=f"unknown target '{target}', expected native or one of sm80, sm86"):
        build_engines(bundle, target, "fp16")
    assert not (bundle.path / "engines").exists()


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt") is not None, reason="full TensorRT is installed here"
)
def test_native_without_tensorrt_says_what_to_install(bundle: Bundle) -> None:
    with pytest.raises(MissingDependencyError, match=r"tensorrt is not installed: install TensorRT 10.3"):
        build_engines(bundle, "native", "fp16")


def test_a_file_the_parser_cannot_read_lists_its_errors(bundle: Bundle) -> None:
    path = bundle.file("onnx/mfm.onnx")
    model = onnx.load(path)
    model.graph.node.append(onnx.helper.make_node("Nonsense", ["rgb_features"], ["lost"], domain="elsewhere"))
    model.opset_import.append(onnx.helper.make_opsetid("elsewhere", 1))
    onnx.save(model, path)
    with pytest.raises(ArtifactError, match=r"(?s)cannot read stage mfm:.*Nonsense.*Export the bundle again"):
        build_engines(bundle, "sm86", "fp32")
    assert not (bundle.path / "engines" / "sm86").exists()


def test_an_engine_takes_any_frame_of_the_contract() -> None:
    """From 1024 points on, and from one scored pixel on: a lattice may leave that few."""
    builder = trt.Builder(trt.Logger())
    network = builder.create_network(0)
    for name, shape, letters in (
        ("points", (-1, 3), {0: "N"}),
        ("scores", (3, -1), {1: "R"}),
        ("still", (2,), {}),
    ):
        tensor = network.add_input(name, trt.DataType.FLOAT, shape)
        for axis, letter in letters.items():
            tensor.set_dimension_name(axis, letter)
    added: list[Any] = []
    add_profile(builder, network, SimpleNamespace(add_optimization_profile=added.append))
    (profile,) = added
    shapes = {name: [tuple(shape) for shape in profile.get_shape(name)] for name in ("points", "scores")}
    assert shapes == {
        "points": [(1024, 3), (20000, 3), (50176, 3)],
        "scores": [(3, 1), (3, 20000), (3, 50176)],
    }


class TimingConfig:
    """What a builder's configuration does about timing caches: one of another version is refused."""

    def __init__(self, accepts: bytes) -> None:
        self.accepts, self.begun_with = accepts, b""

    def create_timing_cache(self, known: bytes) -> bytes:
        return known

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache in (b"", self.accepts):
            self.begun_with = cache
            return True
        return False

    def get_timing_cache(self) -> SimpleNamespace:
        return SimpleNamespace(serialize=lambda: self.begun_with + b"+timed")


def test_timings_are_kept_and_those_of_another_builder_dropped(tmp_path: Path) -> None:
    path = tmp_path / "native.timing_cache"
    begun = []
    for accepts in (b"", b"+timed", b"of another version"):
        config = TimingConfig(accepts)
        begin_timing(config, path)
        begun.append(config.begun_with)
        keep_timing(config, path)
    assert begun == [b"", b"+timed", b""]
    assert [p.name for p in tmp_path.iterdir()] == ["native.timing_cache"]
    assert path.read_bytes() == b"+timed"
