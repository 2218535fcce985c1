import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from m3ad.bundle import Bundle, read_manifest, sha256_of, write_json
from m3ad.contract import CONTRACT_VERSION
from m3ad.errors import ArtifactError
from m3ad_triton import config
from m3ad_triton.cli import app
from m3ad_triton.manifest import FORMAT
from m3ad_triton.verify import find_problems, read_configs, verify_repository
from m3ad_triton.wiring import ensemble_problems
from serving import rehash
from typer.testing import CliRunner


@pytest.fixture
def repository(chain_repository: Path, tmp_path: Path) -> Path:
    path = tmp_path / "repository"
    shutil.copytree(chain_repository, path)
    return path


def edit(repository: Path, model: str, change: Callable[[Any], None]) -> None:
    path = repository / model / "config.pbtxt"
    parsed = config.read_config(path)
    change(parsed)
    path.write_text(config.to_text(parsed))
    rehash(repository)


def step_of(ensemble: Any, model: str, number: int = 0) -> Any:
    return [s for s in ensemble.ensemble_scheduling.step if s.model_name == model][number]


@pytest.mark.parametrize("layout", ["chain", "fused"])
def test_a_written_repository_has_no_problems(layout: str, request: pytest.FixtureRequest) -> None:
    assert find_problems(request.getfixturevalue(f"{layout}_repository")) == []


WIRING = {
    "input fed by nobody": (
        lambda e, _: step_of(e, "tiny_mgm").input_map.pop("mentor"),
        "ensemble `tiny_tensors` maps nothing to input `mentor` of model `tiny_mgm`",
    ),
    "unknown input": (
        lambda e, _: step_of(e, "tiny_mgm").input_map.update({"depth": "mentor"}),
        "maps input `depth` of model `tiny_mgm`, which has only \\['mentor', 'rgb_features', 'xyz_features'\\]",
    ),
    "unknown output": (
        lambda e, _: step_of(e, "tiny_mfm").output_map.update({"depth": "depth"}),
        "maps output `depth` of model `tiny_mfm`, which has only \\['mentor'\\]",
    ),
    "missing model": (
        lambda e, c: c.pop("tiny_mgm"),
        "ensemble `tiny_tensors` uses model `tiny_mgm`, which is not in the repository",
    ),
    "written twice": (
        lambda e, _: step_of(e, "tiny_mfm", 1).output_map.update({"mentor": "mentor"}),
        "value `mentor` is written by model `tiny_mfm` and again by model `tiny_mfm`",
    ),
    "never written": (
        lambda e, _: step_of(e, "tiny_project").output_map.pop("rgb_features"),
        "value `rgb_features`, which model `tiny_mfm` reads as `rgb_features`, is written by nobody",
    ),
    "other dtype": (
        lambda e, c: setattr(c["tiny_vm"].input[-1], "data_type", config.pb.TYPE_INT64),
        "leaves model `tiny_admit` as TYPE_INT32 \\[-1\\] but model `tiny_vm` reads `scored_pixel` as "
        "TYPE_INT64 \\[-1\\]",
    ),
    "other shape": (
        lambda e, c: c["tiny_mgm"].input[2].dims.__setitem__(1, 17),
        "value `mentor` leaves model `tiny_mfm` as TYPE_FP32 \\[-1, 16\\] but model `tiny_mgm` reads `mentor` as "
        "TYPE_FP32 \\[-1, 17\\]",
    ),
    "other rank": (
        lambda e, c: c["tiny_mgm"].input[2].dims.append(1),
        "but model `tiny_mgm` reads `mentor` as TYPE_FP32 \\[-1, 16, 1\\]",
    ),
    "output written by nobody": (
        lambda e, _: step_of(e, "tiny_vm").output_map.pop("score"),
        "value `score`, which ensemble `tiny_tensors` reads as `score`, is written by nobody",
    ),
    "input read by nobody": (
        lambda e, _: e.input.add(name="depth", data_type=config.pb.TYPE_FP32, dims=[1]),
        "input `depth` of ensemble `tiny_tensors` is read by no model",
    ),
    "cycle": (
        lambda e, _: step_of(e, "tiny_mfm").input_map.update({"rgb_features": "rgb_reconstructed"}),
        "the values .*'mentor'.* of ensemble `tiny_tensors` wait for each other in a cycle",
    ),
}


@pytest.mark.parametrize("rule", WIRING)
def test_each_wiring_fault_is_told(rule: str, chain_repository: Path) -> None:
    change, message = WIRING[rule]
    configs, _ = read_configs(chain_repository)
    assert ensemble_problems(configs["tiny_tensors"], configs) == []
    change(configs["tiny_tensors"], configs)
    with pytest.raises(AssertionError, match=message):
        raise AssertionError("\n".join(ensemble_problems(configs["tiny_tensors"], configs)))


def test_wiring_that_is_sound_but_not_the_contract_s_is_told(repository: Path) -> None:
    def swap(ensemble: Any) -> None:
        step = step_of(ensemble, "tiny_mfm", 1)
        step.input_map.update({"rgb_features": "rgb_features"})

    edit(repository, "tiny", swap)
    (problem,) = find_problems(repository)
    assert "the contract's chain layout tiny_mfm {'rgb_features': 'rgb_reconstructed'" in problem


def test_a_stage_that_differs_from_the_contract_is_told(repository: Path) -> None:
    edit(repository, "tiny_rgb_extractor", lambda m: m.input[0].dims.__setitem__(0, 2))
    problems = find_problems(repository)
    assert any(
        "input `image` of model `tiny_rgb_extractor` is TYPE_FP32 [2, 3, 224, 224], the contract's rgb_extractor "
        "has TYPE_FP32 [1, 3, 224, 224]" in p
        for p in problems
    )


