"""How calibration frames look is recorded, and frames that are spoiled in one way differ in exactly that."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from drifting import WAYS, plate
from m3ad.errors import ArtifactError, FrameError
from m3ad.frame_settings import Preprocessing
from m3ad.frames import Frame, find_samples, read_sample
from m3ad.reference import Band, Look, Looks, Reference, departures, look, score_band
from m3ad.regions import Regions
from m3ad.rig import fit_rig
from m3ad_calibrate import disturb
from m3ad_export.sample_data import write_sample_data
from scipy import ndimage

SETTINGS = Preprocessing()


@pytest.fixture(scope="module")
def reference() -> Reference:
    looks = Looks(SETTINGS)
    for seed in range(8):
        looks.add(plate(seed))
    found = looks.reference()
    assert found is not None
    return found


def test_what_a_frame_says_is_what_is_in_it() -> None:
    frame = plate(3)
    found = look(frame, SETTINGS, 0.5)
    grey = frame.rgb[..., 0].astype(np.float64)
    assert found.brightness == pytest.approx(grey.mean(), rel=1e-5)
    smooth = ndimage.gaussian_filter(grey, 1.0)
    laplacian = ndimage.laplace(smooth)  # near the exact one: the same edges, to a fifth
    assert found.focus == pytest.approx(laplacian.std() / grey.std(), rel=0.2)
    assert found.coverage == pytest.approx(np.isfinite(frame.xyz).all(axis=2).mean())
    assert found.support is not None
    assert abs(found.support[0][3]) == pytest.approx(0.5, abs=1e-4)
    assert found.score == 0.5
    doubled = Frame((frame.rgb // 2), frame.xyz, "half the light")
    assert look(doubled, SETTINGS).focus == pytest.approx(found.focus, rel=0.05)


def test_the_band_is_of_median_and_spread() -> None:
    values = np.random.default_rng(0).normal(100, 2, 40)
    mad = 1.4826 * np.median(np.abs(values - np.median(values)))
    band = Band.of(values.tolist(), 0.0)
    assert band.usual == pytest.approx(np.median(values))
    assert band.bound == pytest.approx(4 * 1.1 * max(mad, values.std() / 2))
    assert Band.of([1.0] * 8, 0.25).bound == 0.25
    assert score_band([1.0, 2.0, 3.0, 2.0], 9.0) is None
    found = score_band([1.0] * 5, 2.0)
    assert found is not None
    assert found.bound == pytest.approx(0.1)


def test_the_reference_survives_its_file_and_finds_the_rig(reference: Reference) -> None:
    again = Reference.from_json(json.loads(json.dumps(reference.to_json())), "the reference")
    assert again == reference
    assert reference.rig is not None
    assert reference.rig.plane == pytest.approx(fit_rig([plate(seed) for seed in range(8)]).plane)
    assert reference.registration is not None
    assert (reference.registration.down, reference.registration.right) == (0, 0)
    for damaged in ({}, {"format": "m3ad-reference"}, {**reference.to_json(), "frames": "many"}):
        with pytest.raises(ArtifactError, match="Record it again: m3ad-calibrate threshold"):
            Reference.from_json(damaged, "the reference")


@pytest.mark.parametrize("way", ["not at all", *WAYS])
def test_a_window_spoiled_in_one_way_names_that(way: str, reference: Reference) -> None:
    reason, change = WAYS.get(way, (None, lambda frame: frame))
    window = [look(change(plate(seed)), SETTINGS, 1.0) for seed in range(100, 116)]
    found = departures(reference, Band(usual=1.0, bound=0.1), window)
    everything = {"brightness", "focus", "coverage", "plane", "registration", "score"}
    assert found.keys() == everything - ({"registration"} if reason == "focus" else set())
    off = {name: each.share for name, each in found.items() if each.share > 0.8}
    assert [*off] == ([reason] if reason else []), off
    assert reason is None or off[reason] > 1.0


@pytest.mark.slow
def test_parts_that_differ_by_themselves_are_no_drift(tmp_path: Path) -> None:
    write_sample_data(tmp_path / "data", train=16, validation=8, test_per_kind=1, size=128)
    looks = Looks(SETTINGS)
    for sample in find_samples(tmp_path / "data", "validation"):
        looks.add(read_sample(sample))
    reference = looks.reference()
    assert reference is not None
    frames = [read_sample(sample) for sample in find_samples(tmp_path / "data", "train")]
    for change, level, reason in (
        (None, 0.0, []),
        (disturb.light, 0.8, ["brightness"]),
        (disturb.blur, 1.5, ["focus"]),
        (disturb.missing_points, 20, ["coverage"]),
        (disturb.misregistration, 4, ["registration"]),
    ):
        window = [
            look(change(frame, level, np.random.default_rng(i)) if change else frame, SETTINGS)
            for i, frame in enumerate(frames)
        ]
        found = departures(reference, None, window)
        assert [name for name, each in found.items() if each.share > 1] == reason, (reason, found)


def test_scores_shift_both_ways(reference: Reference) -> None:
    band = Band(usual=1.0, bound=0.1)
    for score, share in ((1.05, 0.5), (1.2, 2.0), (0.8, 2.0)):
        window = [Look(score=score), Look(score=score), Look(score=9.0), Look()]
        assert departures(reference, band, window)["score"].share == pytest.approx(share)
    assert "score" not in departures(reference, None, [Look(score=3.0)])


def test_a_cloud_that_moved_is_told_by_how_much(reference: Reference) -> None:
    def moved(frame: Frame) -> Frame:
        return Frame(np.roll(frame.rgb, (5, -10), (0, 1)), frame.xyz, frame.name)

    window = [look(moved(plate(seed)), SETTINGS) for seed in range(100, 104)]
    # 160 pixels are 224 of the grid: 7 and 14
    assert "-14 px across and +7 px down" in departures(reference, None, window)["registration"].told


def test_a_support_that_is_gone_is_the_planes(reference: Reference) -> None:
    def bare(frame: Frame) -> Frame:
        xyz = frame.xyz.copy()
        xyz[frame.xyz[..., 2] > 0.495] = np.nan
        return Frame(frame.rgb, xyz, frame.name)

    window = [look(bare(plate(seed)), SETTINGS) for seed in range(3)]
    assert "support is no longer seen" in departures(reference, None, window)["plane"].told


def test_what_frames_do_not_have_is_not_looked_at() -> None:
    assert look(plate(0), Preprocessing(without="rgb")).brightness is None
    blind = look(plate(0), Preprocessing(without="xyz"))
    assert (blind.coverage, blind.support, blind.agreement) == (None, None, None)
    looks = Looks(SETTINGS)
    for seed in range(4):
        looks.add(plate(seed))
    assert looks.reference() is None
    flat = Looks(Preprocessing(without="rgb"))
    for seed in range(5):
        flat.add(plate(seed))
    found = flat.reference()
    assert found is not None
    assert (found.brightness, found.focus, found.registration) == (None, None, None)
    assert found.coverage is not None


def test_only_the_pixels_that_count_are_looked_at() -> None:
    kept = np.zeros((160, 160), np.bool_)
    kept[:, :100] = True
    settings = replace(SETTINGS, regions=Regions.of(kept))
    frame = plate(1)
    other = Frame(frame.rgb.copy(), frame.xyz.copy(), "a hand at the right")
    other.rgb[:, 110:] = 255
    other.xyz[:, 110:] = np.nan
    a, b = look(frame, settings), look(other, settings)
    assert (a.brightness, a.focus, a.coverage) == (b.brightness, b.focus, b.coverage)
    assert a.brightness == pytest.approx(frame.rgb[:, :100].mean(), rel=1e-5)
    with pytest.raises(FrameError, match="of another size than the bundle's regions"):
        look(Frame(frame.rgb[1:], frame.xyz[1:], "cut"), settings)
