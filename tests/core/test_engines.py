"""Engines on disk, as the rooms that build, serve and count them see them."""

import shutil
from pathlib import Path

import pytest
from m3ad.bundle import Bundle, write_json
from m3ad.engines import FORMAT, Engines, engine_folders
from m3ad.errors import ArtifactError
from m3ad_client.measure import artefacts

PLAN = {"sha256": "0" * 64, "bytes": 7, "build_s": 1.5}


def test_every_target_is_counted_native_too_and_half_a_build_is_not(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    shutil.copytree(tiny_bundle.path, tmp_path / "bundle")
    for target in ("native", "sm89", ".sm86.cut-off"):
        folder = tmp_path / "bundle" / "engines" / target
        folder.mkdir(parents=True)
        files = {"mfm.plan": PLAN, "vm.plan": PLAN}
        write_json(
            folder / "manifest.json",
            {
                "format": FORMAT,
                "target": target,
                "compute_capability": "8.9",
                "precision": "fp16",
                "files": files,
            },
        )
    assert [f.name for f in engine_folders(tmp_path / "bundle")] == ["native", "sm89"]
    weighed = {"precision": "fp16", "build_s": 3.0, "bytes": 14}
    found = artefacts(Bundle.open(tmp_path / "bundle"))
    assert found["engines"] == {"native": weighed, "sm89": weighed}
    assert found["onnx_bytes"] > 0


def test_a_folder_that_holds_no_engines_is_one_sentence(tmp_path: Path) -> None:
    write_json(tmp_path / "manifest.json", {"format": "m3ad-bundle"})
    with pytest.raises(ArtifactError, match=r"describes 'm3ad-bundle', expected 'm3ad-engines'\. Build"):
        Engines.open(tmp_path, "Build them")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": None}, r"Expected `str`, got `null` - at `\$\.target`"),
        ({"compute_capability": 8.9}, r"got `float` - at `\$\.compute_capability`"),
        ({"files": {"vm.plan": {"sha256": -1, "bytes": 7}}}, "got `int`"),
        ({"runtime_version": []}, "got `array`"),
        ({"runtime_version": "10&3"}, r"matching regex .* - at `\$\.runtime_version`"),
        ({"runtime_version": "²"}, r"matching regex .* - at `\$\.runtime_version`"),
    ],
)
def test_a_manifest_of_another_type_is_one_sentence(tmp_path: Path, change: dict, words: str) -> None:
    sound = {"format": FORMAT, "target": "sm89", "compute_capability": "8.9", "files": {"vm.plan": PLAN}}
    write_json(tmp_path / "manifest.json", sound)
    assert Engines.open(tmp_path, "Build them").compute_capability == "8.9"
    write_json(tmp_path / "manifest.json", {**sound, **change})
    with pytest.raises(ArtifactError, match=rf"manifest\.json is damaged: .*{words}.* Build them"):
        Engines.open(tmp_path, "Build them")
