"""The command as a user runs it: exit code, one JSON document on stdout, one sentence on stderr."""

import json
import re
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
from client_command import client, document, refusal
from m3ad.bundle import Bundle
from m3ad.contract import CONTRACT_VERSION
from m3ad.frames import Frame, find_samples, read_frame, read_sample, read_sample_mask
from m3ad.grid import prepare_mask
from m3ad.metrics import evaluate
from m3ad_client.cli import app
from m3ad_runtime.pipeline import Inspector
from m3ad_triton.server import LocalServer
from PIL import Image
from serving import make_frame, write_frame
from typer.testing import CliRunner

INT8 = {"type": "int8", "half": None, "source_onnx": "0" * 64}


def test_infer_in_process_writes_overlay_and_map(tiny_bundle: Bundle, category: Path, tmp_path: Path) -> None:
    rgb, xyz = category / "test/bump/rgb/000.png", category / "test/bump/xyz/000.tiff"
    told = document("infer", rgb, xyz, "--bundle", tiny_bundle.path, "--out", tmp_path / "out")
    want = Inspector(tiny_bundle).inspect(read_frame(rgb, xyz))
    (frame,) = told["frames"]
    assert frame["score"] == pytest.approx(want.score, abs=1e-6)
    assert frame["is_anomalous"] is (want.score > tiny_bundle.manifest.threshold.value)
    assert frame["verdict"] == ("defect" if frame["is_anomalous"] else "good")
    assert frame["defects"] == json.loads(json.dumps([d.to_json() for d in want.defects or ()]))
    assert bool(frame["defects"]) is frame["is_anomalous"]
    assert told["threshold"] == tiny_bundle.manifest.threshold.value
    assert "random weights" in told["weights"]
    np.testing.assert_allclose(np.load(frame["anomaly_map"]), want.anomaly_map, atol=1e-6)
    with Image.open(frame["overlay"]) as picture:
        assert picture.format == "PNG"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"000.overlay.png", "000.map.npy"}


def test_infer_tells_each_defect_in_a_line(tiny_bundle: Bundle, category: Path) -> None:
    rgb, xyz = (
        str(category / f"test/bump/{part}/000{end}") for part, end in (("rgb", ".png"), ("xyz", ".tiff"))
    )
    want = Inspector(tiny_bundle).inspect(read_frame(Path(rgb), Path(xyz)))
    limits = ("--threshold", str(want.score - 1e-4), "--review", str(want.score - 1e-3))
    told = CliRunner().invoke(app, ["infer", rgb, xyz, "--bundle", str(tiny_bundle.path), *limits])
    first, *lines = told.stdout.splitlines()
    assert first.startswith(f"000: DEFECT, score {want.score:.4f}, ")
    assert lines
    assert all(re.match(rf"  {n}  [\d.]+ mm\^2, ", line) for n, line in enumerate(lines, 1))
    above = CliRunner().invoke(
        app, ["infer", rgb, xyz, "--bundle", str(tiny_bundle.path), "--threshold", "1e6"]
    )
    assert [line.partition(",")[0] for line in above.stdout.splitlines()] == ["000: good"]


def test_a_bad_frame_does_not_stop_the_next(tiny_bundle: Bundle, tmp_path: Path) -> None:
    empty = make_frame(1)
    write_frame(tmp_path, "0", Frame(empty.rgb, np.zeros_like(empty.xyz), "empty"))
    rgb, _ = write_frame(tmp_path, "1", make_frame(2))
    rgb.write_bytes(rgb.read_bytes()[:200])
    write_frame(tmp_path, "2", make_frame(3, part=0.1))
    write_frame(tmp_path, "3", make_frame(4))
    done = client("infer", tmp_path, "--bundle", tiny_bundle.path, "--layout", "fused", "--json")
    assert done.returncode == 1
    frames = json.loads(done.stdout)["frames"]
    assert "is all background" in frames[0]["error"]
    assert "1.png" in frames[1]["error"]
    assert "expected at least 1024" in frames[2]["error"]
    assert "error" not in frames[3]
    assert frames[3]["score"] > 0
    assert "3 of 4 frames could not be inspected: " in done.stderr


