"""Shape-Guided's dictionaries, maps and training against scikit-learn, brute force and loops as published."""

from pathlib import Path

import numpy as np
import pytest
import torch
from m3ad.errors import ArtifactError
from m3ad_export.dense.shape_guided import cells_beside, rebuilt
from m3ad_export.heads.guided import (
    MASKED,
    GuidedDictionary,
    GuidedVote,
    Memory,
    level_pooling,
    line_between,
    own_cells,
    residual,
)
from m3ad_export.methods.shape_guided import load_official
from m3ad_export.nets.configs import SdfConfig
from m3ad_export.nets.sdf import SdfNetwork, normalised
from m3ad_export.train.sdf import ShapeGuidedSettings, beside, new_network, train_distances
from named_weights import given
from PIL import Image, ImageFilter
from scipy.spatial.distance import cdist
from sklearn.decomposition import sparse_encode

TINY = SdfConfig(channels=(8, 12, 20), code=6, hidden=16, layers=2)

pytestmark = pytest.mark.usefixtures("one_thread")


def rows(seed: int, *shape: int) -> np.ndarray:
    """Positive and much alike, as features behind a ReLU are."""
    rng = np.random.default_rng(seed)
    return (np.abs(rng.normal(size=shape[-1])) + 0.3 * np.abs(rng.normal(size=shape))).astype(np.float32)


@pytest.mark.parametrize("signed", [False, True])
def test_residuals_are_those_of_scikit_learns_matching_pursuit(signed: bool) -> None:
    queries, atoms = rows(1, 40, 24), rows(2, 40, 10, 24)
    if signed:
        queries, atoms = queries - queries.mean(), atoms - atoms.mean()
    found = residual(*map(torch.from_numpy, (queries, atoms - queries[:, None]))).numpy()
    for query, dictionary, left in zip(queries, atoms, found, strict=True):
        wide = dictionary.astype(np.float64)
        code = sparse_encode(query[None].astype(np.float64), wide, algorithm="omp", n_nonzero_coefs=3)
        assert np.count_nonzero(code) == 3
        np.testing.assert_allclose(left, query - (code @ wide)[0], atol=2e-5)
        dense = rebuilt(torch.from_numpy(query), torch.from_numpy(dictionary)).numpy()
        np.testing.assert_allclose(dense, (code @ wide)[0], atol=1e-5)


def test_an_atom_twice_takes_nothing_the_second_time() -> None:
    atom, query = rows(3, 12), rows(4, 12)
    only = torch.from_numpy(np.stack([atom] * 4) - query)[None]
    left = residual(torch.from_numpy(query)[None], only).numpy()[0]
    np.testing.assert_allclose(left, query - atom * (query @ atom) / (atom @ atom), atol=1e-5)


@pytest.mark.parametrize("count", [60, 8192 + 300])
def test_nearest_rows_are_those_of_all_distances(count: int) -> None:
    memory, queries = rows(5, count, 16), rows(6, 50, 16)
    barred = np.random.default_rng(7).random(count) < 0.5
    mask = torch.from_numpy(barred * np.float32(MASKED))
    distance = cdist(queries.astype(np.float64), memory.astype(np.float64))
    network, asked = Memory(torch.from_numpy(memory)), torch.from_numpy(queries)
    order = distance.argsort(axis=1)
    np.testing.assert_array_equal(network.nearest(asked, 5), order[:, :5])
    np.testing.assert_array_equal(network.nearest(asked, 5, skip=1), order[:, 1:6])
    allowed = np.where(barred, np.inf, distance).argsort(axis=1)
    np.testing.assert_array_equal(network.nearest(asked, 5, mask), allowed[:, :5])


def test_cells_of_a_patch_are_those_of_the_published_list() -> None:
    """Patches at all borders, where indices run on in the next row or leave the grid."""
    y, x = np.mgrid[:224, :224]
    for top, left in ((0, 0), (0, 190), (195, 0), (200, 200), (90, 100), (90, 215)):
        inside = (y >= top) & (y < top + 20) & (x >= left) & (x < left + 25)
        pixel = torch.from_numpy(np.flatnonzero(inside).astype(np.int32))
        members = torch.arange(len(pixel), dtype=torch.int32)[None, :500]
        found = own_cells(members, pixel)[0].nonzero()[:, 0]
        np.testing.assert_array_equal(found, cells_beside(pixel[members[0].long()]))


