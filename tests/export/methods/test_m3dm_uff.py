"""M3DM's third bank: brute force, the authors' vector, and the way from their file (random weights here) to a map."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY_RGB, TINY_XYZ, make_tiny_detector
from m3ad.bundle import Bundle
from m3ad.errors import M3adError
from m3ad.frame_settings import Preprocessing
from m3ad.frames import find_samples, read_sample
from m3ad.preprocess import prepare
from m3ad_export.bundle_writer import write_bundle
from m3ad_export.detector import Detector
from m3ad_export.heads.bank import TokenCells
from m3ad_export.heads.three_banks import FusionBank, ThreeDistanceVote
from m3ad_export.methods.m3dm import M3dmSettings, direction, features
from m3ad_export.methods.m3dm_uff import load_official, parts_of
from m3ad_export.nets.uff import Uff
from m3ad_export.sample_data import write_sample_data
from m3ad_export.saved import load_detector
from m3ad_export.train.features import FeatureExtractor
from m3ad_export.training import Encoders, train
from m3ad_runtime.pipeline import Inspector
from scipy.spatial.distance import cdist

TOKEN = np.arange(64).reshape(8, 8).repeat(7, 0).repeat(7, 1).reshape(-1)


@pytest.mark.parametrize("rows", [3, 500, 8192 + 300])
def test_every_cell_finds_its_nearest_fused_row(rows: int) -> None:
    rng = np.random.default_rng(rows)
    bank = (rng.normal(size=(rows, 10)) + 40).astype(
        np.float32
    )  # where the expanded form loses small distances
    xyz = (rng.normal(size=(3136, 6)) + 40).astype(np.float32)
    rgb = (rng.normal(size=(64, 4)) + 40).astype(np.float32)
    xyz[:64], rgb[TOKEN[:64]] = bank[1, :6], bank[1, 6:]
    distance, index = (
        t.numpy()
        for t in FusionBank(torch.from_numpy(bank), 6, 8)(torch.from_numpy(xyz), torch.from_numpy(rgb))
    )
    fused = np.concatenate([xyz, rgb[TOKEN]], axis=1).astype(np.float64)
    expected = cdist(fused, bank.astype(np.float64))
    np.testing.assert_array_equal(index, expected.argmin(axis=1))
    np.testing.assert_allclose(distance, expected.min(axis=1), rtol=2e-3, atol=2e-5)
    assert (distance[:56] == 0).all()


def test_the_vector_is_xyz_a_tenth_of_rgb_fusion() -> None:
    vote = ThreeDistanceVote(8)
    vote.map_weights, vote.score_weights = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    xyz, rgb, fusion = torch.full((3136,), 4.0), torch.full((64,), 2.0), torch.full((3136,), 8.0)
    anomaly_map, score, maps = vote(xyz, rgb, fusion, torch.tensor([3.0, 5.0, 7.0]))
    np.testing.assert_allclose(maps, np.stack([np.full((224, 224), v) for v in (4.0, 2.0, 8.0)]), rtol=1e-5)
    expected = 0.5 * 4 + 0.3 * 0.1 * 2 + 0.2 * 8
    np.testing.assert_allclose(anomaly_map, np.full((224, 224), expected), rtol=1e-5)
    assert float(score) == pytest.approx(0.2 * 3 + 0.3 * 0.1 * 5 + 0.5 * 7)


def test_without_the_authors_file_it_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    write_sample_data(tmp_path / "data", train=2, validation=1, test_per_kind=1, size=128)
    tiny = make_tiny_detector()
    with pytest.raises(
        M3adError, match=r"UFF Module.*as the one \.pth into a folder and add --official FOLDER, or take"
    ):
        train(
            find_samples(tmp_path / "data", "train"),
            find_samples(tmp_path / "data", "validation"),
            Encoders(rgb=tiny.rgb, xyz=tiny.xyz),
            tmp_path / "detector",
            category="tiny",
            preprocessing=Preprocessing(plane="none"),
            settings=M3dmSettings(),
            method="m3dm_uff",
        )
    assert not (tmp_path / "detector").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Detector]:
    """From a file in the authors' layout with random weights of tiny widths."""
    root = tmp_path_factory.mktemp("uff")
    write_sample_data(root / "data", train=2, validation=1, test_per_kind=1, size=128)
    torch.manual_seed(0)
    (root / "official").mkdir()
    network = Uff(TINY_RGB.token_width, TINY_XYZ.token_width)
    torch.save({"model": network.state_dict(), "epoch": 2}, root / "official" / "uff.pth")
    settings = M3dmSettings(bank_fraction=0.05)
    fitted, infos = load_official(root / "official", "tiny", settings)
    fitted.record["official"] = {part: info.to_json() for part, info in infos.items()}
    tiny = make_tiny_detector()
    weights = {
        side: SimpleNamespace(to_json=lambda s=side: tiny.record["encoders"][s]["weights"])
        for side in ("rgb", "xyz")
    }
    train(
        find_samples(root / "data", "train"),
        find_samples(root / "data", "validation"),
        Encoders(tiny.rgb, weights["rgb"], tiny.xyz, weights["xyz"]),  # type: ignore[arg-type]
        root / "detector",
        category="tiny",
        preprocessing=Preprocessing(),
        settings=settings,
        method="m3dm_uff",
        fitted=fitted,
    )
    return root, load_detector(root / "detector")


