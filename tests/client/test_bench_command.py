"""`m3ad-client bench` and `report` as a user runs them: every form beside the others, and what is said of it."""

import dataclasses
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from client_command import client, document, refusal
from conftest import TINY_RGB, TINY_XYZ
from m3ad.bundle import Bundle
from m3ad.frames import Frame
from m3ad_export.detector import Detector
from m3ad_export.saved import save_detector
from m3ad_runtime.worker import END_TO_END, INFERENCE_ONLY
from m3ad_triton.server import LocalServer
from serving import make_frame, write_frame


def test_bench_holds_forms_side_by_side(tiny_bundle: Bundle, tiny_detector: Detector, tmp_path: Path) -> None:
    detector, folder = tmp_path / "detector", tmp_path / "frames"
    detector.mkdir()
    save_detector(tiny_detector_with_record(tiny_detector), detector)
    for name in ("000", "001"):
        frame = make_frame(int(name), size=256)
        # a grid without noise is full of equal distances, which PyTorch's topk breaks as it likes
        frame.xyz[..., 2] += np.random.default_rng(0).normal(0, 1e-4, frame.xyz.shape[:2])
        write_frame(folder, name, Frame(frame.rgb, np.where(frame.xyz[..., :1] == 0, 0, frame.xyz), name))
    layouts = ("--layout", "fused", "--layout", "chain")
    baselines = ("--baseline", "dense", "--baseline", "cfm", "--detector", detector)
    told = document(
        "bench", folder, "--bundle", tiny_bundle.path, *layouts, *baselines, "--frames", 2, "--warmup", 1
    )
    measured = [(row["name"], row["region"].partition(":")[0]) for row in told["rows"]]
    names = ["fused", "chain", "dense", "cfm"]
    assert measured == [*((n, INFERENCE_ONLY) for n in names), ("fused", END_TO_END), ("chain", END_TO_END)]
    for row in told["rows"]:
        assert row["frames"] == 2
        assert row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert {
            "hardware",
            "threads",
            "runtime",
            "precision",
            "lattice",
            "warmup_frames",
            "weights",
        } <= row.keys()
        assert row["cold_start_ms"] > row["p50_ms"]
        assert row["mean_points"] >= 1024
        if row["name"] == "cfm":
            assert row["map_max_error"] is None
        else:
            assert row["map_max_error"] < 1e-4
    assert told["ratios"].keys() == {"chain/fused", "dense/fused", "cfm/fused", "fused/its rgb_extractor"}
    for name, value in told["ratios"].items():
        spread = told["ratio_spread"][name]
        assert spread["low"] <= value <= spread["high"]
    stages = {(s["run"], s["stage"]): s["uses"] for s in told["stages"]}
    assert stages["chain", "mfm"] == 2
    assert stages["fused", "head"] == 1
    for name in names:
        assert told["memory"][name]["peak"]["rss_bytes"] > told["memory"][name]["parameter_bytes"] > 0
    assert told["artefacts"]["onnx_bytes"] > 0
    paper = {row[0]: row for row in told["paper"]["rows"]}
    assert paper["Mentor3AD"][1:3] == [18.371, 1613.3]


def tiny_detector_with_record(detector: Detector) -> Detector:
    """What `train` would have recorded of it."""
    record = {
        **detector.record,
        "encoders": {
            "rgb": {**asdict(TINY_RGB), **detector.record["encoders"]["rgb"]},
            "xyz": {**asdict(TINY_XYZ), **detector.record["encoders"]["xyz"]},
        },
    }
    return dataclasses.replace(detector, record=record)


