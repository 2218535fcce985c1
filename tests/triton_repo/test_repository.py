import hashlib
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from m3ad.bundle import Bundle, file_entries, write_json
from m3ad.errors import ArtifactError, ServerError
from m3ad.manifest import FileEntry
from m3ad_triton import config
from m3ad_triton.binary import Binary
from m3ad_triton.docker import JETSON_IMAGE, docker_line, write_context
from m3ad_triton.manifest import Plugins
from m3ad_triton.repository import Repository, server_arguments, write_repository
from m3ad_triton.server import LocalServer
from m3ad_triton.verify import find_problems
from serving import renamed

STAGES = ("rgb_extractor", "xyz_extractor", "project", "mfm", "mgm", "vm")

INT8 = {"type": "int8", "half": None, "source_onnx": "0" * 64}


def add_engines(
    bundle: Path, target: str, capability: str, runtime: str = "tensorrt", **changes: Any
) -> Path:
    """Engines as `m3ad-export build-engine` lays them out; what is in a plan does not matter to the writer."""
    folder = bundle / "engines" / target
    folder.mkdir(parents=True)
    for stage in changes.pop("stages", STAGES):
        (folder / f"{stage}.plan").write_bytes(f"{stage} {target}".encode())
    manifest = {
        "format": "m3ad-engines",
        "target": target,
        "runtime": runtime,
        "compute_capability": capability,
        "precision": "fp16",
        "files": file_entries(folder),
    }
    write_json(folder / "manifest.json", {**manifest, **changes})
    return folder


