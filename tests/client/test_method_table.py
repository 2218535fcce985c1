"""`bench --table`: one row a method, published figures beside measured ones, and why a row is empty."""

import json
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import tifffile
from m3ad.bundle import Bundle
from m3ad.errors import M3adError, MissingDependencyError
from m3ad.frames import find_samples, read_sample, read_sample_mask
from m3ad.grid import prepare_mask
from m3ad.methods import METHODS
from m3ad.metrics import evaluate
from m3ad_client import table_report
from m3ad_client.cli import app
from m3ad_client.measure import map_errors
from m3ad_client.method_table import entries, method_table, published, training_line
from m3ad_client.prepare import export_command, prepare_bundle
from m3ad_client.table_picture import GREY, picture, points_of
from m3ad_export.sample_data import write_sample_data
from m3ad_runtime.pipeline import Inspector
from test_candidates import SAMPLE, Form
from test_client_command import client
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def shown(
    tiny_bundle: Bundle, category: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], str]:
    """The document of a table with one bundle, and its picture. Of CFM there is no training split to train on."""
    folder = tmp_path_factory.mktemp("bundles")
    shutil.copytree(tiny_bundle.path, folder / "mentor3ad/bundle")
    svg = folder / "table.svg"
    options = ("--bundles", folder, "--methods", "mentor3ad,cfm", "--prepare", "--picture", svg)
    done = client("bench", "--table", category, *options, "--frames", 3, "--warmup", 1, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), svg.read_text()


def test_a_row_holds_what_was_published_and_what_was_measured(
    shown: tuple[dict[str, Any], str], tiny_bundle: Bundle, category: Path
) -> None:
    found, _ = shown
    mentor, cfm = found["rows"]
    assert (mentor["method"], cfm["method"]) == ("mentor3ad", "cfm")
    assert mentor["published"] == {
        "frames_per_second": 18.371,
        "memory_mb": 1613.3,
        "i_auroc": 0.971,
        "aupro_30": 0.978,
        "aupro_1": 0.468,
    }
    measured = mentor["measured"]
    assert measured["p50_ms"] <= measured["p99_ms"]
    assert measured["peak_bytes"] > 4 * measured["parameters"] > 0
    assert measured["bundle_bytes"] == sum(e.bytes for e in tiny_bundle.manifest.files.values())
    assert measured["layout"] == "fused"
    assert "random weights" in measured["weights"]
    inspector, samples = Inspector(tiny_bundle), find_samples(category, "test")
    frames = [read_sample(s) for s in samples]
    results = [inspector.inspect(f) for f in frames]
    masks = [prepare_mask(read_sample_mask(s, f.rgb.shape[:2])) for s, f in zip(samples, frames, strict=True)]
    expected = evaluate(
        np.stack([r.anomaly_map for r in results]),
        np.array([r.score for r in results]),
        np.stack(masks),
        np.array([not s.is_good for s in samples]),
    )
    assert measured["metrics"] == pytest.approx(
        {
            "i_auroc": expected["image_auroc"],
            "aupro_30": expected["aupro_30_mvtec99"],
            "aupro_1": expected["aupro_1_mvtec99"],
        }
    )


def test_a_row_that_cannot_be_made_says_why(shown: tuple[dict[str, Any], str]) -> None:
    found, _ = shown
    row = found["rows"][1]
    assert row["measured"] is None
    assert row["published"]["frames_per_second"] == 21.755
    assert "m3ad-export train failed: " in row["why"]
    assert "plate" in row["why"]  # the folder that has no training frames


def test_the_terminal_table_fits_and_says_what_it_stands_on(shown: tuple[dict[str, Any], str]) -> None:
    text = table_report.terminal(shown[0])
    assert max(map(len, text.splitlines())) <= table_report.WIDTH
    lines = text.splitlines()
    assert lines[2].split()[:5] == ["Mentor3AD", "paper", "0.971", "0.978", "0.468"]
    assert "- CFM is not measured: m3ad-export train failed" in text
    assert "random weights" in text
    assert "take turns frame by frame" in text


