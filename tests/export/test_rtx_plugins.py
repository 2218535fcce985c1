"""TensorRT-RTX takes the custom ops as plugins, and its parser, of TensorRT 11's line, judges what TensorRT would get.

The plugins are stand-ins of the contract's shapes; with M3AD_PLUGINS_DIR set the last test takes the real library.
"""

import ctypes
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from m3ad.bundle import Bundle
from m3ad.contract import OP_DOMAIN, OPS, Dims
from m3ad.errors import ArtifactError, M3adError, MissingDependencyError
from m3ad.methods import m3dm
from m3ad_export import engine_builder
from m3ad_export.engine import build_engines, stage_model
from m3ad_export.graphs.compose import cells_model
from m3ad_export.rtx_parser import MACHINES, forwarder
from onnx import helper
from stand_ins import registered

trt = pytest.importorskip("tensorrt_rtx", reason="extra rtx is not installed: pip install 'm3ad[rtx]'")
PLUGINS = {"xyz_extractor": ["FarthestPointSample", "KnnGroup"], "project": ["TokenInterpolate"]}
PLUGINS |= {stage: ["OneClassSvm"] for stage in ("vm", "head_vote")}


@pytest.fixture
def bundle(tiny_bundle: Bundle, tmp_path: Path) -> Bundle:
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle.path, copy)
    return Bundle.open(copy)