def test_a_verdict_is_told_also_where_it_cannot_be_saved(tiny_bundle: Bundle, tmp_path: Path) -> None:
    for number in range(2):
        write_frame(tmp_path / "frames", f"{number}", make_frame(number))
    out = tmp_path / "out"
    (out / "0.map.npy" / "full").mkdir(parents=True)  # as a full disk, a place where the map cannot go
    done = client("infer", tmp_path / "frames", "--bundle", tiny_bundle.path, "--out", out)
    assert done.returncode == 1
    first, second = (
        line for line in done.stdout.splitlines() if line[0].isdigit()
    )  # defects follow, indented
    assert re.search(rf"^0: (good|DEFECT), score .*, not saved: {re.escape(str(out))}: \w", first)
    assert "1.overlay.png" in second
    assert "found in 1 of 2 frames could not be saved" in done.stderr
    assert "Traceback" not in done.stderr
    assert {p.name for p in out.iterdir()} == {"0.map.npy", "0.overlay.png", "1.map.npy", "1.overlay.png"}


def test_eval_equals_the_metrics_computed_here(tiny_bundle: Bundle, category: Path) -> None:
    told = document("eval", category, "--bundle", tiny_bundle.path, "--maps")
    inspector, samples = Inspector(tiny_bundle), find_samples(category, "test")
    results = [inspector.inspect(read_sample(s), with_maps=True) for s in samples]
    masks = np.stack([prepare_mask(read_sample_mask(s, (120, 120))) for s in samples])
    bad = np.array([not s.is_good for s in samples])
    maps, scores = np.stack([r.anomaly_map for r in results]), np.array([r.score for r in results])
    assert told["metrics"] == pytest.approx(evaluate(maps, scores, masks, bad), abs=1e-6)
    assert told["per_defect"].keys() == {"bump"}
    assert told["per_defect"]["bump"]["frames"] == 2
    flagged = scores > inspector.record.threshold
    assert told["verdicts"]["found"] == (flagged & bad).sum()
    assert sum(told["verdicts"].values()) == told["frames"] == 5
    assert list(told["score_maps"]) == tiny_bundle.manifest.score_maps
    for index, found in enumerate(told["score_maps"].values()):
        tops = np.array([r.score_maps[index].max() for r in results])
        assert found["image_auroc"] == np.mean([b > g for b in tops[bad] for g in tops[~bad]])


def test_a_split_without_masks_has_image_metrics_and_verdicts(
    tiny_bundle: Bundle, category: Path, tmp_path: Path
) -> None:
    shutil.copytree(category, tmp_path / "plate")
    shutil.rmtree(tmp_path / "plate/test/bump/gt")
    shutil.rmtree(tmp_path / "plate/test/good/gt")
    with_masks = document("eval", category, "--bundle", tiny_bundle.path, "--maps")
    told = document("eval", tmp_path / "plate", "--bundle", tiny_bundle.path, "--maps")
    assert told["metrics"] == {"image_auroc": with_masks["metrics"]["image_auroc"]}
    assert told["verdicts"] == with_masks["verdicts"]
    assert told["without_mask"] == {"bump": 2}
    assert with_masks["without_mask"] == {}
    for name, found in told["score_maps"].items():
        assert found == {"image_auroc": with_masks["score_maps"][name]["image_auroc"]}
    # A second kind, drawn: what can be said of it is said.
    shutil.copytree(category / "test/bump", tmp_path / "plate/test/drawn")
    told = document("eval", tmp_path / "plate", "--bundle", tiny_bundle.path)
    assert told["per_defect"]["bump"].keys() == {"frames", "image_auroc"}
    assert told["per_defect"]["drawn"] == with_masks["per_defect"]["bump"]
    assert told["metrics"]["pixel_auroc"] == with_masks["metrics"]["pixel_auroc"]


def test_tables_are_printed_for_people_and_documents(tiny_bundle: Bundle, category: Path) -> None:
    done = client("bench", category, "--bundle", tiny_bundle.path, "--frames", 2, "--warmup", 1, "--markdown")
    assert done.returncode == 0, done.stderr
    assert "| fused | inference only: tensors ready -> map | " in done.stdout
    assert "| CFM | 21.755 | 437.9 |" in done.stdout
    assert "- fused: in process, " in done.stdout
    assert "- Not one machine: " in done.stdout
    done = client("eval", category, "--bundle", tiny_bundle.path)
    assert "image auroc" in done.stdout
    assert "false alarms" in done.stdout


