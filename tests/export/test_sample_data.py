"""The sample category is repeatable, readable as MVTec 3D-AD, and its defects touch only what their folder says."""

import numpy as np
import pytest
from m3ad.bundle import MANIFEST
from m3ad.errors import ArtifactError
from m3ad.frame_settings import Preprocessing
from m3ad.frames import find_samples, read_sample, read_sample_mask
from m3ad.grid import prepare_mask
from m3ad.preprocess import prepare
from m3ad_export.sample_data import DEFECT_FOLDERS, sample_frame, write_sample_data

SMALL = {"train": 2, "validation": 1, "test_per_kind": 3, "size": 224}


@pytest.fixture(scope="module")
def category(tmp_path_factory):
    out = tmp_path_factory.mktemp("sample") / "plate"
    write_sample_data(out, seed=5, **SMALL)
    return out


def frames(kind, index, seed=11, size=256):
    """The same part twice: good, and with a defect."""
    good = sample_frame(np.random.default_rng(seed), "good", index, size)
    return good, sample_frame(np.random.default_rng(seed), kind, index, size)


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_layout_and_counts(category):
    assert [s.name for s in find_samples(category, "train")] == ["000", "001"]
    assert len(find_samples(category, "validation")) == 1
    test = find_samples(category, "test")
    assert {s.defect for s in test} == {"good", *DEFECT_FOLDERS}
    assert len(test) == 12
    for sample in test:
        frame = read_sample(sample)
        mask = read_sample_mask(sample, frame.rgb.shape[:2])
        assert frame.rgb.shape == (224, 224, 3)
        assert mask.any() != sample.is_good


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(category, tmp_path):
    write_sample_data(tmp_path / "again", seed=5, **SMALL)
    assert contents(tmp_path / "again") == contents(category)
    write_sample_data(tmp_path / "again", seed=6, **SMALL)  # its own earlier output is replaced
    other, first = contents(tmp_path / "again"), contents(category)
    assert other.keys() == first.keys()
    assert all(other[name] != first[name] for name in first if "gt" not in name)


def test_no_two_frames_are_alike(category):
    images = [p.read_bytes() for p in category.rglob("rgb/*.png")]
    assert len(set(images)) == len(images) == 15


def test_more_frames_leave_the_first_ones_as_they_were(category, tmp_path):
    write_sample_data(tmp_path / "more", seed=5, **{**SMALL, "train": 3})
    more = contents(tmp_path / "more")
    assert all(more[name] == content for name, content in contents(category).items() if name != MANIFEST)


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("seed", range(4))
def test_geometry_defects_are_invisible_in_the_image_and_exact_in_the_cloud(index, seed):
    (good_rgb, good_xyz, _), (rgb, xyz, mask) = frames("geometry", index, seed)
    np.testing.assert_array_equal(rgb, good_rgb)
    seen = (xyz != 0).all(axis=2) & (good_xyz != 0).all(axis=2)
    change_mm = 1000 * np.abs(xyz - good_xyz)[..., 2]
    assert (change_mm[mask & seen] > 0.4 - 1e-3).all()
    assert (change_mm[~mask & seen] <= 0.4 + 1e-3).all()
    assert 2 < change_mm[seen].max() < 4.1


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("seed", range(4))
def test_colour_defects_leave_the_cloud_alone_and_lie_in_their_mask(index, seed):
    (good_rgb, good_xyz, _), (rgb, xyz, mask) = frames("colour", index, seed)
    np.testing.assert_array_equal(xyz, good_xyz)
    change = np.abs(rgb.astype(int) - good_rgb).max(axis=2)
    assert change[mask].mean() > 15 * max(change[~mask].mean(), 0.05)
    assert change[~mask].max() < 60  # soft edges below the mask's floor, and the lens's blur


@pytest.mark.parametrize("index", range(3))
def test_both_defects_show_in_both_at_one_place(index):
    (good_rgb, good_xyz, _), (rgb, xyz, mask) = frames("both", index)
    seen = (xyz != 0).all(axis=2) & (good_xyz != 0).all(axis=2)
    assert np.abs(xyz - good_xyz)[seen & mask].max() > 2e-3
    assert np.abs(rgb.astype(int) - good_rgb)[mask].max() > 30
    assert np.abs(rgb.astype(int) - good_rgb)[~mask].max() < 60


def test_parts_look_like_a_metric_scan(category):
    for sample in find_samples(category, "train"):
        frame = read_sample(sample)
        made = prepare(frame, Preprocessing())
        assert 0.35 < len(made.points) / 224**2 < 0.6
        assert 0.37 < made.points[:, 2].min() < made.points[:, 2].max() < 0.42
        hole = (frame.xyz == 0).all(axis=2)
        np.testing.assert_array_equal(hole, (frame.xyz == 0).any(axis=2))
        z = np.where(hole, np.nan, frame.xyz[..., 2])
        step_mm = 1000 * np.diff(z, axis=1)
        assert 0.1 < np.nanmedian(np.abs(step_mm)) / 0.6745 / np.sqrt(2) < 0.3  # sensor noise of about 0.2 mm


def test_defects_have_the_size_a_detector_can_find(category):
    for sample in find_samples(category, "test"):
        if not sample.is_good:
            mask = prepare_mask(read_sample_mask(sample, (224, 224)))
            extent = max(np.ptp(axis) + 1 for axis in np.nonzero(mask))
            assert 12 <= extent <= 64
            assert mask.sum() >= 100


def test_foreign_folders_are_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ArtifactError, match=r"mine has no manifest.json, so it is not a m3ad-sample-data"):
        write_sample_data(tmp_path / "mine", **SMALL)
    assert contents(tmp_path) == {"mine/notes.txt": b"keep"}


@pytest.mark.parametrize("bad", [{"train": 0}, {"validation": 0}, {"test_per_kind": 0}, {"size": 64}])
def test_counts_out_of_range_are_refused_before_anything_is_written(tmp_path, bad):
    with pytest.raises(ValueError, match="counts must be at least 1 and size at least 128, got train"):
        write_sample_data(tmp_path / "x", **{**SMALL, **bad})
    assert not list(tmp_path.iterdir())
