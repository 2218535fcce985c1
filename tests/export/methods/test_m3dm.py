"""M3DM's parts against brute force, SciPy and scikit-learn; its published constants; one part fills a bank."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import TINY_RGB, TINY_XYZ, make_input, make_tiny_detector
from m3ad.contract import Dims
from m3ad.errors import ArtifactError
from m3ad.frame_settings import Preprocessing
from m3ad.frames import find_samples
from m3ad.methods.m3dm import METHOD
from m3ad_export.graphs.compose import cells_model
from m3ad_export.graphs.verify import verify_not_frozen
from m3ad_export.heads.bank import Bank, DistanceVote, TokenCells, TwoBanks, cell_pooling
from m3ad_export.method import Job
from m3ad_export.methods.m3dm import M3dmSettings, build, direction, features, fit
from m3ad_export.sample_data import write_sample_data
from m3ad_export.train.coreset import coreset
from m3ad_export.train.features import FeatureExtractor
from m3ad_plugins import ops
from m3ad_plugins.token_interpolate.reference import nearest_three
from m3ad_runtime.banks import Cells
from scipy.ndimage import uniform_filter1d
from scipy.spatial.distance import cdist
from sklearn.linear_model import SGDOneClassSVM


def test_cells_are_windows_of_four_or_five_averages() -> None:
    """Taps (1,2,3,3,2,1)/12 on 6 inputs, or (1,2,3,3,3,2,1)/15 on 7."""
    matrix = cell_pooling().numpy()
    averaged = uniform_filter1d(np.eye(224), 3, axis=0)[1:-1]
    for o, row in enumerate(matrix):
        start, stop = o * 222 // 56, -(-(o + 1) * 222 // 56)
        np.testing.assert_allclose(row, averaged[start:stop].mean(axis=0), atol=1e-12)
        taps = row[row > 0]
        scale, expected = {6: (12, (1, 2, 3, 3, 2, 1)), 7: (15, (1, 2, 3, 3, 3, 2, 1))}[len(taps)]
        np.testing.assert_allclose(taps * scale, expected, atol=1e-9)


def flat_grid() -> tuple[np.ndarray, np.ndarray]:
    """40 x 40 points of a plane whose distances are exact, so that most points have several nearest centres."""
    rows, columns = np.divmod(np.arange(40 * 40), 40)
    points = np.stack([columns / 1024, rows / 1024, np.full(rows.size, 0.5)], axis=1).astype(np.float32)
    return points, ((rows + 60) * 224 + columns + 70).astype(np.int32)


@pytest.mark.parametrize("cloud", ["part", "flat grid"])
def test_cells_are_interpolated_tokens_pooled(cloud: str) -> None:
    """In PyTorch, by the op on a CPU, and by the graph that engines are built from."""
    frame = make_input(1500)
    points, pixel = flat_grid() if cloud == "flat grid" else (frame.points, frame.point_pixel)
    rng = np.random.default_rng(0)
    idx, *_ = ops.point_group(points, 64, 16, 0.0, pixel)
    tokens = rng.normal(size=(64, 5)).astype(np.float32)
    nearest, weights = nearest_three(points, points[idx])
    grid = np.zeros((224 * 224, 5))
    grid[pixel] = (tokens[nearest] * weights[..., None]).sum(axis=1)
    pool = cell_pooling().numpy()
    expected = np.einsum("ay,bx,yxd->abd", pool, pool, grid.reshape(224, 224, 5), optimize=True).reshape(
        -1, 5
    )
    inputs = (tokens, points[idx], points, pixel)
    found = TokenCells()(*map(torch.from_numpy, inputs)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    feeds = dict(zip(["xyz_tokens", "centers", "points", "point_pixel"], inputs, strict=True))
    on_a_cpu = Cells(56)(feeds)["xyz_cells"]
    np.testing.assert_allclose(on_a_cpu, expected, atol=1e-5)
    np.testing.assert_allclose(on_a_cpu, found, atol=1e-6)  # as before the op did it, to rounding
    np.testing.assert_array_equal(np.any(on_a_cpu != 0, axis=1), np.any(found != 0, axis=1))
    stage = METHOD.stages(Dims(groups=64, xyz_width=5))["cells"]
    graph = cells_model(stage, METHOD.cpu["cells"])
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    np.testing.assert_allclose(session.run(None, feeds)[0], expected, atol=1e-5)


def test_the_graph_of_cells_is_the_op_asked_for_every_cell(tmp_path: Path) -> None:
    """Background too: the number of cells is fixed, so no shape of an engine depends on the frame but N."""
    path = tmp_path / "cells.onnx"
    onnx.save(cells_model(METHOD.stages(Dims())["cells"], METHOD.cpu["cells"]), path)
    verify_not_frozen(path)
    graph = onnx.load(path).graph
    (node,) = graph.node
    given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert (node.op_type, given["image_size"], given["output_size"]) == ("TokenInterpolate", 224, 56)
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(graph.initializer[0]), np.arange(3136))
    frozen = onnx.load(path)
    frozen.graph.node[0].input[0] = "every_cell"
    onnx.save(frozen, path)
    with pytest.raises(ArtifactError, match=r"\(points, TokenInterpolate's points does not depend"):
        verify_not_frozen(path)


@pytest.mark.parametrize("rows", [3, 500, 8192 + 700])
def test_every_query_finds_its_nearest_row(rows: int) -> None:
    rng = np.random.default_rng(rows)
    # far from the origin, where the expanded form alone loses the small distances
    bank = (rng.normal(size=(rows, 24)) + 40).astype(np.float32)
    near = bank[rng.integers(rows, size=200)] + rng.normal(scale=1e-3, size=(200, 24))
    queries = np.concatenate([near, rng.normal(size=(200, 24)) + 40, bank[:3]]).astype(np.float32)
    distance, index = (t.numpy() for t in Bank(torch.from_numpy(bank))(torch.from_numpy(queries)))
    expected = cdist(queries.astype(np.float64), bank.astype(np.float64))
    np.testing.assert_array_equal(index, expected.argmin(axis=1))
    np.testing.assert_allclose(distance, expected.min(axis=1), rtol=2e-3, atol=2e-5)
    assert (distance[-3:] == 0).all()


def test_a_tie_goes_to_the_lowest_row() -> None:
    rows = torch.tensor([[9.0, 0], [1, 0], [0, 1], [1, 0], [-1, 0]])
    _, index = Bank(rows)(torch.tensor([[0.0, 0], [1, 0]]))
    assert index.tolist() == [1, 1]


def test_image_scores_are_weighed_by_neighbours() -> None:
    rng = np.random.default_rng(1)
    rgb, xyz = rng.normal(size=(40, 6)), rng.normal(size=(60, 8))
    banks = TwoBanks(*(Bank(torch.from_numpy(b).float()) for b in (rgb, xyz)))
    banks.scale = torch.tensor(0.37)
    queries = rng.normal(size=(9, 6)), rng.normal(size=(11, 8))
    for bank in (banks.rgb, banks.xyz):
        bank.find_neighbors()
    *distances, scores = banks(*(torch.from_numpy(q).float() for q in queries))
    for k, (bank, query) in enumerate(zip((rgb, xyz), queries, strict=True)):
        distance = cdist(query, bank) / 0.37
        np.testing.assert_allclose(distances[k], distance.min(axis=1), rtol=1e-5)
        worst = distance.min(axis=1).argmax()
        nearest = distance[worst].argmin()
        largest = distance[worst, nearest] / 1000
        others = np.sort(cdist(bank[nearest : nearest + 1], bank)[0])[1:3]
        picked = np.flatnonzero(np.isin(cdist(bank[nearest : nearest + 1], bank)[0], others))
        to_others = np.linalg.norm(query[worst] - bank[picked], axis=1) / 0.37 / 1000
        root = np.sqrt(bank.shape[1])
        weight = 1 - np.exp(largest / root) / np.exp(to_others / root).sum()
        assert float(scores[k]) == pytest.approx(weight * largest, rel=1e-4)
        assert weight == pytest.approx(0.5, abs=1e-2)


def test_the_coreset_is_greedy_farthest_points() -> None:
    rows = np.random.default_rng(2).normal(size=(300, 7)).astype(np.float32)
    chosen, closest = [0], np.full(300, np.inf)
    for _ in range(29):
        closest = np.minimum(closest, ((rows.astype(np.float64) - rows[chosen[-1]]) ** 2).sum(axis=1))
        chosen.append(int(closest.argmax()))
    assert coreset(torch.from_numpy(rows), 30, seed=0).tolist() == chosen
    equal = coreset(torch.ones(6, 3), 6, seed=0)
    assert sorted(equal.tolist()) == [*range(6)]
    with pytest.raises(ValueError, match=r"count must lie in 1\.\.6, got 7"):
        coreset(torch.ones(6, 3), 7, seed=0)


def test_wide_features_are_projected_by_their_seed() -> None:
    rows = torch.randn(300, 600, generator=torch.Generator().manual_seed(0))
    first, again, other = (coreset(rows, 20, seed=seed) for seed in (4, 4, 5))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_decision_is_sklearns_without_its_offset() -> None:
    rows = torch.rand(400, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.2, 1.0])
    solver = SGDOneClassSVM(nu=0.5, max_iter=1000, random_state=42).fit(rows.double().numpy())
    expected = solver.score_samples(rows.double().numpy())
    found = rows @ direction(rows, "sgd")
    np.testing.assert_allclose(found / found.max(), expected / expected.max(), atol=1e-6)
    exact = direction(rows, "exact")
    assert float(exact.sum()) == pytest.approx(1)
    assert float(torch.cosine_similarity(exact, direction(rows, "sgd"), dim=0)) > 0.99


def test_the_map_adds_both_distances_up() -> None:
    vote = DistanceVote(8)
    vote.map_weights = torch.tensor([0.25, 0.75])
    vote.score_weights = torch.tensor([0.5, 0.5])
    anomaly_map, score, maps = vote(
        torch.full((64,), 2.0), torch.full((3136,), 4.0), torch.tensor([3.0, 5.0])
    )
    np.testing.assert_allclose(maps, np.stack([np.full((224, 224), v) for v in (2.0, 4.0)]), rtol=1e-5)
    np.testing.assert_allclose(anomaly_map, np.full((224, 224), 0.25 * 0.1 * 2 + 0.75 * 4), rtol=1e-5)
    assert float(score) == pytest.approx(0.5 * 0.1 * 3 + 0.5 * 5)


def test_one_part_fills_the_banks(tmp_path: Path) -> None:
    write_sample_data(tmp_path / "data", train=1, validation=1, test_per_kind=1, size=128)
    detector = make_tiny_detector()
    extract = FeatureExtractor(detector.rgb, detector.xyz, Preprocessing(), tmp_path / "cache")
    samples = find_samples(tmp_path / "data", "train")
    job = Job(samples, extract, tmp_path, M3dmSettings(), lambda x, *_: x, samples)
    fitted = fit(job)
    sizes = fitted.record["heads"]
    assert sizes == {
        "rgb_width": TINY_RGB.token_width,
        "xyz_width": TINY_XYZ.token_width,
        "rgb_rows": 31,
        "xyz_rows": 313,
        "rgb_side": TINY_RGB.side,
    }
    for name, network in build(fitted.record).items():
        network.load_state_dict(fitted.networks[name].state_dict())
    rgb, xyz = features(extract(samples[0]), TokenCells())
    rgb_distance, xyz_distance, _ = fitted.networks["bank"](rgb, xyz)
    assert (rgb_distance == 0).sum() >= 31  # the rows that are in the bank
    assert (xyz_distance == 0).sum() >= 313


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bank_fraction": 1.5}, r"bank_fraction must lie in 0\.\.1"),
        ({"decision": "rbf"}, "decision must be sgd or exact"),
        ({"svm_frames": 0}, "svm_frames must be at least 1"),
    ],
)
def test_settings_out_of_range(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        M3dmSettings(**settings)