def test_a_cell_is_rebuilt_from_what_belongs_to_the_patches_found() -> None:
    """A memory of two frames that look alike; only rows of the cells of found patches may be chosen."""
    codes = torch.from_numpy(rows(8, 20, 6))
    codes[10:] += 50
    marks = torch.zeros(20, 784)
    marks[:10, 100:110], marks[10:, 100:110] = 1, 1
    place = torch.cat([torch.arange(784), 784 + torch.arange(784)])
    rgb = torch.from_numpy(rows(9, 1568, 12))
    frame = torch.arange(2).repeat_interleave(10)
    guided = GuidedDictionary(codes, rgb, frame, marks, place, 2)
    pixel = torch.arange(50_000, 50_100, dtype=torch.int32)
    members = torch.arange(40, dtype=torch.int32)[None]
    image = torch.from_numpy(rows(10, 784, 12))
    asked = torch.from_numpy(rows(15, 1, 6))  # near the first frame's
    code, left, largest = guided(asked, image, members, pixel)
    seen = own_cells(members, pixel)[0]
    expected = np.zeros(784)
    for cell in seen.nonzero()[:, 0].tolist():
        near = (rgb[100:110] - image[cell]).norm(dim=1).topk(5, largest=False).indices
        expected[cell] = (image[cell] - rebuilt(image[cell], rgb[100:110][near])).norm()
    np.testing.assert_allclose(left, expected, atol=1e-5)
    np.testing.assert_allclose(code[0], rebuilt(asked[0], codes[:10]), atol=1e-4)
    torch.testing.assert_close(largest, torch.stack([left.max(), (asked - code).norm()]))


def test_the_map_is_the_larger_of_the_smallest_distance_and_the_shifted_residual() -> None:
    rng = np.random.default_rng(11)
    pixel = np.sort(rng.choice(224 * 224, 900, replace=False)).astype(np.int32)
    members = np.stack([rng.permutation(900)[:300] for _ in range(5)]).astype(np.int32)
    distance = rng.random((5, 300)).astype(np.float32) * 1e-2
    left = rng.random(784).astype(np.float32)
    vote = GuidedVote()
    vote.line = torch.tensor([0.01, -0.002])
    inputs = map(torch.from_numpy, (distance, members, pixel, left, np.array([2, 0.5], np.float32)))
    found, score, maps = (t.numpy() for t in vote(*inputs))
    smallest = np.full(900, np.inf)
    for group, values in zip(members, distance, strict=True):
        for point, value in zip(group, values, strict=True):
            smallest[point] = min(smallest[point], value)
    sdf = np.zeros(224 * 224, np.float32)
    sdf[pixel] = np.where(np.isinf(smallest), 0, smallest)
    sdf = sdf.reshape(224, 224)
    cells = torch.from_numpy(left.reshape(1, 1, 28, 28))
    rgb = torch.nn.functional.interpolate(cells, size=(224, 224), mode="bilinear")[0, 0].numpy()
    rgb = np.maximum(0.01 * rgb - 0.002, 0)
    for each, raw in ((found, np.maximum(rgb, sdf)), (maps[0], rgb), (maps[1], sdf)):
        published = Image.fromarray((raw / raw.max() * 255).astype(np.uint8)).filter(
            ImageFilter.GaussianBlur(4)
        )
        # PIL rounds to 8 bits, and the authors cut off before it: up to 1.7 of 255 levels
        np.testing.assert_allclose(each, np.asarray(published) / 255 * raw.max(), atol=2 / 255 * raw.max())
    assert score == [1.0]