def test_long_titles_and_slow_forms_fit_too(shown: tuple[dict[str, Any], str]) -> None:
    mentor, cfm = shown[0]["rows"]
    slow = {
        **mentor["measured"],
        "p50_ms": 98765.4,
        "p99_ms": 98765.4,
        "peak_bytes": 2**34,
        "parameters": 411_600_000,
        "bundle_bytes": 1_646_000_000,
        "metrics": {"i_auroc": 1.0, "aupro_30": 1.0, "aupro_1": 1.0},
    }
    titles = [*published(), *(method.title for method in METHODS.values())]
    rows = [{**cfm, "title": title, "measured": slow} for title in titles]
    text = table_report.terminal({**shown[0], "rows": rows})
    assert max(map(len, text.splitlines())) <= table_report.WIDTH
    told = [" ".join(pair) for pair in zip(text.splitlines()[2::2], text.splitlines()[3::2], strict=False)]
    for title, pair in zip(titles, told, strict=False):
        assert all(word in pair for word in title.split())


def test_markdown_has_one_row_a_method(shown: tuple[dict[str, Any], str]) -> None:
    lines = table_report.markdown(shown[0]).splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows] == ["| method", "| ---", "| Mentor3AD", "| CFM"]
    assert len({row.count("|") for row in rows}) == 1


@pytest.mark.parametrize("background", ["measured", "holes"])
@pytest.mark.parametrize("method", ["crd", "ast", "cfm"])
def test_a_background_that_cannot_be_laid_through_corners_is_left_in(
    method: str, background: str, tmp_path: Path
) -> None:
    data, told = tmp_path / "parts", tmp_path / "told"
    write_sample_data(data, train=2, validation=1, test_per_kind=1, size=128)
    if background == "measured":
        for path in data.glob("train/good/xyz/*.tiff"):
            xyz = tifffile.imread(path)
            tifffile.imwrite(
                path,
                np.where(xyz.any(axis=2, keepdims=True), xyz, np.float32([0, 0, 0.5])),
                photometric="rgb",
            )
    command = tmp_path / "m3ad-export"
    command.write_text(f'#!/bin/sh\necho "$@" >>{told}\n')  # a double that trains nothing
    command.chmod(0o755)
    prepare_bundle(method, data, tmp_path / "out", lambda _: None, str(command))
    train, bundle = told.read_text().splitlines()
    assert train.split()[:2] == ["train", str(data)]
    assert ("--plane none" in train) == (background == "holes" and method != "cfm")
    assert "--plane" not in bundle


@pytest.mark.slow
def test_a_missing_bundle_is_made_on_the_way(tmp_path: Path) -> None:
    """Of BTF at full size, which trains nothing; the next table finds it and makes none."""
    data, folder = tmp_path / "parts", tmp_path / "bundles"
    write_sample_data(data, train=1, validation=1, test_per_kind=1, size=128)
    options = ("--bundles", folder, "--methods", "btf", "--frames", 1, "--warmup", 1, "--json")
    done = client("bench", "--table", data, *options, "--prepare")
    assert done.returncode == 0, done.stderr
    assert "BTF: m3ad-export train" in done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    bundle = Bundle.open(folder / "btf/bundle")
    assert bundle.manifest.method == "btf"
    measured = row["measured"]
    assert measured["training"] == "reduced training (frames=8)"
    assert measured["weights"] == "teacher wide_resnet50_2 (random weights)"
    assert measured["bundle_bytes"] == sum(e.bytes for e in bundle.manifest.files.values())
    assert measured["p50_ms"] > 0
    assert measured["metrics"]["i_auroc"] is not None
    made = (folder / "btf/bundle/manifest.json").stat().st_mtime_ns
    again = client("bench", "--table", data, *options)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["rows"][0]["measured"]["weights"] == measured["weights"]
    assert (folder / "btf/bundle/manifest.json").stat().st_mtime_ns == made