def test_good_parts_fill_three_banks(trained: tuple[Path, Detector]) -> None:
    root, detector = trained
    assert detector.record["heads"] == {
        "rgb_width": TINY_RGB.token_width,
        "xyz_width": TINY_XYZ.token_width,
        "rgb_rows": 15,
        "xyz_rows": 314,
        "fusion_rows": 15,
        "rgb_side": 8,
    }
    _, uff, banks, vote = parts_of(detector)
    extract = FeatureExtractor(*detector.encoders, detector.preprocessing, root / "detector" / "features")
    frames = [features(extract(s), TokenCells()) for s in find_samples(root / "data", "train")]
    xyz = torch.cat([cells for _, cells in frames])
    whole = banks.xyz.rows + banks.xyz.mean
    torch.testing.assert_close(whole[-1], xyz.mean().expand(whole.shape[1]), atol=1e-5, rtol=1e-4)
    with torch.inference_mode():
        halves = [uff(*frame) for frame in frames]
        found = [banks(*frame, *half) for frame, half in zip(frames, halves, strict=True)]
    fused = np.concatenate([np.concatenate([x, r[TOKEN]], axis=1) for r, x in halves])
    rows = torch.cat(
        [banks.fusion.xyz_rows + banks.fusion.xyz_mean, banks.fusion.rgb_rows + banks.fusion.rgb_mean], 1
    )
    assert cdist(rows, fused).min(axis=1).max() < 1e-4  # each is a fused row of these parts
    assert float(banks.scale) == pytest.approx(float(torch.cat([rgb for rgb, _ in frames]).std()), rel=1e-6)
    scores = torch.stack([largest * torch.tensor([1, 0.1, 1]) for *_, largest in found])
    torch.testing.assert_close(vote.score_weights, direction(scores, "sgd"))


def test_a_bundle_gives_pytorchs_map_and_names_the_file(trained: tuple[Path, Detector]) -> None:
    root, detector = trained
    sample = read_sample(find_samples(root / "data", "validation")[0])
    golden = prepare(sample, detector.preprocessing)
    write_bundle(detector, golden, root / "bundle", parity_points=(1024,))
    bundle = Bundle.open(root / "bundle")
    assert bundle.manifest.score_maps == ["xyz", "rgb", "fusion"]
    assert bundle.manifest.official["uff"].name == "uff.pth"
    found = Inspector(bundle).inspect(sample)
    assert found.score == pytest.approx(
        bundle.manifest.threshold.value, rel=1e-4
    )  # its only validation frame
