"""Layouts are listed and paired by name, every kind of file is read, and each damaged one gets its sentence."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from m3ad.errors import FrameError
from m3ad.frames import Frame, find_pairs, find_samples, read_frame, read_mask, read_sample, read_sample_mask
from PIL import Image


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def write_pair(folder: Path, stem: str, rng, size=(20, 30), rgb_suffix=".png", xyz_suffix=".tiff"):
    (folder / "rgb").mkdir(parents=True, exist_ok=True)
    (folder / "xyz").mkdir(parents=True, exist_ok=True)
    rgb = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    xyz = rng.normal(size=(*size, 3)).astype(np.float32)
    rgb_path, xyz_path = folder / "rgb" / f"{stem}{rgb_suffix}", folder / "xyz" / f"{stem}{xyz_suffix}"
    Image.fromarray(rgb).save(rgb_path)
    if xyz_suffix == ".npy":
        np.save(xyz_path, xyz)
    else:
        tifffile.imwrite(xyz_path, xyz, photometric="rgb")
    return rgb, xyz, rgb_path, xyz_path


def write_mask(folder: Path, stem: str, mask):
    (folder / "gt").mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "gt" / f"{stem}.png")


def test_mvtec_layout_is_listed_sorted_and_paired_by_name(tmp_path, rng):
    test = tmp_path / "test"
    for defect, stems in (("hole", ("010", "002")), ("good", ("001", "000"))):
        for stem in stems:
            write_pair(test / defect, stem, rng)
    mask = np.zeros((20, 30), bool)
    mask[3:6, 4:9] = True
    write_mask(test / "hole", "002", mask)
    samples = find_samples(tmp_path, "test")
    assert [(s.defect, s.name, s.is_good) for s in samples] == [
        ("good", "000", True), ("good", "001", True), ("hole", "002", False), ("hole", "010", False),
    ]  # fmt: skip
    assert all(s.rgb_path.stem == s.xyz_path.stem and s.split == "test" for s in samples)
    np.testing.assert_array_equal(read_sample_mask(samples[2], (20, 30)), mask)
    assert not read_sample_mask(samples[0], (20, 30)).any()
    assert read_sample(samples[2]).name == "hole/002"
    with pytest.raises(FrameError, match=r"010.png has the defect 'hole' but no mask; expected gt/010.png"):
        read_sample_mask(samples[3], (20, 30))
    with pytest.raises(FrameError, match="is 30x20 pixels, its frame 31x20"):
        read_sample_mask(samples[2], (20, 31))


def test_defective_parts_are_refused_outside_of_test(tmp_path, rng):
    write_pair(tmp_path / "train" / "good", "000", rng)
    write_pair(tmp_path / "train" / "hole", "000", rng)
    with pytest.raises(
        FrameError, match="has the defect 'hole', but the split 'train' is for good parts only"
    ):
        find_samples(tmp_path, "train")


def test_a_missing_partner_is_named_even_when_the_counts_agree(tmp_path, rng):
    write_pair(tmp_path / "train" / "good", "000", rng)
    _, _, _, xyz_path = write_pair(tmp_path / "train" / "good", "001", rng)
    xyz_path.rename(xyz_path.with_name("002.tiff"))
    with pytest.raises(
        FrameError, match=r"002.tiff has no image \(.png, .jpg, .*\) of the same name in .*rgb"
    ):
        find_samples(tmp_path, "train")
    xyz_path.with_name("002.tiff").unlink()
    with pytest.raises(FrameError, match=r"001.png has no cloud .* of the same name in .*xyz"):
        find_samples(tmp_path, "train")


def test_two_files_of_one_name_are_refused(tmp_path, rng):
    write_pair(tmp_path, "000", rng)
    write_pair(tmp_path, "000", rng, rgb_suffix=".jpg")
    with pytest.raises(FrameError, match=r"000.jpg and 000.png have the same name; keep one"):
        find_pairs(tmp_path)


def test_names_that_begin_with_a_dot_are_no_frames(tmp_path, rng):
    """What other systems leave behind: ._NAME (AppleDouble), .DS_Store, Thumbs.db, __MACOSX."""
    category, eyecandies, plain = tmp_path / "part", tmp_path / "candy", tmp_path / "plain"
    write_pair(category / "test" / "hole", "000", rng)
    write_mask(category / "test" / "hole", "000", np.ones((20, 30), bool))
    write_eyecandies(eyecandies / "train" / "data", "000", rng)
    for path in write_pair(plain, "000", rng)[2:]:
        path.rename(plain / path.name)
    for folder in ("rgb", "xyz"):
        (plain / folder).rmdir()
    for path in [p for p in tmp_path.rglob("*") if p.is_file()]:
        path.with_name(f"._{path.name}").write_bytes(bytes.fromhex("00051607") + bytes(100))
    for folder in [p for p in tmp_path.rglob("*") if p.is_dir()]:
        (folder / ".DS_Store").write_bytes(b"Bud1")
        (folder / "Thumbs.db").write_bytes(b"x")
    write_pair(category / "test" / ".hidden", "000", rng)
    (category / "__MACOSX").mkdir()
    (sample,) = find_samples(category, "test")
    assert (sample.defect, sample.mask_path.name) == ("hole", "000.png")
    assert [s.name for s in find_samples(eyecandies, "train")] == ["000"]
    assert [s.name for s in find_pairs(plain)] == ["000"]
    with pytest.raises(FrameError, match="it holds the categories candy, part: name one of them"):
        find_samples(tmp_path, "train")


@pytest.mark.parametrize(
    ("rgb_suffix", "xyz_suffix"), [(".bmp", ".tif"), (".tif", ".npy"), (".JPG", ".TIFF")]
)
def test_side_by_side_a_tiff_is_what_its_partner_is_not(tmp_path, rng, rgb_suffix, xyz_suffix):
    _, xyz, rgb_path, xyz_path = write_pair(tmp_path, "000", rng)
    Image.open(rgb_path).save(tmp_path / f"000{rgb_suffix}")
    path = tmp_path / f"000{xyz_suffix}"
    np.save(path, xyz) if xyz_suffix == ".npy" else xyz_path.rename(path)
    for left in (rgb_path, xyz_path):
        left.unlink(missing_ok=True)
    for folder in ("rgb", "xyz"):
        (tmp_path / folder).rmdir()
    (sample,) = find_pairs(tmp_path)
    assert (sample.rgb_path.suffix, sample.xyz_path.suffix) == (rgb_suffix, xyz_suffix)
    np.testing.assert_array_equal(read_sample(sample).xyz, xyz)
    tifffile.imwrite(tmp_path / "001.tif", xyz, photometric="rgb")
    with pytest.raises(FrameError, match=r"001.tif has no image .* of the same name"):
        find_pairs(tmp_path)
    np.save(tmp_path / "001.npy", xyz)
    Image.new("RGB", (30, 20)).save(tmp_path / "001.png")
    with pytest.raises(FrameError, match=r"001.tif and 001.npy have the same name; keep one"):
        find_pairs(tmp_path)


@pytest.mark.parametrize("beside", [False, True])
def test_a_plain_folder_is_listed(tmp_path, rng, beside):
    _, xyz, rgb_path, xyz_path = write_pair(tmp_path, "part", rng, xyz_suffix=".npy")
    if beside:
        rgb_path.rename(tmp_path / rgb_path.name)
        xyz_path.rename(tmp_path / xyz_path.name)
        (tmp_path / "rgb").rmdir()
    (sample,) = find_pairs(tmp_path)
    frame = read_sample(sample)
    assert (sample.defect, frame.name) == ("", "part")
    np.testing.assert_array_equal(frame.xyz, xyz)


def test_unreadable_layouts_are_explained(tmp_path, rng):
    with pytest.raises(FrameError, match="nowhere is not a folder; name a category's folder"):
        find_samples(tmp_path / "nowhere", "train")
    with pytest.raises(FrameError, match=r"has no split 'train'; expected train/<good or a defect's name>"):
        find_samples(tmp_path, "train")
    write_pair(tmp_path / "bagel" / "train" / "good", "000", rng)
    with pytest.raises(FrameError, match="it holds the categories bagel: name one of them"):
        find_samples(tmp_path, "train")
    (tmp_path / "bagel" / "test").mkdir()
    with pytest.raises(
        FrameError, match="holds no frames of the split 'test'; expected <good or a defect's name>/rgb"
    ):
        find_samples(tmp_path / "bagel", "test")
    with pytest.raises(FrameError, match="holds no frames; expected images"):
        find_pairs(tmp_path / "bagel" / "test")
    with pytest.raises(FrameError, match="is not a folder; name a folder that holds images and clouds"):
        find_pairs(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="unknown split 'val', expected one of train, validation, test"):
        find_samples(tmp_path, "val")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("suffix", [".tiff", ".npy"])
def test_clouds_are_read_as_stored(tmp_path, rng, dtype, suffix):
    rgb, _, rgb_path, _ = write_pair(tmp_path, "000", rng)
    xyz = rng.normal(size=rgb.shape).astype(dtype)
    xyz[0, 0], xyz[0, 1], xyz[0, 2] = np.nan, np.inf, 0
    path = tmp_path / f"cloud{suffix}"
    np.save(path, xyz) if suffix == ".npy" else tifffile.imwrite(
        path, xyz, photometric="rgb", compression="zlib"
    )
    frame = read_frame(rgb_path, path)
    assert frame.name == "000"
    np.testing.assert_array_equal(frame.rgb, rgb)
    np.testing.assert_array_equal(frame.xyz, xyz.astype(np.float32))


def test_a_tiff_s_planes_lie_as_its_tags_say(tmp_path, rng):
    _, xyz, rgb_path, _ = write_pair(tmp_path, "000", rng)
    planes = np.ascontiguousarray(np.moveaxis(xyz, -1, 0))
    written = {
        "interleaved": lambda p: tifffile.imwrite(p, xyz, photometric="rgb"),
        "planar": lambda p: tifffile.imwrite(p, planes, planarconfig="separate", photometric="rgb"),
        "pages": lambda p: tifffile.imwrite(p, planes, photometric="minisblack", metadata=None),
        "described": lambda p: tifffile.imwrite(p, planes, photometric="minisblack"),
        "big": lambda p: tifffile.imwrite(p, xyz, photometric="rgb", bigtiff=True, byteorder=">"),
        "tiles": lambda p: tifffile.imwrite(p, xyz, photometric="rgb", tile=(16, 16), compression="lzw"),
        "predictor": lambda p: tifffile.imwrite(p, xyz, photometric="rgb", compression="zlib", predictor=3),
    }
    for name, write in written.items():
        write(tmp_path / f"{name}.tiff")
        np.testing.assert_array_equal(read_frame(rgb_path, tmp_path / f"{name}.tiff").xyz, xyz, name)
    tifffile.imwrite(tmp_path / "two.tiff", planes[:2], photometric="minisblack")
    with pytest.raises(
        FrameError, match=r"two.tiff holds float32 \[2, 20, 30\], expected float32 or float64"
    ):
        read_frame(rgb_path, tmp_path / "two.tiff")


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_images_of_other_kinds_become_rgb(tmp_path, rng, mode):
    _, _, _, xyz_path = write_pair(tmp_path, "000", rng)
    image = Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).convert(mode)
    image.save(tmp_path / "other.png")
    np.testing.assert_array_equal(
        read_frame(tmp_path / "other.png", xyz_path).rgb, np.array(image.convert("RGB"))
    )


def test_wrong_shapes_dtypes_and_kinds_name_both_sides(tmp_path, rng):
    _, _, rgb_path, xyz_path = write_pair(tmp_path, "000", rng)
    for values, got in ((np.zeros((20, 30), bool), r"bool \[20, 30\]"),
                        (np.zeros((20, 30, 3), np.int16), r"int16 \[20, 30, 3\]"),
                        (np.zeros((20, 30, 4), np.float32), r"float32 \[20, 30, 4\]")):  # fmt: skip
        for suffix, write in (
            (".npy", np.save),
            (".tiff", lambda p, v: tifffile.imwrite(p, v, photometric="minisblack")),
        ):
            path = tmp_path / f"wrong{suffix}"
            write(path, values)
            with pytest.raises(
                FrameError,
                match=rf"wrong{suffix} holds {got}, expected float32 or float64",
            ):
                read_frame(rgb_path, path)
    np.save(tmp_path / "small.npy", np.zeros((20, 29, 3), np.float32))
    with pytest.raises(FrameError, match="the image is 30x20 pixels but the cloud 29x20"):
        read_frame(rgb_path, tmp_path / "small.npy")
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(FrameError, match=r"objects.npy cannot be read as NPY"):
        read_frame(rgb_path, tmp_path / "objects.npy")
    with pytest.raises(FrameError, match=r"cloud.las does not exist or is not a file"):
        read_frame(rgb_path, tmp_path / "cloud.las")
    (tmp_path / "cloud.las").write_bytes(b"x")
    with pytest.raises(FrameError, match=r"cloud.las is not a cloud that can be read; expected one of .tiff"):
        read_frame(rgb_path, tmp_path / "cloud.las")
    with pytest.raises(FrameError, match=r"missing.png does not exist"):
        read_frame(tmp_path / "missing.png", xyz_path)
    Image.fromarray(np.zeros((20, 30), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(
        FrameError, match=r"deep.png is uint16 \[20, 30\], expected an 8-bit RGB or grey image"
    ):
        read_frame(tmp_path / "deep.png", xyz_path)
    with pytest.raises(FrameError, match=r"frame x: rgb is float32 \[2, 2, 3\], expected uint8 \[H, W, 3\]"):
        Frame(np.zeros((2, 2, 3), np.float32), np.zeros((2, 2, 3), np.float32), "x")
    with pytest.raises(FrameError, match=r"frame x: xyz is float64 \[2, 2, 3\], expected float32"):
        Frame(np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2, 3)), "x")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A folder with one sound file of each kind."""
    folder, rng = tmp_path_factory.mktemp("sound"), np.random.default_rng(0)
    rgb, xyz, _, _ = write_pair(folder, "000", rng)
    for kind in ("png", "jpg"):
        Image.fromarray(rgb).save(folder / f"sound.{kind}")
    tifffile.imwrite(folder / "sound.tiff", xyz, photometric="rgb")
    tifffile.imwrite(folder / "sound.zip.tiff", xyz, photometric="rgb", compression="zlib")
    np.save(folder / "sound.npy", xyz)
    return folder