def test_the_picture_has_every_point(shown: tuple[dict[str, Any], str]) -> None:
    found, svg = shown
    points = points_of(found)
    assert [(point.title, point.here) for point in points] == [
        ("Mentor3AD", False),
        ("Mentor3AD", True),
        ("CFM", False),
    ]
    tree = ElementTree.fromstring(svg)
    circles = tree.findall("{http://www.w3.org/2000/svg}circle")
    assert len(circles) == len(points) + 2  # and the legend's
    assert svg == picture(found)
    by_place = sorted(zip(points, circles, strict=False), key=lambda each: each[0][1])
    across = [float(circle.get("cx", "nan")) for _, circle in by_place]
    assert across == sorted(across)  # a slower one lies further right


def test_the_picture_tells_methods_and_short_trainings_apart(shown: tuple[dict[str, Any], str]) -> None:
    found, _ = shown
    row = next(row for row in found["rows"] if row["measured"])
    rows = []
    for k in range(10):
        training = "reduced training (steps=6)" if k % 2 else "trained on 24 frames"
        rows.append({**row, "title": f"method {k}", "measured": {**row["measured"], "training": training}})
    tree = ElementTree.fromstring(picture({**found, "rows": rows}))
    circles = [c for c in tree.iter("{http://www.w3.org/2000/svg}circle") if c.get("fill") != GREY]
    drawn = {(c.get("stroke") or c.get("fill"), c.get("fill") == "white") for c in circles}
    assert len(drawn) == 10  # each its own colour, the same in the legend
    assert sum(hollow for _, hollow in drawn) == 5
    assert "hollow: few steps" in "".join(tree.itertext())


def test_every_published_method_has_a_row() -> None:
    rows = entries((), (), None, None, print)
    assert {row.title for row in rows} >= {*published(), *(m.title for m in METHODS.values())}
    ours = {method.title for method in METHODS.values()}
    assert {row.why for row in rows if row.title not in ours} <= {"m3ad has no such method"}
    assert "--prepare makes one" in next(row.why for row in rows if row.title == "CFM")


def test_maps_of_other_methods_are_not_compared() -> None:
    reference, same, other = Form("a", level=-0.25), Form("b", level=0.5), Form("c", level=9.0)
    for form, method in ((reference, "cfm"), (same, "cfm"), (other, "crd")):
        form.conditions["method"] = method
    assert map_errors({"a": reference, "b": same, "c": other}, SAMPLE) == (
        {"a": 0.0, "b": 0.75, "c": None},
        0.25,
    )


def test_reduced_training_is_called_so(tiny_bundle: Bundle) -> None:
    reduced = {**tiny_bundle.document, "training": dict(METHODS["mentor3ad"].reduced)}
    assert training_line(Bundle.of_document(tiny_bundle.path, reduced)) == (
        "reduced training (align_steps=100, guide_steps=150)"
    )
    full = {**tiny_bundle.document, "training": {"align_steps": 200, "guide_steps": 250, "train_frames": 32}}
    assert training_line(Bundle.of_document(tiny_bundle.path, full)) == "trained on 32 frames"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "cfm"], "--methods, --bundles, --prepare and --picture need --table"),
        (["--table", "--url", "localhost:1"], "--table measures bundles on the CPU"),
        (["--table", "--prepare"], "--prepare needs --bundles"),
    ],
)
def test_options_that_make_no_sense(options: list[str], message: str, category: Path) -> None:
    done = CliRunner().invoke(app, ["bench", str(category), *options])
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


def test_without_any_bundle_there_is_no_table(tmp_path: Path) -> None:
    rows = entries(["cfm"], (), tmp_path, None, print)
    with pytest.raises(M3adError, match=r"there is no bundle to measure: CFM: no bundle in .*cfm/bundle"):
        method_table(rows, [SAMPLE], 1, 1, 1, print)
    with pytest.raises(M3adError, match="unknown method 'patchcore'"):
        entries(["patchcore"], (), None, None, print)


def test_preparing_needs_the_export_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    with pytest.raises(MissingDependencyError, match=r"pip install 'm3ad\[export\]'"):
        export_command()
