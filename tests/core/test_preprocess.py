"""`prepare` equals CFM's loader written with torch and Pillow, repeats bit for bit, and refuses what it cannot use."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from m3ad.contract import Dims
from m3ad.errors import ArtifactError, FrameError
from m3ad.frame_settings import Preprocessing
from m3ad.frames import Frame
from m3ad.grid import prepare_mask, to_frame
from m3ad.methods import contract_of
from m3ad.preprocess import prepare, without_modality
from PIL import Image
from scipy import ndimage

SIZES = [(224, 224), (300, 300), (500, 800), (801, 333), (97, 150)]


def random_frame(height, width, seed=0, holes=0.2):
    rng = np.random.default_rng(seed)
    xyz = rng.normal(0.1, 0.05, (height, width, 3)).astype(np.float32) + np.float32(0.3)
    xyz[rng.random((height, width)) < holes] = 0
    xyz[rng.random((height, width)) < holes / 4] = np.nan
    xyz[rng.random((height, width)) < holes / 4, 1] = np.inf
    xyz[rng.random((height, width)) < holes / 4, 0] = 0  # a hole for CFM only
    return Frame(rng.integers(0, 256, (height, width, 3), dtype=np.uint8), xyz, "random")


def part_on_plane(normal=(0.1, -0.2, 1.0), size=240, noise_m=3e-4, seed=0):
    """A disc 3 cm above a tilted plane, with holes; returns the frame, the disc and the plane (unit normal, offset)."""
    rng = np.random.default_rng(seed)
    v, u = (np.indices((size, size)) - size / 2) / size * 0.2
    a, b, c = normal = np.array(normal) / np.linalg.norm(normal)
    d = -0.5 * c
    depth = -(d + a * u + b * v) / c
    disc = u**2 + v**2 < 0.06**2
    xyz = np.stack([u, v, depth], axis=-1) - 0.03 * normal * disc[..., None]
    xyz += noise_m * rng.normal(size=xyz.shape)
    xyz[rng.random((size, size)) < 0.02] = 0
    rgb = np.zeros((size, size, 3), np.uint8)
    return Frame(rgb, xyz.astype(np.float32), "part"), disc, (a, b, c, d)


def padding(height, width):
    side = max(height, width)
    left, top = int((side - width) / 2), int((side - height) / 2)
    return left, side - width - left, top, side - height - top


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_image_equals_cfm(height, width):
    frame = random_frame(height, width)
    left, right, top, bottom = padding(height, width)
    rows = np.clip(np.arange(-top, height + bottom), 0, height - 1)
    cols = np.clip(np.arange(-left, width + right), 0, width - 1)
    square = Image.fromarray(frame.rgb[rows][:, cols]).resize((224, 224), Image.Resampling.BICUBIC)
    tensor = torch.from_numpy(np.array(square)).permute(2, 0, 1).to(torch.float32).div(255)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = tensor.sub(mean[:, None, None]).div(std[:, None, None])
    np.testing.assert_array_equal(prepare(frame, Preprocessing()).image[0], expected.numpy())


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_points_equal_cfm(height, width):
    frame = random_frame(height, width)
    cloud = torch.from_numpy(np.nan_to_num(frame.xyz, posinf=0)).permute(2, 0, 1)[None]
    square = torch.nn.functional.pad(cloud, padding(height, width))
    resized = torch.nn.functional.interpolate(square, size=(224, 224), mode="nearest")[0].reshape(3, -1).T
    nonzero = (resized != 0).all(dim=1)
    made = prepare(frame, Preprocessing(zero_rule="any_coordinate"))
    np.testing.assert_array_equal(made.points, resized[nonzero].numpy())
    np.testing.assert_array_equal(made.point_pixel, torch.nonzero(nonzero)[:, 0].numpy())


def test_result_fits_the_contract():
    made = prepare(random_frame(300, 224), Preprocessing())._asdict()
    assert [made.pop(name) for name in ("depth_image", "relief", "relief_mask", "fpfh")] == [None] * 4
    inputs = contract_of("mentor3ad", Dims()).inputs
    assert [tensor.name for tensor in inputs] == list(made)
    assert [tensor.mismatch(made[tensor.name]) for tensor in inputs] == [None] * 4
    assert all(array.flags.c_contiguous for array in made.values())


@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing(),
        Preprocessing(plane="ransac", seed=7),
        Preprocessing(plane="fixed", plane_coefficients=(0.1, -0.2, 1 / 3, -0.17), largest_component=False),
    ],
    ids=lambda p: p.plane,
)
def test_result_repeats_bit_for_bit_through_json(preprocessing):
    frame, _, _ = part_on_plane()
    restored = Preprocessing.from_json(json.loads(json.dumps(preprocessing.to_json())))
    assert restored == preprocessing
    for first, second in zip(prepare(frame, preprocessing), prepare(frame, restored), strict=True):
        assert first is second is None or first.tobytes() == second.tobytes()


@pytest.mark.parametrize("plane", ["fixed", "ransac"])
def test_plane_is_removed_and_the_part_is_kept(plane):
    frame, disc, coefficients = part_on_plane(size=224)
    fixed = tuple(2.5 * c for c in coefficients) if plane == "fixed" else None  # need not be normalised
    made = prepare(frame, Preprocessing(plane=plane, plane_coefficients=fixed))
    seen = disc & (frame.xyz != 0).all(axis=2)
    np.testing.assert_array_equal(made.point_pixel, np.flatnonzero(seen))


def test_only_the_largest_piece_is_kept_with_small_gaps_bridged():
    frame, disc, _ = part_on_plane(size=224)
    frame.xyz[disc & (np.indices(disc.shape)[1] == 112)] = 0  # a one-pixel cut through the part
    frame.xyz[5:9, 5:9] -= np.float32(0.03)  # a crumb on the plane, far from the part
    seen = (frame.xyz != 0).all(axis=2)
    crumb = np.zeros_like(disc)
    crumb[5:9, 5:9] = True
    kept = prepare(frame, Preprocessing(plane="ransac"))
    np.testing.assert_array_equal(kept.point_pixel, np.flatnonzero(seen & disc))
    every = prepare(frame, Preprocessing(plane="ransac", largest_component=False))
    np.testing.assert_array_equal(every.point_pixel, np.flatnonzero(seen & (disc | crumb)))


def test_unusable_clouds_say_why():
    frame = random_frame(224, 224)
    for xyz, message in (
        (np.zeros_like(frame.xyz), "frame random is all background: every point is a hole"),
        (
            np.full_like(frame.xyz, np.nan),
            "frame random: every xyz value is NaN or infinite, expected metres",
        ),
        (np.full_like(frame.xyz, 412.0), "half of the cloud is farther than 412 m; xyz must be in metres"),
    ):
        with pytest.raises(FrameError, match=message):
            prepare(replace(frame, xyz=xyz), Preprocessing())


@pytest.mark.parametrize(("count", "fits"), [(1023, False), (1024, True)])
def test_too_few_points_are_counted(count, fits):
    frame = random_frame(224, 224, holes=0)
    frame.xyz.reshape(-1, 3)[count:] = 0
    if fits:
        assert len(prepare(frame, Preprocessing()).points) == count
    else:
        with pytest.raises(
            FrameError, match=r"has 1023 foreground points on the 224 x 224 grid, expected at least 1024"
        ):
            prepare(frame, Preprocessing())


def test_a_plane_that_takes_the_part_is_named():
    frame, _, _ = part_on_plane()
    swallowing = Preprocessing(plane="ransac", plane_distance_m=0.2)
    with pytest.raises(
        FrameError, match=r"has 0 foreground points .* after plane removal `ransac` took \d+, expected"
    ):
        prepare(frame, swallowing)
    frame.xyz[~part_on_plane()[1]] = 0  # without its support
    with pytest.raises(
        FrameError, match="frame part: no plane can be fitted: the frame's border holds 0 points"
    ):
        prepare(frame, Preprocessing(plane="ransac"))


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"plane": "auto"}, "plane must be one of none, fixed, ransac, corners, got 'auto'"),
        ({"plane": "fixed"}, "only `fixed` takes them, and needs them"),
        ({"plane_coefficients": (0, 0, 1, 0)}, "only `fixed` takes them, and needs them"),
        (
            {"plane": "fixed", "plane_coefficients": (0, 0, 0, 1)},
            "four finite numbers with a normal that is not zero",
        ),
        ({"plane": "fixed", "plane_coefficients": (0, 0, np.nan, 1)}, "four finite numbers"),
        ({"plane_distance_m": 0.0}, "plane_distance_m must be positive, got 0.0"),
        ({"without": "depth"}, "without must be rgb or xyz, got 'depth'"),
        ({"without": "xyz", "plane": "ransac"}, "a cloud that is masked flat has no plane to remove"),
        ({"hole": np.nan}, "hole must be a finite number, got nan"),
        ({"zero_rule": "all"}, "zero_rule must be one of point, any_coordinate, got 'all'"),
        ({"extent_m": 0.0}, "extent_m must be positive, got 0.0"),
        ({"seed": -1}, "seed must not be negative, got -1"),
    ],
)
def test_settings_out_of_range_are_refused(settings_, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing(**settings_)
    with pytest.raises(ArtifactError, match="preprocessing settings is damaged"):
        Preprocessing.from_json({**Preprocessing().to_json(), **settings_})


def test_settings_of_another_version_are_refused():
    settings_ = Preprocessing().to_json()
    with pytest.raises(ArtifactError, match=r"missing or unknown: crop, seed\); export the bundle again"):
        Preprocessing.from_json({"crop": 1, **{k: v for k, v in settings_.items() if k != "seed"}})


def test_a_masked_modality_tells_nothing():
    frame = random_frame(64, 80, seed=3)
    plain = without_modality(frame, "rgb")
    assert (plain.rgb == plain.rgb[0, 0]).all()
    np.testing.assert_allclose(plain.rgb[0, 0], frame.rgb.reshape(-1, 3).mean(axis=0), atol=0.5)
    np.testing.assert_array_equal(plain.xyz, frame.xyz)
    flat = without_modality(frame, "xyz")
    np.testing.assert_array_equal(flat.rgb, frame.rgb)
    np.testing.assert_array_equal(flat.xyz[..., :2], frame.xyz[..., :2])
    seen = np.isfinite(frame.xyz).all(axis=2) & frame.xyz.any(axis=2)
    np.testing.assert_array_equal(flat.xyz[~seen], frame.xyz[~seen])
    points = flat.xyz[seen].astype(np.float64) - flat.xyz[seen].mean(axis=0)
    assert np.linalg.svd(points, compute_uv=False)[2] < 1e-4 * np.linalg.norm(points)
    assert abs(flat.xyz[seen, 2].mean() - frame.xyz[seen, 2].mean()) < 1e-6


@pytest.mark.parametrize("modality", ["rgb", "xyz"])
def test_settings_mask_every_frame(modality):
    frame = random_frame(120, 90)
    settings_ = Preprocessing.from_json(Preprocessing(without=modality).to_json())
    found = prepare(frame, settings_)
    expected = prepare(without_modality(frame, modality), Preprocessing())
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    plain, changed = prepare(frame, Preprocessing()), "image" if modality == "rgb" else "points"
    for name in found._fields:
        same = np.array_equal(getattr(found, name), getattr(plain, name))
        assert same is (name != changed)
    newer = ("without", "hole", "zero_rule", "extent_m")
    older = {k: v for k, v in Preprocessing().to_json().items() if k not in newer}
    assert Preprocessing.from_json(older) == Preprocessing(zero_rule="any_coordinate")
    with pytest.raises(FrameError, match="random"):
        prepare(replace(frame, xyz=np.zeros_like(frame.xyz)), settings_)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_mask_equals_cfm(height, width):
    coarse = np.random.default_rng(1).random((-(-height // 12), -(-width // 12))) < 0.3
    mask = np.kron(coarse, np.ones((12, 12), bool))[
        :height, :width
    ]  # no region falls between the grid's centres
    left, right, top, bottom = padding(height, width)
    square = np.pad(mask, ((top, bottom), (left, right)), mode="edge")
    pixel_centre = np.floor((np.arange(224) + 0.5) * len(square) / 224).astype(int)
    np.testing.assert_array_equal(prepare_mask(mask), square[np.ix_(pixel_centre, pixel_centre)])


@settings(max_examples=15, deadline=None)
@given(
    height=st.integers(225, 700),
    width=st.integers(225, 700),
    spots=st.lists(st.tuples(st.floats(0, 0.999), st.floats(0, 0.999), st.integers(1, 3)), max_size=6),
)
def test_no_region_of_a_mask_vanishes(height, width, spots):
    mask = np.zeros((height, width), bool)
    for v, u, size in spots:
        top, left = int(v * height), int(u * width)
        mask[top : top + size, left : left + size] = True
    grid, side = prepare_mask(mask), max(height, width)
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    for region in range(1, count + 1):
        rows, cols = np.nonzero(labels == region)
        places = np.array([rows + (side - height) // 2, cols + (side - width) // 2]) * 224 / side
        near = np.abs(np.argwhere(grid).T[:, :, None] + 0.5 - places[:, None]).max(axis=0)
        assert near.min() <= 1
    assert grid.sum() <= 9 * max(len(spots), 1) + height + width  # nothing but the regions, edges replicated


@settings(max_examples=30, deadline=None)
@given(height=st.integers(40, 500), width=st.integers(40, 500), v=st.floats(0.2, 0.8), u=st.floats(0.2, 0.8))
def test_a_spot_returns_to_where_it_was_in_the_frame(height, width, v, u):
    """frame -> grid -> frame keeps a blob's centre to within one grid pixel, whatever the frame's shape."""
    rows, cols = np.indices((height, width))
    centre = v * height, u * width
    radius = 0.12 * min(height, width)
    mask = (rows - centre[0]) ** 2 + (cols - centre[1]) ** 2 < radius**2
    back = to_frame(prepare_mask(mask).astype(np.float32), height, width)
    assert back.shape == mask.shape
    pixel = max(height, width) / 224
    for axis in (rows, cols):
        assert abs((axis * back).sum() / back.sum() - axis[mask].mean()) < pixel