def test_memory_growth_is_told_of_many_frames(tiny_bundle: Bundle, category: Path) -> None:
    told = document("bench", category, "--bundle", tiny_bundle.path, "--frames", 21, "--warmup", 1)
    growth = told["memory"]["fused"]["growth"]
    assert growth["frames"] == 42  # both regions
    assert growth["bytes"] < 2**26


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layout", "fused"], "--layout is for --bundle"),
        (["--baseline", "dense"], "--baseline and --detector go together"),
        (["--baseline", "btf", "--detector", "x"], "--baseline btf is unknown, expected dense, cfm, fused"),
    ],
)
def test_bench_options_that_make_no_sense(options: list[str], message: str, category: Path) -> None:
    done = client("bench", category, *options)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.replace("│", " ").split())


def test_a_baseline_without_its_detector_is_one_sentence(category: Path, tmp_path: Path) -> None:
    told = refusal("bench", category, "--baseline", "dense", "--detector", tmp_path / "absent")
    assert told.startswith("error: dense: ")
    assert "absent holds no detector of this version" in told


def test_saved_results_are_shown_side_by_side(tiny_bundle: Bundle, category: Path, tmp_path: Path) -> None:
    files = []
    for layout in ("chain", "fused"):
        arguments = ("bench", category, "--bundle", tiny_bundle.path, "--layout", layout, "--frames", 1)
        files.append(tmp_path / f"{layout}.json")
        files[-1].write_text(json.dumps(document(*arguments, "--warmup", 1)))
    done = client("report", *files, "--markdown")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| inference only: tensors ready -> map | ") == 2
    assert "| chain | mgm | 1 | " in done.stdout
    assert "| fused | head | 1 | " in done.stdout
    assert done.stdout.count("| CFM | 21.755 |") == 1
    for wrong in ("[]", '{"rows": []}', '{"rows": [{"region": "inference only"}]}'):
        files[0].write_text(wrong)
        assert "is not a result of `m3ad-client eval --json`" in refusal("report", files[0])


def test_two_bundles_are_two_forms(tiny_bundle: Bundle, category: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle.path, tmp_path / "second[v2]")
    bundles = ("--bundle", tiny_bundle.path, "--bundle", tmp_path / "second[v2]")
    told = document("bench", category, *bundles, "--frames", 2, "--warmup", 1)
    assert [row["name"] for row in told["rows"] if row["region"].startswith(INFERENCE_ONLY)] == [
        "fused (tiny)",
        "fused (second[v2])",
    ]
    (tmp_path / "saved.json").write_text(json.dumps(told))
    done = client("report", tmp_path / "saved.json")
    assert "second[v2]" in done.stdout
    (tmp_path / "saved.json").write_text(json.dumps({**told, "rows": [1]}))
    assert "is damaged: Expected `object`, got `int` - at `$.rows[0]`" in refusal(
        "report", tmp_path / "saved.json"
    )


@pytest.mark.slow
def test_served_bench_sees_stages_and_server_memory(server: LocalServer, category: Path) -> None:
    arguments = ("bench", category, "--url", server.grpc_url, "--model", "tiny", "--frames", 4, "--warmup", 2)
    told = document(*arguments)
    assert {s["stage"]: s["uses"] for s in told["stages"]} == {
        "tensor_gate": 1,
        "admit": 1,
        "rgb_extractor": 1,
        "xyz_extractor": 1,
        "project": 1,
        "mfm": 2,
        "mgm": 1,
        "vm": 1,
    }
    assert all(s["infer_ms"] > 0 for s in told["stages"])
    assert told["memory"]["triton chain"]["peak"]["pss_bytes"] > 0
    assert told["rows"][0]["cold_start_ms"] is None  # somebody else started it
    assert told["rows"][0]["runtime"] == "onnxruntime"
    names = [(row["name"], row["region"].partition(":")[0]) for row in told["rows"]]
    tensors, frames = "triton chain", "triton chain, frames"
    assert names == [(tensors, INFERENCE_ONLY), (tensors, END_TO_END), (frames, END_TO_END)]
    assert told["ratios"].keys() == {f"{frames}/{tensors}"}
    assert told["rows"][2]["map_max_error"] == 0.0