def test_files_changed_missing_and_added_are_all_told(repository: Path) -> None:
    (repository / "tiny_mfm" / "1" / "mfm.onnx").write_bytes(b"other")
    (repository / "tiny_vm" / "1" / "vm.onnx").unlink()
    (repository / "tiny_vm" / "1" / "extra.bin").touch()
    problems = "\n".join(find_problems(repository))
    assert "mfm.onnx was changed after it was written" in problems
    assert "vm.onnx is missing, the manifest lists it" in problems
    assert "model `tiny_vm` has no file 1/vm.onnx" in problems
    assert "extra.bin is not listed in manifest.json" in problems
    with pytest.raises(ArtifactError, match=r"cannot be served: .*\(3 more: m3ad-triton check"):
        verify_repository(repository)


def test_models_that_triton_would_trip_over_are_told(repository: Path) -> None:
    (repository / "notes").mkdir()
    shutil.copytree(repository / "tiny_mfm", repository / "tiny_spare")
    shutil.rmtree(repository / "tiny_vm" / "1")
    (repository / "tiny_mgm" / "config.pbtxt").write_text("name tiny")
    rehash(repository)
    problems = "\n".join(find_problems(repository))
    assert "folder `notes` has no config.pbtxt" in problems
    assert "folder `tiny_spare` holds the configuration of a model named `tiny_mfm`" in problems
    assert "model `tiny_spare` is used by no ensemble" in problems
    assert "model `tiny_vm` has no version folder" in problems
    assert "tiny_mgm/config.pbtxt is not a model configuration" in problems


def test_warm_up_data_of_another_size_is_told(repository: Path) -> None:
    (repository / "tiny_rgb_extractor" / "warmup" / "image").write_bytes(b"\0" * 12)
    rehash(repository)
    (problem,) = find_problems(repository)
    assert "warm-up of model `tiny_rgb_extractor` reads `image`" in problem
    assert "12 bytes, expected 602112" in problem


def test_a_damaged_record_is_told(repository: Path) -> None:
    edit(repository, "tiny", lambda e: setattr(e.parameters["m3ad"], "string_value", "{}"))
    (problem,) = find_problems(repository)
    assert "parameter `m3ad` of model `tiny` is damaged" in problem


def test_steps_that_know_another_record_than_the_client_are_told(repository: Path) -> None:
    def other_plane(model: Any) -> None:
        text = model.parameters["m3ad"].string_value
        assert '"plane": "none"' in text
        model.parameters["m3ad"].string_value = text.replace('"plane": "none"', '"plane": "ransac"')

    edit(repository, "tiny_prepare", other_plane)
    (problem,) = find_problems(repository)
    assert "parameter `m3ad` of model `tiny_prepare` differs from that of `tiny_tensors`" in problem


def test_a_step_of_the_frames_door_runs_no_other_code(repository: Path) -> None:
    (repository / "tiny_judge" / "1" / "model.py").write_text("import os")
    rehash(repository)
    (problem,) = find_problems(repository)
    assert "tiny_judge/1/model.py is not the code that m3ad writes there" in problem


def test_the_frames_door_is_wired_as_the_contract_says(repository: Path) -> None:
    edit(repository, "tiny", lambda e: step_of(e, "tiny_judge").input_map.update({"xyz": "points"}))
    problems = "\n".join(find_problems(repository))
    assert "ensemble `tiny` wires tiny_judge" in problems


def test_another_contract_version_is_told(repository: Path) -> None:
    manifest = read_manifest(repository, FORMAT, "")
    write_json(repository / "manifest.json", {**manifest, "contract_version": 7})
    told = f"contract version 7, this m3ad serves version {CONTRACT_VERSION}\\. Write it again: m3ad-triton write"
    with pytest.raises(ArtifactError, match=told):
        find_problems(repository)


@pytest.mark.parametrize(
    ("library", "message"),
    [
        (None, "the engines need the plugin library and none lies in"),
        ("libm3ad_plugins.so", "libm3ad_plugins.so cannot be loaded here: it is no ELF library of 64 bits"),
    ],
)
def test_plans_without_a_loadable_plugin_library_are_told(
    repository: Path, library: str | None, message: str
) -> None:
    if library:
        (repository / library).write_bytes(b"not a library")
        rehash(repository)
    manifest = read_manifest(repository, FORMAT, "")
    plugins = {"library": library, "shims": [], "missing": None}
    engines = [{"target": "native", "runtime": "tensorrt", "compute_capability": "8.9"}]
    changes = {"runtime": "tensorrt", "plugins": plugins, "engines": engines}
    write_json(repository / "manifest.json", {**manifest, **changes})
    assert any(message in problem for problem in find_problems(repository))


def test_a_folder_that_is_no_repository_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no manifest\.json, so it is not a m3ad-repository"):
        find_problems(tmp_path)


def test_files_are_hashed_once_between_a_bundle_and_its_repository(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`write` reads the bundle's files to verify them and the copies to list them, and no file a third time."""
    hashed: list[Path] = []

    def counted(path: Path) -> str:
        hashed.append(path)
        return sha256_of(path)

    monkeypatch.setattr("m3ad.bundle.sha256_of", counted)
    done = CliRunner().invoke(app, ["write", str(tiny_bundle.path), str(tmp_path / "repository")])
    assert done.exit_code == 0, done.output
    assert len(set(hashed)) == len(hashed)
    assert {path.name for path in hashed} >= {"head_rows.onnx", "xyz_encoder.weights"}
