"""What can be wrong with engines, TensorRT or the GPU is one sentence, and leaves nothing on the device."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_input
from gpu_double import GpuDouble
from gpu_engines import LIBRARY, build, installed
from m3ad.bundle import Bundle, file_entry
from m3ad.errors import ArtifactError, DeviceError, M3adError, MissingDependencyError
from m3ad_client.cli import app
from m3ad_plugins.library import Finding
from m3ad_runtime import tensorrt_pipeline
from m3ad_runtime.pipeline import Inspector
from typer.testing import CliRunner

NO_DRIVER = Finding("driver", False, "libcuda.so.1 is not here", "install the NVIDIA driver")


class Box:
    """A bundle with engines and the machine it is opened on, either of which a test breaks."""

    def __init__(self, bundle: Bundle, double: GpuDouble, library: Path, patch: pytest.MonkeyPatch) -> None:
        self.path, self.double, self.library, self.patch = bundle.path, double, library, patch

    @property
    def native(self) -> Path:
        return self.path / "engines" / "native"

    def change_manifest(self, **changes: Any) -> None:
        path = self.native / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def build(self, layouts: Any = ("chain", "fused"), **facts: Any) -> None:
        shutil.rmtree(self.native)
        build(self.patch, Bundle.open(self.path), "native", self.double.trt, layouts, **facts)

    def replace_plan(self, stage: str, content: bytes) -> None:
        """Another plan that the manifest lists as its own."""
        plan = self.native / f"{stage}.plan"
        plan.write_bytes(content)
        files = json.loads((self.native / "manifest.json").read_text())["files"]
        self.change_manifest(files={**files, plan.name: {**files[plan.name], **file_entry(plan)}})

    def absent(self, module: str) -> None:
        self.patch.setitem(sys.modules, module, None)


@pytest.fixture
def box(gpu_bundle: Bundle, double: GpuDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Box:
    shutil.copytree(gpu_bundle.path, tmp_path / "bundle")
    return Box(Bundle.open(tmp_path / "bundle"), double, tmp_path / "library", monkeypatch)


def other_bundle(box: Box) -> None:
    """The bundle was exported again since its engines were built."""
    path = box.path / "onnx" / "rgb_extractor.onnx"
    path.write_bytes(path.read_bytes() + b"\x72\x00")  # an empty field that no reader looks at
    bundle = json.loads((box.path / "manifest.json").read_text())
    bundle["files"]["onnx/rgb_extractor.onnx"] = file_entry(path)
    (box.path / "manifest.json").write_text(json.dumps(bundle))


def other_tensors(box: Box) -> None:
    box.replace_plan("head", (box.native / "project.plan").read_bytes())


FAULTS: dict[str, tuple[Callable[[Box], Any], type[M3adError], str]] = {
    "no driver": (
        lambda box: box.patch.setattr(tensorrt_pipeline, "check_driver", lambda: NO_DRIVER),
        DeviceError,
        r"no GPU can be reached: libcuda\.so\.1 is not here; install the NVIDIA driver",
    ),
    "no pycuda": (
        lambda box: (box.absent("pycuda"), box.absent("pycuda.driver")),
        MissingDependencyError,
        r"pycuda is not installed, engines in this process need it: pip install 'm3ad\[gpu\]'",
    ),
    "no TensorRT": (
        lambda box: box.absent("tensorrt"),
        MissingDependencyError,
        "TensorRT is not installed, its engines need it: install TensorRT 10.3 to 11.4",
    ),
    "no engines": (
        lambda box: shutil.rmtree(box.native),
        ArtifactError,
        r"has no engines for TensorRT, only for TensorRT-RTX \(sm89\); build them: m3ad-export build-engine \S+ "
        "--target native",
    ),
    "engines of nobody knows what": (
        lambda box: box.change_manifest(runtime=None),
        ArtifactError,
        r"has no engines for TensorRT, only for a runtime that is not recorded \(native\), TensorRT-RTX \(sm89\)",
    ),
    "damaged manifest": (
        lambda box: box.change_manifest(
            files={"head.plan": {"sha256": "0" * 64, "bytes": 1, "plugin_layers": 3}}
        ),
        ArtifactError,
        r"native/manifest\.json.*plugin_layers",
    ),
    "wrong GPU": (
        lambda box: setattr(box.double, "capability", (8, 6)),
        ArtifactError,
        r"has TensorRT engines for compute capability 8\.9 \(native\), this GPU has 8\.6; build for it: m3ad-export "
        r"build-engine \S+ --target native",
    ),
    "wrong TensorRT": (
        lambda box: setattr(box.double.trt, "__version__", "10.16.1.11"),
        ArtifactError,
        r"native was built by TensorRT 10\.13\.3\.9, version 10\.16\.1\.11 is installed and plans are for one version; "
        "build again: m3ad-export build-engine",
    ),
    "another layout": (
        lambda box: box.build(("chain",)),
        ArtifactError,
        r"native has no plan of stage head; build the layout: m3ad-export build-engine \S+ --target native --layout "
        "fused",
    ),
    "changed plan": (
        lambda box: (box.native / "head.plan").write_bytes(b"something else"),
        ArtifactError,
        r"head\.plan was changed after it was written: sha256 \w+\.\.\., expected",
    ),
    "missing plan": (
        lambda box: (box.native / "rgb_extractor.plan").unlink(),
        ArtifactError,
        r"rgb_extractor\.plan is missing, the manifest lists it\. Build again: m3ad-export",
    ),
    "stale engines": (
        other_bundle,
        ArtifactError,
        r"rgb_extractor\.plan was built of another rgb_extractor\.onnx than lies in \S+; build again: m3ad-export",
    ),
    "no plugin library": (
        lambda box: (box.library / LIBRARY).unlink(),
        MissingDependencyError,
        r"libm3ad_plugins\.so is in none of \S+; build it",
    ),
    "refused plugin library": (
        lambda box: (box.library / LIBRARY).write_text("of another processor"),
        ArtifactError,
        r"tensorrt 10\.13\.3\.9 refused \S+libm3ad_plugins\.so; run: m3ad-export doctor",
    ),
    "old plugin library": (
        lambda box: (box.library / LIBRARY).write_text(
            "plugins: FarthestPointSample KnnGroup TokenInterpolate NearestRow"
        ),
        ArtifactError,
        r"has no plugin for OneClassSvm; build it again: m3ad-plugins build",
    ),
    "plugin library from before an attribute": (
        lambda box: (box.library / LIBRARY).write_text(
            "plugins: FarthestPointSample KnnGroup TokenInterpolate:image_size NearestRow OneClassSvm"
        ),
        ArtifactError,
        r"has no plugin for TokenInterpolate with output_size; build it again: m3ad-plugins build",
    ),
    "refused plan": (
        lambda box: box.replace_plan("head", b"not a plan"),
        ArtifactError,
        r"tensorrt 10\.13\.3\.9 refuses \S+head\.plan: Serialization assertion \S.*failed; build it again: m3ad-export",
    ),
    "other tensors": (
        other_tensors,
        ArtifactError,
        r"plan head gives `rgb_features` float32 \[-1, 48\], the contract of stage head has no such tensor; build it "
        "again: m3ad-export",
    ),
    "no memory for the arena": (
        lambda box: box.build(arena=9 << 30),
        DeviceError,
        r"double of a GPU has no 9216 MiB for the activations of the largest stage, only 8192 MiB are free; end what "
        "else runs there, or use the fused layout",
    ),
    "no memory for tensors": (
        lambda box: setattr(box.double, "memory", 60000),
        DeviceError,
        r"double of a GPU has no \d+ MiB for the tensor \w+, only 0 MiB are free",
    ),
    "no memory for a context": (
        lambda box: box.build(no_context=True),
        DeviceError,
        r"tensorrt cannot make a context of plan rgb_extractor: CUDA initialization failure with error: out of memory;"
        " end what else runs",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_sentence_and_auto_goes_on_on_the_cpu(box: Box, fault: str) -> None:
    plant, kind, message = FAULTS[fault]
    plant(box)
    with pytest.raises(kind, match=message) as caught:
        Inspector.open(box.path, "fused", runtime="tensorrt")
    assert len(str(caught.value).splitlines()) == 1
    del caught
    box.double.assert_given_back()
    said: list[str] = []
    box.absent("tensorrt_rtx")
    with Inspector.open(box.path, "fused", say=said.append) as inspector:
        assert inspector.device == "cpu"
    (line,) = said
    assert line.startswith("running on the CPU, in ONNX Runtime: ")
    if fault not in (
        "no engines",
        "engines of nobody knows what",
    ):  # there those of TensorRT-RTX have the word
        assert line.endswith(str(_message(box)))
    box.double.assert_given_back()


def _message(box: Box) -> str:
    with pytest.raises(M3adError) as caught:
        Inspector.open(box.path, "fused", runtime="tensorrt")
    return str(caught.value)


RUNNING: dict[str, tuple[Callable[[Box], Any], type[M3adError], str]] = {
    "a plan cannot be queued": (
        lambda box: setattr(box.double, "refuses", "xyz_extractor"),
        DeviceError,
        "tensorrt could not run in plan xyz_extractor: enqueueV3: Error Code 3: API Usage Error; look at: m3ad-export",
    ),
    "a kernel fails": (
        lambda box: setattr(box.double, "fails", "head"),
        DeviceError,
        r"double of a GPU failed \(cuStreamSynchronize failed: an illegal memory access was encountered\); start this "
        "process again",
    ),
    "more points than were built for": (
        lambda box: box.build(most_rows=2000),
        ArtifactError,
        r"`points` of plan xyz_extractor is \[3000, 3\], it was built for \[1024, 3\] to \[2000, 3\]; build it again: ",
    ),
}


@pytest.mark.parametrize("fault", RUNNING)
def test_a_fault_in_a_frame_is_one_sentence_too(box: Box, fault: str) -> None:
    plant, kind, message = RUNNING[fault]
    plant(box)
    with Inspector.open(box.path, "fused", runtime="tensorrt") as inspector:
        with pytest.raises(kind, match=message):
            inspector.inspect_prepared(make_input(3000))
        box.double.fails = box.double.refuses = None
        if (
            fault != "more points than were built for"
        ):  # the double recovers, and nothing is left of the frame
            assert np.isfinite(inspector.inspect_prepared(make_input(3000)).anomaly_map).all()
    box.double.assert_given_back()


def test_nothing_is_said_where_there_is_nothing_to_choose(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(tensorrt_pipeline, "check_driver", lambda: NO_DRIVER)
    Inspector.open(tiny_bundle.path, say=said.append)
    assert said == []
    monkeypatch.setattr(tensorrt_pipeline, "check_driver", lambda: Finding("driver", True, "CUDA 13"))
    Inspector.open(tiny_bundle.path, say=said.append)
    (line,) = said
    assert line == (
        f"running on the CPU, in ONNX Runtime: {tiny_bundle.path} has no engines for TensorRT; build them: m3ad-export "
        f"build-engine {tiny_bundle.path} --target native"
    )
    with pytest.raises(ValueError, match="unknown runtime 'cuda', expected one of auto, onnxruntime"):
        Inspector.open(tiny_bundle.path, runtime="cuda")  # type: ignore[arg-type]


def test_the_command_runs_engines(box: Box, category: Path) -> None:
    frame = [str(category / f"test/bump/{part}") for part in ("rgb/000.png", "xyz/000.tiff")]

    def told(*options: str) -> tuple[int, dict[str, Any], str]:
        done = CliRunner().invoke(app, ["infer", *frame, "--bundle", str(box.path), "--json", *options])
        return done.exit_code, json.loads(done.stdout) if done.stdout else {}, done.stderr

    code, on_gpu, talk = told("--runtime", "tensorrt")
    assert (code, talk) == (0, "")
    assert box.double.runs == ["rgb_extractor", "xyz_extractor", "head"]
    box.double.assert_given_back()
    _, on_cpu, _ = told("--runtime", "onnxruntime")
    assert len(box.double.runs) == 3
    (a,), (b,) = on_gpu["frames"], on_cpu["frames"]
    assert a["score"] == pytest.approx(b["score"], rel=1e-4)
    assert a["verdict"] == b["verdict"]
    assert told()[2] == ""  # auto: engines that fit
    assert len(box.double.runs) == 6
    box.double.capability = (12, 0)
    box.absent("tensorrt_rtx")
    code, found, talk = told()
    assert (code, found["frames"][0]["score"]) == (0, pytest.approx(b["score"], rel=1e-6))
    assert " ".join(talk.split()).startswith(
        f"running on the CPU, in ONNX Runtime: {box.path} has TensorRT engines"
    )
    refused = CliRunner().invoke(app, ["infer", *frame, "--runtime", "tensorrt"])
    assert "--runtime is for --bundle; a server has its own runtime" in " ".join(
        refused.stderr.replace("│", " ").split()
    )


def test_rtx_engines_are_asked_for_by_their_target(box: Box, tmp_path: Path) -> None:
    rtx = GpuDouble(capability=(12, 0), name="tensorrt_rtx", version="1.7.1.116")
    with (
        installed(rtx, tmp_path / "library"),
        pytest.raises(ArtifactError, match=r"8\.9 \(sm89\), this GPU has 12\.0; .* --target sm120$"),
    ):
        Inspector.open(box.path, runtime="tensorrt_rtx")
    rtx.assert_given_back()