def test_the_line_puts_three_deviations_onto_those_of_the_other() -> None:
    rng = np.random.default_rng(12)
    rgb, sdf = (
        torch.from_numpy(rng.random((3, 30, 30)) * s * (rng.random((3, 30, 30)) < 0.7)) for s in (5, 0.1)
    )
    a, b = line_between(rgb, sdf).double()
    moved, other = (a * rgb + b)[rgb != 0], sdf[sdf != 0]
    for sign in (-3, 3):
        low = moved.mean() + sign * moved.std(correction=0)
        torch.testing.assert_close(low, other.mean() + sign * other.std(correction=0), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("side", [56, 28])
def test_levels_are_pooled_as_in_two_dimensions(side: int) -> None:
    level = given(13, 3, side, side)
    expected = torch.nn.functional.adaptive_avg_pool2d(torch.nn.functional.avg_pool2d(level, 3, stride=1), 28)
    pool = level_pooling(side).float()
    torch.testing.assert_close(pool @ level @ pool.T, expected, atol=1e-6, rtol=0)


def surfaces(count: int) -> torch.Tensor:
    """Pieces of gently curved surfaces, normalised."""
    xy = 0.02 * given(14, count, 60, 2)
    return normalised(torch.cat([xy, 4 * xy.square().sum(dim=2, keepdim=True)], dim=2))


def test_points_are_drawn_as_far_off_as_their_neighbours_are() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        patches = surfaces(400)
        drawn = (beside(patches) - patches).numpy()
    spacing = np.sort(np.stack([cdist(p, p) for p in patches.numpy()]), axis=2)[:, :, 50]
    scale = np.sqrt((drawn**2).mean(axis=2)) / spacing
    by_patch = np.sqrt((scale**2).mean(axis=1))
    near = by_patch < 0.75
    assert 0.55 < near.mean() < 0.7
    assert by_patch[near].mean() == pytest.approx(0.5, rel=0.02)
    assert by_patch[~near].mean() == pytest.approx(1.0, rel=0.02)


def test_training_pulls_points_nearer_and_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    patches, config = surfaces(9), ShapeGuidedSettings(steps=24, batch=4, lr=5e-3, checkpoint_steps=6)
    whole, parted = new_network(TINY, 0), new_network(TINY, 0)
    losses = train_distances(whole, patches, ["a"], tmp_path / "whole", config)
    assert np.mean(losses[-6:]) < 0.8 * np.mean(losses[:6])

    class StoppedError(Exception):
        pass

    def stop_at(steps: range, _name: str, _total: int) -> object:
        for step in steps:
            if step == 15:
                raise StoppedError
            yield step

    with pytest.raises(StoppedError):
        train_distances(parted, patches, ["a"], tmp_path / "parted", config, stop_at)  # type: ignore[arg-type]
    again = new_network(TINY, 0)
    assert train_distances(again, patches, ["a"], tmp_path / "parted", config) == losses
    for key, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])


def test_the_authors_file_loads_strictly(tmp_path: Path) -> None:
    network = SdfNetwork(SdfConfig())
    path = tmp_path / "ckpt_000601.pth"
    torch.save({"sdf_model": network.state_dict(), "current_iteration": 601}, path)
    fitted, infos = load_official(tmp_path, "bagel", ShapeGuidedSettings())
    loaded = fitted.networks["sdf"].state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in network.state_dict().items())
    assert (infos["sdf"].licence, infos["sdf"].kind) == ("none: all rights reserved", "pretrained")

    state = network.state_dict()
    del state["NIF.fc43.weight_g"]
    torch.save({"sdf_model": state, "current_iteration": 601}, path)
    with pytest.raises(ArtifactError, match=r"lacks 1 \(NIF\.fc43\.weight_g\)"):
        load_official(tmp_path, "bagel", ShapeGuidedSettings())
    torch.save(network.state_dict(), path)
    with pytest.raises(ArtifactError, match="expected sdf_model and current_iteration"):
        load_official(tmp_path, "bagel", ShapeGuidedSettings())


@pytest.mark.parametrize(
    ("values", "said"), [({"patches": 5}, "11..1024, got 5"), ({"batch": 1}, "batch must")]
)
def test_settings_that_cannot_work_are_refused(values: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ShapeGuidedSettings(**values)  # type: ignore[arg-type]
