"""What a method's settings and the authors' files may be; anything else is one sentence before a frame is read."""

from pathlib import Path

import pytest
from m3ad.errors import M3adError
from m3ad.methods import METHODS
from m3ad_export.cli import app
from m3ad_export.nets.configs import RGB_ENCODERS, XyzEncoderConfig
from m3ad_export.official_files import require_official_encoders
from m3ad_export.training import settings_of
from m3ad_export.weights import WeightsInfo
from typer.testing import CliRunner

RANDOM = WeightsInfo(name="r", kind="random", sha256="0" * 64, licence="none")
PRETRAINED = WeightsInfo(name="p", kind="pretrained", sha256="0" * 64, licence="MIT")
DINO, DINOV2 = RGB_ENCODERS["dino_vitb8"], RGB_ENCODERS["dinov2_vits14"]
PUBLISHED = XyzEncoderConfig(group_size=128)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps_": "1"}, "has no setting 'steps_', expected one of"),
        ({"seed": "-1"}, "seed must be at least 0, got -1"),
        ({"seed": "1.5"}, "Expected `int`"),
    ],
)
def test_settings_out_of_range_are_one_sentence(method: str, values: dict[str, str], message: str) -> None:
    with pytest.raises(M3adError, match=message) as caught:
        settings_of(method, values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "name", "value", "message"),
    [
        ("mentor3ad", "align_steps", "0", "align_steps must be at least 1"),
        ("mentor3ad", "guide_lr", "nan", "guide_lr must be a positive number, got nan"),
        ("mentor3ad", "svm_nu", "1", "svm_nu must lie between 0 and 1, got 1"),
        ("mentor3ad", "fusion", "both", "fusion must be frozen or aligned, got 'both'"),
        *[
            (method, "checkpoint_steps", "0", "checkpoint_steps must be at least 1, got 0")
            for method in METHODS
            if method not in ("m3dm", "m3dm_uff", "btf")  # which train nothing
        ],
        ("cfm", "steps", "0", "steps must be at least 1, got 0"),
        ("cfm", "lr", "-1", "lr must be a positive number"),
        ("cfm", "image_norm", "mean", "image_norm must be none or cfm"),
        ("cmdr_iad", "rows", "0", "rows must be at least 1"),
        ("cmdr_iad_rgb", "recipe", "fast", "recipe must be official or rows"),
    ],
)
def test_a_setting_of_a_method(method: str, name: str, value: str, message: str) -> None:
    with pytest.raises(M3adError, match=f"a setting of {method} does not fit: {message}"):
        settings_of(method, {name: value})


def test_settings_keep_what_they_start_from() -> None:
    start = settings_of("mentor3ad", {"baseline_frames": "12", "svm_nu": "0.3"})
    changed = settings_of("mentor3ad", {"svm_frames": "2"}, start)
    assert (changed.baseline_frames, changed.svm_nu, changed.svm_frames) == (12, 0.3, 2)


def test_the_authors_heads_take_their_encoders_only() -> None:
    require_official_encoders(DINO, PRETRAINED, PUBLISHED, PRETRAINED)
    require_official_encoders(DINO, PRETRAINED, None, None)
    assert (
        DINOV2.token_width == DINO.token_width
    )  # nothing but the name would tell that its features are others
    for rgb, weights in ((DINOV2, PRETRAINED), (DINO, RANDOM)):
        with pytest.raises(
            M3adError, match=r"know nothing of features of dino.* add --rgb-encoder dino_vitb8"
        ):
            require_official_encoders(rgb, weights, PUBLISHED, PRETRAINED)
    for xyz in (XyzEncoderConfig(group_size=32), XyzEncoderConfig(group_size=128, bn_mode="running")):
        with pytest.raises(M3adError, match=r"features of point_mae with \d+ neighbours"):
            require_official_encoders(DINO, PRETRAINED, xyz, PRETRAINED)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "cfm3d"], "unknown method 'cfm3d', expected one of mentor3ad, cfm"),
        (["--method", "cfm", "--modality", "rgb"], "unknown method 'cfm_rgb'"),
        (["--set", "align_steps"], "--set needs NAME=VALUE, got 'align_steps'"),
        (["--method", "cfm", "--set", "big=perhaps"], "a setting of cfm does not fit: Expected `bool`"),
        (
            ["--method", "cfm", "--official", "nowhere", "--rgb-weights", "random"],
            "the authors' heads know nothing of features of dinov2_vits14 with random weights",
        ),
    ],
)
def test_the_command_says_what_does_not_fit(options: list[str], message: str, tmp_path: Path) -> None:
    out = tmp_path / "detector"
    done = CliRunner().invoke(app, ["train", str(tmp_path), str(out), *options])
    assert done.exit_code != 0
    assert message in str(done.exception)
    assert not out.exists()
