import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from m3ad.bundle import Bundle
from m3ad.errors import FrameError, M3adError
from m3ad.limits import Limits
from m3ad.serving import ServingRecord
from m3ad_calibrate.cli import app
from m3ad_calibrate.gate import onnx_digest
from m3ad_calibrate.threshold import fit_threshold
from m3ad_export.sample_data import write_sample_data
from PIL import Image
from scipy import stats
from typer.testing import CliRunner

scores = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=60)


@given(scores)
def test_without_a_rate_every_good_part_passes(values: list[float]) -> None:
    fitted = fit_threshold(values)
    assert fitted.value == max(values)
    assert fitted.false_alarms == 0
    exact = stats.binomtest(0, len(values)).proportion_ci(0.95, method="exact")
    assert fitted.false_alarm_rate_high == pytest.approx(exact.high)


@given(scores, st.floats(0.01, 0.9))
def test_a_rate_is_kept_or_refused(values: list[float], rate: float) -> None:
    if np.ceil((len(values) + 1) * (1 - rate)) > len(values):
        with pytest.raises(
            FrameError, match=f"{len(values)} validation parts cannot show a false-alarm rate"
        ):
            fit_threshold(values, rate)
        return
    fitted = fit_threshold(values, rate)
    assert fitted.false_alarms / len(values) <= rate
    exact = stats.binomtest(fitted.false_alarms, len(values)).proportion_ci(0.95, method="exact")
    assert (fitted.false_alarm_rate_low, fitted.false_alarm_rate_high) == pytest.approx(
        (exact.low, exact.high)
    )


def test_the_rate_holds_on_new_parts() -> None:
    rng = np.random.default_rng(0)
    rates = [
        (rng.normal(size=2000) > fit_threshold(rng.normal(size=99), 0.1).value).mean() for _ in range(200)
    ]
    assert np.mean(rates) == pytest.approx(0.1, abs=0.01)


def test_no_parts_is_said() -> None:
    with pytest.raises(FrameError, match="there are no validation parts"):
        fit_threshold([])


def run(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["threshold", *map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output or result.exception
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def test_command_writes_threshold_plot_and_card(tiny_bundle: Bundle, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle.path, bundle)
    write_sample_data(tmp_path / "data", train=1, validation=3, test_per_kind=1, size=128)
    document = run(bundle, "--data", tmp_path / "data", "--review-rate", "0.5")
    stored = Bundle.open(bundle).document["threshold"]
    scores = stored["validation_scores"]
    assert stored["value"] == document["value"] == max(scores)
    # k = ceil(4 * 0.5) = 2: the second smallest of three
    assert stored["review"] == document["review"] == sorted(scores)[1]
    assert document["frames"] == 3
    with Image.open(tmp_path / "threshold.png") as picture:
        assert picture.width > 300
    card = json.loads((tmp_path / "threshold.json").read_text())
    assert card == document["card"]
    assert card["parts"] == stored["parts"] == [f"validation/good/00{i}" for i in range(3)]
    assert card["bundle"]["onnx_sha256"] == onnx_digest(tiny_bundle)
    assert card["review"]["false_alarms"] == 1
    page = (tmp_path / "threshold.md").read_text()
    assert f"| review | {stored['review']:.6g} | false-alarm rate 0.5 | 1 of 3 |" in page
    assert "random weights" in page
    # By hand, later: the scores are kept and say what the limits cost, and the graphs are the ones they were.
    moved = run(
        bundle, "--set", max(scores) + 1, "--set-review", sorted(scores)[0], "--plot", tmp_path / "b.png"
    )
    again = Bundle.open(bundle)
    assert (moved["value"], moved["rule"], moved["false_alarms"]) == (max(scores) + 1, "set by hand", 0)
    assert moved["card"]["review"]["false_alarms"] == 2
    assert again.document["threshold"]["validation_scores"] == scores
    assert again.manifest.files == tiny_bundle.manifest.files
    assert ServingRecord.of(again, "fused").limits == Limits(max(scores) + 1, sorted(scores)[0])
    assert run(bundle, "--set", 1.0)["review"] is None


def test_limits_by_hand_without_known_parts(tiny_bundle: Bundle, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle.path, bundle)
    document = run(bundle, "--set", "0.5", "--set-review", "0.25")
    assert document["card"]["parts"] == []
    page = (tmp_path / "threshold.md").read_text()
    assert "| defect | 0.5 | set by hand | not known | not known |" in page
    assert "none; the limits were set by hand, their rates are not known" in page
    assert not (tmp_path / "threshold.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name either --data, to fit the limits to good parts, or --set"),
        (["--set", "1", "--data", "x"], "name either --data, to fit the limits to good parts, or --set"),
        (["--set", "1", "--false-alarm-rate", "0.1"], "--set takes no rate and no --svm"),
        (["--set", "1", "--set-review", "2"], "limit of review, 2, lies above that of reject, 1"),
        (["--set", "nan"], "limits must be finite, got reject nan"),
        (["--data", "x", "--review-rate", "1.5"], r"--review-rate must lie between 0 and 1, got 1\.5"),
    ],
)
def test_limits_that_make_no_sense_are_refused(
    tiny_bundle: Bundle, tmp_path: Path, arguments: list[str], message: str
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle.path, bundle)
    result = CliRunner().invoke(app, ["threshold", str(bundle), *arguments])
    assert isinstance(result.exception, M3adError)
    assert re.search(message, str(result.exception))
    assert Bundle.open(bundle).document["threshold"] == {"value": 0.01}
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_command_refuses_what_it_cannot_show(tiny_bundle: Bundle, tmp_path: Path) -> None:
    write_sample_data(tmp_path / "data", train=1, validation=2, test_per_kind=1, size=128)
    arguments = [
        "threshold",
        str(tiny_bundle.path),
        "--data",
        str(tmp_path / "data"),
        "--false-alarm-rate",
        "0.01",
    ]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, FrameError)
    assert "at least 99 are needed" in str(result.exception)
    assert Bundle.open(tiny_bundle.path).document["threshold"] == {"value": 0.01}