@pytest.fixture
def bundle(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    return renamed(tiny_bundle, "tiny", tmp_path / "bundles")


def test_the_manifest_lists_every_file_with_its_hash(chain_repository: Path, tiny_bundle: Bundle) -> None:
    manifest = json.loads((chain_repository / "manifest.json").read_text())
    files = {p.relative_to(chain_repository).as_posix() for p in chain_repository.rglob("*") if p.is_file()}
    assert manifest["files"].keys() == files - {"manifest.json"}
    for name, entry in manifest["files"].items():
        assert hashlib.sha256((chain_repository / name).read_bytes()).hexdigest() == entry["sha256"]
    assert manifest["format"] == "m3ad-repository"
    assert (manifest["layout"], manifest["runtime"], manifest["category"]) == ("chain", "onnxruntime", "tiny")
    source = hashlib.sha256((tiny_bundle.path / "manifest.json").read_bytes()).hexdigest()
    assert manifest["bundle_sha256"] == source


def test_writing_again_replaces_only_a_repository(bundle: Path, tmp_path: Path) -> None:
    target = tmp_path / "repository"
    write_repository(bundle, target, "onnxruntime", "chain")
    write_repository(bundle, target, "onnxruntime", "fused")
    assert Repository.open(target).manifest.layout == "fused"
    with pytest.raises(ArtifactError, match="describes 'm3ad-bundle', expected 'm3ad-repository'"):
        write_repository(bundle, bundle, "onnxruntime", "fused")
    assert Bundle.open(bundle).name == "tiny"


def test_nothing_half_written_is_left(bundle: Path, tmp_path: Path) -> None:
    wrong = np.zeros((1, 3, 8, 8), np.float32)
    np.save(bundle / "golden" / "image.npy", wrong)
    manifest = json.loads((bundle / "manifest.json").read_text())
    write_json(bundle / "manifest.json", {**manifest, "files": file_entries(bundle)})
    target = tmp_path / "out" / "repository"
    with pytest.raises(
        ArtifactError,
        match=r"image\.npy: `image` is float32 \[1, 3, 8, 8\], expected float32 \[1, 3, 224, 224\]; export",
    ):
        write_repository(bundle, target, "onnxruntime", "chain")
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize("name", ["two words", "Teil 7 (grün)", "grün", "-part"])
def test_a_category_that_cannot_name_a_model_is_refused(
    name: str, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    path = renamed(tiny_bundle, name, tmp_path)
    message = rf"{re.escape(repr(name))} cannot name a Triton model; .*: m3ad-export bundle --category NAME$"
    with pytest.raises(ArtifactError, match=message):
        write_repository(path, tmp_path / "repository", "onnxruntime", "chain")


def test_a_quantized_bundle_is_served_only_behind_its_gate(bundle: Path, tmp_path: Path) -> None:
    quantized = Bundle.open(bundle).update(precision=INT8)
    with pytest.raises(ArtifactError, match="is quantized and was never gated; find a better plan"):
        write_repository(bundle, tmp_path / "repo", "onnxruntime", "chain")
    quantized = quantized.update(gate={"passed": False, "accepted": None})
    with pytest.raises(ArtifactError, match="is quantized and failed its gate"):
        write_repository(bundle, tmp_path / "repo", "onnxruntime", "chain")
    assert not (tmp_path / "repo").exists()
    quantized.update(gate={"passed": True, "accepted": None})
    written = write_repository(bundle, tmp_path / "repo", "onnxruntime", "chain")
    assert written.manifest.precision == "int8"


def test_tampered_repository_is_refused(chain_repository: Path, tmp_path: Path) -> None:
    path = tmp_path / "repository"
    shutil.copytree(chain_repository, path)
    with (path / "tiny_mfm" / "1" / "mfm.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ArtifactError, match=r"mfm\.onnx was changed after it was written.*m3ad-triton write"):
        Repository.open(path)


def test_one_engine_is_the_default_plan(bundle: Path, tmp_path: Path) -> None:
    add_engines(bundle, "native", "8.9")
    repository = write_repository(bundle, tmp_path / "repository", "tensorrt", "chain")
    model = config.read_config(repository.path / "tiny_mfm" / "config.pbtxt")
    assert model.platform == "tensorrt_plan"
    assert model.default_model_filename == "native.plan"
    assert not model.cc_model_filenames
    assert (repository.path / "tiny_mfm" / "1" / "native.plan").read_bytes() == b"mfm native"
    assert model.instance_group[0].kind == config.pb.ModelInstanceGroup.KIND_GPU
    assert repository.manifest.precision == "fp16"


def test_several_engines_are_chosen_by_compute_capability(bundle: Path, tmp_path: Path) -> None:
    add_engines(bundle, "orin", "8.7")
    add_engines(bundle, "sm89", "8.9")
    repository = write_repository(bundle, tmp_path / "repository", "tensorrt", "chain")
    for stage in STAGES:
        model = config.read_config(repository.path / f"tiny_{stage}" / "config.pbtxt")
        assert dict(model.cc_model_filenames) == {"8.7": "orin.plan", "8.9": "sm89.plan"}
        for name in model.cc_model_filenames.values():
            plan = repository.path / f"tiny_{stage}" / "1" / name
            assert plan.read_bytes() == f"{stage} {name.removesuffix('.plan')}".encode()
    one = write_repository(bundle, tmp_path / "one", "tensorrt", "chain", ["sm89"])
    assert [e["target"] for e in one.manifest.engines] == ["sm89"]


def test_plugin_library_and_shim_are_placed_beside_the_models(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = tmp_path / "built"
    built.mkdir()
    names = ("libm3ad_plugins.so", "libm3ad_plugins_trt11.so", "libm3ad_plugins_trt10.so")
    for name in names:
        (built / name).write_text(name)
    monkeypatch.setenv("M3AD_PLUGINS_DIR", str(built))
    add_engines(bundle, "native", "8.9", runtime_version="10.3.0.26")
    target = tmp_path / "repository"
    plugins = write_repository(bundle, target, "tensorrt", "chain").manifest.plugins
    assert plugins == Plugins(names[0], (names[2],), None)
    assert (target / names[2]).read_text() == names[2]
    assert not (target / names[1]).exists()
    (built / names[2]).unlink()
    plugins = write_repository(bundle, target, "tensorrt", "chain").manifest.plugins
    assert plugins.library is None
    assert "libm3ad_plugins_trt10.so is in none of" in str(plugins.missing)


def test_rtx_plans_are_refused_with_the_reason(bundle: Path, tmp_path: Path) -> None:
    add_engines(bundle, "sm89", "8.9", runtime="tensorrt_rtx")
    for targets in ([], ["sm89"]):
        with pytest.raises(
            ArtifactError, match="those of sm89 are TensorRT-RTX plans, for which Triton has no backend"
        ):
            write_repository(bundle, tmp_path / "repository", "tensorrt", "chain", targets)


def test_engines_that_do_not_serve_are_refused(bundle: Path, tmp_path: Path) -> None:
    def write(*targets: str) -> None:
        write_repository(bundle, tmp_path / "repository", "tensorrt", "chain", targets)

    with pytest.raises(ArtifactError, match="has no TensorRT engines for Triton"):
        write()
    add_engines(bundle, "a", "8.9", stages=STAGES[:-1])
    with pytest.raises(
        ArtifactError, match=r"engines/a has no plan of vm\. Build them: m3ad-export build-engine"
    ):
        write()
    with pytest.raises(ArtifactError, match="has no engines for sm120, only: a"):
        write("sm120")
    shutil.rmtree(bundle / "engines" / "a")
    add_engines(bundle, "a", "8.9")
    add_engines(bundle, "b", "8.9")
    with pytest.raises(
        ArtifactError, match=r"a and b are both for compute capability 8\.9; choose with --target"
    ):
        write()
    (bundle / "engines" / "a" / "vm.plan").write_bytes(b"other")
    with pytest.raises(ArtifactError, match=r"vm\.plan was changed after it was written"):
        write("a")


def test_server_arguments_for_several_repositories(chain_repository: Path, fused_repository: Path) -> None:
    chain, fused = map(Repository.open, (chain_repository, fused_repository))
    plugins = Plugins("libp.so", ("libp_trt10.so", "libp_trt11.so"), None)
    files = {
        **chain.manifest.files,
        **dict.fromkeys((plugins.library, *plugins.shims), FileEntry("0" * 64, 1)),
    }
    changed = msgspec.structs.replace(chain.manifest, plugins=plugins, files=files)
    chain = Repository(chain.path, changed)
    arguments = server_arguments([chain, fused], ["/models/a", "/models/b"])
    assert arguments[:2] == ["--model-repository=/models/a", "--model-repository=/models/b"]
    assert "--disable-auto-complete-config" in arguments
    assert f"--cuda-memory-pool-byte-size=0:{chain.manifest.cuda_pool_bytes}" in arguments
    assert chain.manifest.cuda_pool_bytes > fused.manifest.cuda_pool_bytes
    assert "--backend-config=tensorrt,plugins=/models/a/libp_trt10.so;/models/a/libp_trt11.so" in arguments


def test_plans_are_not_given_to_a_server_for_cpus(bundle: Path, tmp_path: Path) -> None:
    add_engines(bundle, "native", "8.9")
    write_repository(bundle, tmp_path / "repository", "tensorrt", "chain")
    wheel = Binary(tmp_path / "tritonserver", wheel=tmp_path)
    with pytest.raises(
        ServerError, match=r"holds TensorRT plans .* use the official image: m3ad-triton docker"
    ):
        LocalServer([tmp_path / "repository"], binary=wheel)


def test_docker_line(bundle: Path, chain_repository: Path, tmp_path: Path) -> None:
    on_cpu = docker_line([Repository.open(chain_repository)], "image:1")
    shm = int(on_cpu.split("--shm-size=")[1].split("m ")[0])
    assert shm * 2**20 >= Repository.open(chain_repository).manifest.shared_memory_bytes > 0
    assert f"-v {chain_repository}:/models/tiny:ro" in on_cpu
    assert "--gpus" not in on_cpu
    assert "[cpu]" in on_cpu
    add_engines(bundle, "native", "8.9")
    with_frames = docker_line([write_repository(bundle, tmp_path / "frames", "tensorrt", "chain")], "image:1")
    assert "--gpus=all" in with_frames
    assert re.search(r"pip install \S*m3ad\S* && tritonserver", with_frames)
    assert "[cpu]" not in with_frames
    plans = write_repository(bundle, tmp_path / "gpu", "tensorrt", "chain", frames=False)
    on_gpu = docker_line([plans], "image:1")
    assert "--gpus=all" in on_gpu
    assert f"-v {tmp_path / 'gpu'}:/models/tiny:ro" in on_gpu
    assert on_gpu.split("image:1 ")[1].startswith("tritonserver --model-repository=/models/tiny ")


def test_repositories_in_folders_of_one_name_have_places_of_their_own(
    chain_repository: Path, fused_repository: Path, tmp_path: Path
) -> None:
    opened = []
    for line, source in (("A", chain_repository), ("B", fused_repository)):
        shutil.copytree(source, tmp_path / line / "repository")
        opened.append(Repository.open(tmp_path / line / "repository"))
    words = shlex.split(docker_line(opened, "image:1"))
    mounted = [words[i + 1] for i, word in enumerate(words) if word == "-v"]
    assert f"{tmp_path}/A/repository:/models/tiny:ro" in mounted
    assert f"{tmp_path}/B/repository:/models/other:ro" in mounted
    served = re.findall(r"--model-repository=(\S+)", words[-1])
    assert served == ["/models/tiny", "/models/other"]


def test_two_repositories_with_a_model_of_one_name_are_refused(
    tiny_bundle: Bundle, chain_repository: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    shutil.copytree(chain_repository, again)
    both = [chain_repository, again]
    message = (
        rf"{chain_repository} and {again} both hold a model `tiny\w*`, and one server holds one of a name"
    )
    with pytest.raises(ArtifactError, match=message):
        docker_line([Repository.open(path) for path in both])
    with pytest.raises(ArtifactError, match=message):
        LocalServer(both)
    as_stage = renamed(tiny_bundle, "tiny_mfm", tmp_path)  # a category named as another's stage
    stage = write_repository(as_stage, tmp_path / "stage", "onnxruntime", "chain")
    with pytest.raises(ArtifactError, match="both hold a model `tiny_mfm`"):
        docker_line([Repository.open(chain_repository), stage])


def test_a_folder_that_docker_cannot_mount_is_told(chain_repository: Path, tmp_path: Path) -> None:
    shutil.copytree(chain_repository, tmp_path / "a:b")
    with pytest.raises(ArtifactError, match="a:b: docker's -v cannot mount a path with a colon"):
        docker_line([Repository.open(tmp_path / "a:b")])


def test_an_image_for_stages_on_the_cpu_has_all_they_need(
    chain_repository: Path, fused_repository: Path, tmp_path: Path
) -> None:
    wheel = tmp_path / "m3ad-0.1.0-py3-none-linux_x86_64.whl"
    wheel.write_bytes(b"a wheel")
    opened = [Repository.open(path) for path in (chain_repository, fused_repository)]
    line = write_context(opened, tmp_path / "image", wheel)
    assert line.startswith(
        f"docker build -t m3ad-tiny-other {tmp_path / 'image'} && docker run --rm -p 127.0.0.1:8000-8002:8000-8002 "
    )
    assert line.endswith(" m3ad-tiny-other")
    assert "--gpus" not in line
    lines = (tmp_path / "image" / "Dockerfile").read_text().splitlines()
    assert f"RUN pip install --no-cache-dir '/tmp/{wheel.name}[triton]'" in lines
    (health,) = (line for line in lines if line.startswith("HEALTHCHECK "))
    probe = ["m3ad-triton", "probe", "/models/tiny", "/models/other"]
    assert json.loads(health.partition(" CMD ")[2]) == probe
    for copied in (line.split()[1] for line in lines if line.startswith("COPY ")):
        assert (tmp_path / "image" / copied).exists()
    entry = json.loads(lines[-1].removeprefix("ENTRYPOINT "))
    places = [a.partition("=/")[2] for a in entry if a.startswith("--model-repository=")]
    assert [Repository.open(tmp_path / "image" / place).manifest for place in places] == [
        r.manifest for r in opened
    ]
    for place in places:
        assert find_problems(tmp_path / "image" / place) == []


def test_an_image_for_plans_needs_no_wheel(bundle: Path, tmp_path: Path) -> None:
    add_engines(bundle, "native", "8.7")
    repository = write_repository(bundle, tmp_path / "gpu", "tensorrt", "chain")
    line = write_context([repository], tmp_path / "image", jetson=True)
    assert "--runtime=nvidia" in line
    text = (tmp_path / "image" / "Dockerfile").read_text()
    assert text.startswith(f"FROM {JETSON_IMAGE}\nCOPY models /models\n")
    with pytest.raises(ArtifactError, match="image exists already"):
        write_context([repository], tmp_path / "image", jetson=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, "need m3ad's wheel in the image, none is named: python -m build --wheel, then --wheel FILE"),
        ("m3ad-0.1.0-py3-none-linux_x86_64.whl", "is no wheel of m3ad for aarch64, which the image is for"),
    ],
)
def test_an_image_without_the_right_wheel_is_not_written(
    chain_repository: Path, tmp_path: Path, name: str | None, message: str
) -> None:
    wheel = tmp_path / name if name else None
    if wheel is not None:
        wheel.touch()
    with pytest.raises(ArtifactError, match=message):
        write_context([Repository.open(chain_repository)], tmp_path / "image", wheel, jetson=True)
    assert not (tmp_path / "image").exists()