@pytest.fixture
def created(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Stand-ins in the registry; the library's file is there, and never loaded because its ops are known."""
    monkeypatch.setenv("M3AD_PLUGINS_DIR", str(tmp_path))
    (tmp_path / "libm3ad_plugins.so").write_bytes(b"one build")
    with registered(trt) as made:
        yield made


def files_of(folder: Path) -> dict[str, Any]:
    files: dict[str, Any] = json.loads((folder / "manifest.json").read_text())["files"]
    return {name.removesuffix(".plan"): entry for name, entry in files.items()}


@pytest.mark.parametrize(("target", "precision"), [("sm86", "fp32"), ("sm89", "fp16"), ("sm120", "fp16")])
def test_every_stage_builds_with_plugin_layers(
    bundle: Bundle, created: Any, target: str, precision: Any
) -> None:
    said: list[str] = []
    files = files_of(build_engines(bundle, target, precision, ("chain", "fused"), said.append))
    assert {
        name: entry["plugin_layers"] for name, entry in files.items() if entry["plugin_layers"]
    } == PLUGINS
    assert sum(entry["loops"] for entry in files.values()) == 0
    assert any(line.endswith("plugins FarthestPointSample, KnnGroup") for line in said)
    attributes = dict(created)
    assert attributes["KnnGroup"]["group_size"] == bundle.contract.dims.group_size
    assert attributes["OneClassSvm"]["kernel"].rstrip("\0") == "linear"


def test_without_plugins_the_bodies_are_loops(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setenv("M3AD_PLUGINS_DIR", "/nowhere")
    files = files_of(build_engines(bundle, "sm89", "fp16", ("chain",), said.append))
    assert files["xyz_extractor"]["loops"] >= 2  # sampling, and grouping in chunks
    assert files["xyz_extractor"]["plugin_layers"] == []
    assert said[0].endswith("sampling and grouping are loops in these engines: m3ad-plugins build")
    with pytest.raises(MissingDependencyError, match=r"libm3ad_plugins.so is in none of /nowhere; build it"):
        build_engines(bundle, "sm89", "fp16", ("chain",), plugins=True)


def test_turing_is_refused(bundle: Bundle) -> None:
    with pytest.raises(
        M3adError, match="sm75 cannot be built for: TensorRT-RTX has no fp32 matrix products on Turing"
    ):
        build_engines(bundle, "sm75", "fp16")


def parse(model: onnx.ModelProto) -> engine_builder.BuiltEngine:
    return engine_builder.build_plan(trt, model.SerializeToString(), "stage", "sm89", Path("library"))


@pytest.mark.parametrize("stage", [*PLUGINS, "head_rows", "head_scores", "mfm"])
def test_the_parser_takes_each_stage_as_tensorrt_gets_it(bundle: Bundle, created: Any, stage: str) -> None:
    """No body is left to be taken for a plugin, and no shape waits for values."""
    model = stage_model(bundle.path / "onnx", stage, bundle.contract, "fp16", with_plugins=True)
    assert not model.functions
    nodes = [n for n in model.graph.node if n.domain == OP_DOMAIN]
    assert [len(n.output) for n in nodes] == [len(OPS[n.op_type].outputs) for n in nodes]
    assert_shapes_need_no_values(model)
    assert parse(model).plugin_layers == PLUGINS.get(stage, [])
    assert [name for name, _ in created] == PLUGINS.get(stage, [])


def test_the_parser_takes_cells_of_a_coarser_grid(created: Any) -> None:
    """M3DM's, for which the op is asked for every one."""
    model = cells_model(m3dm.METHOD.stages(Dims())["cells"], m3dm.METHOD.cpu["cells"])
    del model.functions[:]
    assert parse(model).plugin_layers == ["TokenInterpolate"]
    assert [(name, read["image_size"], read["output_size"]) for name, read in created] == [
        ("TokenInterpolate", 224, 56)
    ]


def test_the_parser_takes_the_whole_head_but_not_its_builder(bundle: Bundle, created: Any) -> None:
    """Full TensorRT gets it whole; TensorRT-RTX 1.7 cannot build its loop over tiles, so it gets the parts."""
    model = stage_model(bundle.path / "onnx", "head", bundle.contract, "fp16", with_plugins=True)
    assert_shapes_need_no_values(model)
    with pytest.raises(ArtifactError, match=r"could not build stage stage for sm89:(?s:.*)graphScope.cpp"):
        parse(model)
    assert [name for name, _ in created] == ["TokenInterpolate", "OneClassSvm"]


def assert_shapes_need_no_values(model: onnx.ModelProto) -> None:
    types = {n.op_type for n in model.graph.node}
    bodies = [a.g for n in model.graph.node for a in n.attribute if a.type == onnx.AttributeProto.GRAPH]
    types |= {n.op_type for body in bodies for n in body.node}
    assert not types & {"NonZero", "Unique", "Compress", "NonMaxSuppression"}


def test_the_gate_sees_a_third_output(bundle: Bundle, created: Any) -> None:
    model = stage_model(bundle.path / "onnx", "xyz_extractor", bundle.contract, "fp16", with_plugins=True)
    (node,) = (n for n in model.graph.node if n.op_type == "KnnGroup")
    node.output.append("one_too_many")
    with pytest.raises(
        ArtifactError,
        match=r"(?s)cannot read stage stage:.*expected output size is 2, actual output size is 3",
    ):
        parse(model)


def test_the_gate_sees_a_nonzero(bundle: Bundle) -> None:
    model = stage_model(bundle.path / "onnx", "project", bundle.contract, "fp16", with_plugins=True)
    model.graph.node.append(helper.make_node("NonZero", ["points"], ["found"]))
    with pytest.raises(AssertionError, match="NonZero"):
        assert_shapes_need_no_values(model)


def test_what_is_up_to_date_is_not_built_again(bundle: Bundle, created: Any, tmp_path: Path) -> None:
    """A plan is of its model's bytes, the plugin library, the builder, the target and the precision."""

    def built(precision: Any = "fp16") -> list[str]:
        said: list[str] = []
        build_engines(bundle, "sm89", precision, ("chain",), said.append)
        return [line.partition(":")[0] for line in said if not line.endswith(": up to date")]

    stages = built()
    assert set(stages) == {"rgb_extractor", "xyz_extractor", "project", "mfm", "mgm", "vm"}
    plans = bundle.path / "engines" / "sm89"
    before = {path.name: path.read_bytes() for path in plans.iterdir()}
    assert built() == []
    assert {path.name: path.read_bytes() for path in plans.iterdir()} == before
    (plans / "mgm.plan").write_bytes(b"damaged")
    assert built() == ["mgm"]
    mfm = bundle.path / "onnx" / "mfm.onnx"
    model = onnx.load(mfm)
    model.graph.initializer[0].name, renamed = "renamed", model.graph.initializer[0].name
    for node in model.graph.node:
        node.input[:] = ["renamed" if name == renamed else name for name in node.input]
    onnx.save(model, mfm)
    assert built() == ["mfm"]
    assert built("fp32") == stages
    (tmp_path / "libm3ad_plugins.so").write_bytes(b"another build")
    assert built("fp32") == stages


def test_a_silent_builder_is_reported(monkeypatch: pytest.MonkeyPatch, bundle: Bundle) -> None:
    monkeypatch.setattr(engine_builder, "PROGRESS_S", 0.001)
    said: list[str] = []
    model = stage_model(bundle.path / "onnx", "rgb_extractor", bundle.contract, "fp16", with_plugins=True)
    engine_builder.build_plan(trt, model.SerializeToString(), "rgb_extractor", "sm89", say=said.append)
    assert said[0] == "rgb_extractor: building, 0 s so far"


def test_the_forwarder_is_found_by_its_name_and_gives_what_it_needs(tmp_path: Path) -> None:
    """In a process of its own: the dynamic linker keeps what it has loaded."""
    needed = tmp_path / "libneeded_of_test.so.1"
    source = tmp_path / "needed.c"
    source.write_text("int answer(void) { return 42; }")
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-Wl,-soname,libneeded_of_test.so.1", "-o", needed, source], check=True
    )
    machine = MACHINES[os.uname().machine]
    (tmp_path / "f.so").write_bytes(forwarder("libforwarder_of_test.so", needed.name, machine))
    program = f"""
import ctypes
ctypes.CDLL({str(needed)!r}, ctypes.RTLD_GLOBAL)
ctypes.CDLL({str(tmp_path / "f.so")!r}, ctypes.RTLD_GLOBAL)
print(ctypes.CDLL("libforwarder_of_test.so").answer())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("42\n", "")
    assert struct.unpack_from("<HH", (tmp_path / "f.so").read_bytes(), 16) == (3, machine)


@pytest.mark.skipif("M3AD_PLUGINS_DIR" not in os.environ, reason="M3AD_PLUGINS_DIR names no plugin library")
def test_the_real_library_builds_as_its_stand_ins_do(bundle: Bundle) -> None:
    """In a process of its own: a registry keeps a library."""
    program = "from m3ad_export.cli import main; main()"
    command = ["build-engine", str(bundle.path), "--target", "sm89", "--plugins", "--layout", "chain"]
    done = subprocess.run(
        [sys.executable, "-c", program, *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    ctypes.CDLL(str(Path(os.environ["M3AD_PLUGINS_DIR"]) / "libm3ad_plugins.so"))
    files = files_of(bundle.path / "engines" / "sm89")
    found = {name: entry["plugin_layers"] for name, entry in files.items() if entry["plugin_layers"]}
    assert found == {name: PLUGINS[name] for name in ("xyz_extractor", "project", "vm")}