KINDS = ("png", "jpg", "tiff", "zip.tiff", "npy")


def read_damaged(folder, kind, content):
    path = folder / f"broken.{kind}"
    path.write_bytes(content)
    is_image = kind in ("png", "jpg")
    return read_frame(path, folder / "sound.tiff") if is_image else read_frame(folder / "sound.png", path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.7, 0.95])
def test_truncated_files_are_refused(sound, kind, kept):
    content = (sound / f"sound.{kind}").read_bytes()
    with pytest.raises(
        FrameError, match=rf"broken.{kind} cannot be read as .*may be truncated, so copy it again"
    ):
        read_damaged(sound, kind, content[: int(len(content) * kept)])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80, deadline=None)
@given(
    edits=st.lists(st.tuples(st.integers(0, 399), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_damaged_bytes_end_in_a_sentence_or_a_frame(sound, kind, edits):
    content = bytearray((sound / f"sound.{kind}").read_bytes())
    for position, value in edits:
        content[position] = value
    try:
        frame = read_damaged(sound, kind, bytes(content))
    except FrameError as error:
        assert "\n" not in str(error)  # noqa: PT017 - most damage is refused, harmless damage is read
    else:
        assert frame.rgb.shape == frame.xyz.shape == (20, 30, 3)


def test_masks_of_any_mode_are_binary(tmp_path, rng):
    mask = rng.random((20, 30)) < 0.3
    for mode in ("L", "RGB", "1"):
        Image.fromarray(mask.astype(np.uint8) * 255).convert(mode).save(tmp_path / "mask.png")
        np.testing.assert_array_equal(read_mask(tmp_path / "mask.png", (20, 30)), mask)


# ---- Eyecandies as published ----


def write_eyecandies(data: Path, name: str, rng, *, bad=False, size=32):
    data.mkdir(parents=True, exist_ok=True)
    depth = rng.integers(20000, 40000, (size, size), dtype=np.uint16)
    Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(data / f"{name}_image_4.png")
    Image.fromarray(depth).save(data / f"{name}_depth.png")
    mask = np.zeros((size, size), np.uint8)
    mask[5:9, 5:9] = 255 * bad
    Image.fromarray(mask).save(data / f"{name}_mask.png")
    (data / f"{name}_info_depth.yaml").write_text("normalization:\n  max: 2.5\n  min: 0.75\n")
    pose = np.eye(4)
    pose[:3, :3] = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    pose[:3, 3] = rng.normal(size=3)
    np.savetxt(data / f"{name}_pose.txt", pose)
    return depth, pose


def eyecandies_cloud_by_hand(depth, pose, near=0.75, far=2.5, focal=711.11):
    """Pixel by pixel, through the 4 x 4 projection and a rotation into the ground's frame and back."""
    h, w = depth.shape
    intrinsics = np.array([[focal, 0, w / 2, 0], [0, focal, h / 2, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    inverse = np.linalg.inv(intrinsics @ pose)
    d = depth / 65535 * (far - near) + near
    cloud = np.array([[(inverse @ [u, v, 1, 1 / d[v, u]])[:3] * d[v, u] for u in range(w)] for v in range(h)])
    top, bottom = cloud[0, w // 2], cloud[-1, w // 2]
    rise, run = top[1] - bottom[1], top[2] - bottom[2]
    angle = np.arctan2(rise, run)
    rotation = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    start = np.array([0, bottom[1], bottom[2]])
    out = np.zeros((h, w, 3))
    for v in range(h):
        for u in range(w):
            x, y, z = rotation @ (cloud[v, u] - start)
            if y <= -0.02 and z <= 1.8 and -1 <= x <= 1:
                px, py, pz = cloud[v, u]
                out[v, u] = 0.1 * px, -0.1 * pz, 0.1 * py
    return out


@pytest.mark.parametrize("seed", range(4))
def test_eyecandies_depth_becomes_the_published_cloud(tmp_path, seed):
    rng = np.random.default_rng(seed)
    depth, pose = write_eyecandies(tmp_path / "train" / "data", "000", rng)
    (sample,) = find_samples(tmp_path, "train")
    xyz = read_sample(sample).xyz
    by_hand = eyecandies_cloud_by_hand(depth, pose)
    np.testing.assert_array_equal((xyz == 0).all(axis=2), (by_hand == 0).all(axis=2))
    np.testing.assert_allclose(xyz, by_hand, atol=1e-7)


def test_eyecandies_splits_and_labels(tmp_path, rng):
    for name, bad in (("00", True), ("01", False), ("02", True)):
        write_eyecandies(tmp_path / "test_public" / "data", name, rng, bad=bad)
    write_eyecandies(tmp_path / "val" / "data", "000", rng)
    samples = find_samples(tmp_path, "test")
    assert [(s.defect, s.name) for s in samples] == [("bad", "00"), ("bad", "02"), ("good", "01")]
    assert read_sample_mask(samples[0], (32, 32)).sum() == 16
    assert [s.name for s in find_samples(tmp_path, "validation")] == ["000"]


def test_eyecandies_files_that_do_not_fit_are_named(tmp_path, rng):
    data = tmp_path / "train" / "data"
    write_eyecandies(data, "000", rng)
    (sample,) = find_samples(tmp_path, "train")
    (data / "000_info_depth.yaml").write_text("normalization: {}\n")
    with pytest.raises(FrameError, match=r"000_info_depth.yaml or 000_pose.txt cannot be used"):
        read_sample(sample)
    (data / "000_pose.txt").unlink()
    with pytest.raises(FrameError, match=r"000_pose.txt does not exist"):
        read_sample(sample)
    (data / "000_depth.png").unlink()
    with pytest.raises(FrameError, match=r"000_image_4.png has no 000_depth.png beside it"):
        find_samples(tmp_path, "train")
