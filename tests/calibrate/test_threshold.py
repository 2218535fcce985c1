import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from m3ad.bundle import Bundle
from m3ad.errors import FrameError
from m3ad_calibrate.cli import app
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


def test_command_writes_threshold_and_plot(tiny_bundle: Bundle, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle.path, bundle)
    write_sample_data(tmp_path / "data", train=1, validation=3, test_per_kind=1, size=128)
    arguments = ["threshold", str(bundle), "--data", str(tmp_path / "data"), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    stored = Bundle.open(bundle).document["threshold"]
    assert stored["value"] == document["value"] == max(stored["validation_scores"])
    assert document["frames"] == 3
    with Image.open(tmp_path / "threshold.png") as picture:
        assert picture.width > 300


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