def test_names_in_brackets_are_printed_whole(tiny_bundle: Bundle, category: Path, tmp_path: Path) -> None:
    data, bundle = tmp_path / "data [cpu]" / "plate[v2]", tmp_path / "bundle [bold]:smile:"
    shutil.copytree(category, data)
    (data / "test" / "bump").rename(data / "test" / "bump[b]")
    shutil.copytree(tiny_bundle.path, bundle)
    Bundle.open(bundle).update(precision=INT8)
    done = client("eval", data, "--bundle", bundle)
    assert done.returncode == 0, done.stderr
    assert f"warning: {bundle} is quantized and was never gated" in done.stderr
    assert "bump[b]" in done.stdout
    assert f"error: {data / 'absent[v2]'} is not a folder" in refusal("infer", data / "absent[v2]")
    usage = client("infer", data, "--tls", "--ca", tmp_path / "no[cpu].pem")
    assert usage.returncode == 2
    assert f"'{tmp_path / 'no[cpu].pem'}' does not exist" in usage.stderr


def test_no_server_is_one_sentence(category: Path) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        url = f"127.0.0.1:{reserved.getsockname()[1]}"
        told = refusal("infer", category, "--url", url)
    assert told.startswith(f"error: no Triton answers at {url} (")
    assert "m3ad-triton serve REPO" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["empty"], "holds no frames"),
        (["absent"], "absent is not a folder"),
        (["rgb.png"], "rgb.png is one file; name its partner, too"),
        (["empty", "rgb.png"], "empty is a folder; expected RGB and XYZ of one frame, or one folder alone"),
        (["a", "b", "c"], "expected RGB and XYZ of one frame or one folder, got 3 paths"),
    ],
)
def test_wrong_inputs_are_one_sentence(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "rgb.png").touch()
    assert message in refusal("infer", *(tmp_path / a for a in arguments))


def test_a_tampered_bundle_is_one_sentence(tiny_bundle: Bundle, category: Path, tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    shutil.copytree(tiny_bundle.path, path)
    (path / "onnx" / "mfm.onnx").write_bytes(b"")
    assert "mfm.onnx was changed after it was written" in refusal("infer", category, "--bundle", path)


@pytest.mark.parametrize("command", [["infer"], ["bench", "--frames", "1", "--warmup", "1"]])
def test_a_quantized_bundle_that_was_never_gated_runs_with_a_warning(
    command: list[str], tiny_bundle: Bundle, category: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_bundle.path, tmp_path / "bundle")
    Bundle.open(tmp_path / "bundle").update(precision=INT8)
    done = client(command[0], category, *command[1:], "--bundle", tmp_path / "bundle", "--json")
    assert done.returncode == 0
    assert "is quantized and was never gated; find a better plan with" in " ".join(done.stderr.split())
    json.loads(done.stdout)


def test_tls_files_without_tls_are_a_usage_error(category: Path) -> None:
    done = client("infer", category, "--ca", category / "test/good/rgb/000.png")
    assert done.returncode == 2
    assert "--ca, --key and --cert need --tls" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("model", "layout"), [("tiny", "chain"), ("other", "fused")])
def test_served_evaluation_equals_the_in_process_one(
    server: LocalServer, tiny_bundle: Bundle, category: Path, model: str, layout: str
) -> None:
    served = document("eval", category, "--url", server.grpc_url, "--model", model, "--maps")
    here = document("eval", category, "--bundle", tiny_bundle.path, "--layout", layout, "--maps")
    assert served["metrics"] == pytest.approx(here["metrics"], abs=1e-5)
    assert served["verdicts"] == here["verdicts"]
    for name, found in here["score_maps"].items():
        assert served["score_maps"][name] == pytest.approx(found, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            ["--model", "absent"],
            "cannot serve model `absent`, it does not have it; m3ad categories it serves:",
        ),
        (
            ["--model", "tiny_mfm"],
            "model `tiny_mfm` of Triton at .* was not written by m3ad|name a category's",
        ),
        (
            ["--model", "stale"],
            f"written for contract version 999, this client speaks {CONTRACT_VERSION}; install the same m3ad",
        ),
        ([], "choose a category with --model; Triton at .* serves: .*tiny"),
    ],
)
def test_models_that_cannot_be_used(
    server: LocalServer, category: Path, model: list[str], message: str
) -> None:
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(refusal("infer", category, "--url", server.grpc_url, *model))
