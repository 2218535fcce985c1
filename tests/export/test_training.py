from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_RGB, TINY_XYZ
from m3ad.errors import ArtifactError, FrameError, M3adError
from m3ad.frame_settings import Preprocessing
from m3ad.frames import Sample, find_samples, read_sample
from m3ad.preprocess import prepare, without_modality
from m3ad_export.cli import app
from m3ad_export.detector import Detector
from m3ad_export.heads.mentor import HeadConfig, Mfm
from m3ad_export.methods.mentor3ad import METHOD, MentorSettings, fused_head
from m3ad_export.sample_data import write_sample_data
from m3ad_export.saved import load_detector
from m3ad_export.torch_stages import stage_functions
from m3ad_export.train.features import FeatureExtractor, frame_scores
from m3ad_export.train.losses import Fusion, info_nce
from m3ad_export.train.samples import draw_pool
from m3ad_export.training import Encoders, refit, train
from m3ad_export.weights import load_rgb_encoder, load_xyz_encoder
from m3ad_runtime.pipeline import Pipeline, model_arrays
from typer.testing import CliRunner

CONFIG = MentorSettings(
    mentor_width=16,
    pool_rows=1200,
    align_steps=12,
    align_rows=32,
    guide_steps=12,
    guide_rows=32,
    svm_frames=1,
    baseline_frames=2,
    checkpoint_steps=4,
)
HEADS = HeadConfig(
    rgb_width=TINY_RGB.token_width, xyz_width=TINY_XYZ.token_width, mentor_width=CONFIG.mentor_width
)


pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class Category:
    root: Path
    encoders: Encoders

    def samples(self, split: str) -> list[Sample]:
        return find_samples(self.root, split)

    def train(self, folder: Path, **settings: Any) -> Detector:
        fixed = {"category": "tiny", "preprocessing": Preprocessing(), "settings": CONFIG}
        return train(
            self.samples("train"),
            self.samples("validation"),
            self.encoders,
            folder,
            **{**fixed, **settings},
        )


@pytest.fixture(scope="session")
def category(tmp_path_factory: pytest.TempPathFactory) -> Category:
    root = tmp_path_factory.mktemp("data") / "tiny"
    write_sample_data(root, train=2, validation=1, test_per_kind=1, size=224)
    encoders = Encoders(*load_rgb_encoder(TINY_RGB, None), *load_xyz_encoder(TINY_XYZ, None))
    return Category(root, encoders)


@pytest.fixture(scope="session")
def trained(category: Category, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Detector]:
    folder = tmp_path_factory.mktemp("trained")
    return folder, category.train(folder)


class Interrupted(Exception):  # noqa: N818  (the power cut, not an error)
    pass


def interrupt_after(counts: dict[str, int]) -> Any:
    """Progress that stops the run when a stage has made so many steps."""

    def track(items: Iterable[Any], description: str, _total: int) -> Iterator[Any]:
        for i, item in enumerate(items):
            if i == counts.get(description):
                raise Interrupted
            yield item

    return track


def assert_same(first: Detector, second: Detector) -> None:
    assert first.record == second.record
    for name, network in first.modules().items():
        other = second.modules()[name].state_dict()
        assert all(torch.equal(v, other[k]) for k, v in network.state_dict().items()), name


@pytest.mark.parametrize("stop", [{"align": 6}, {"guide": 9}, {"threshold": 0}])
def test_an_interrupted_run_ends_with_the_identical_detector(
    stop: dict[str, int], category: Category, trained: tuple[Path, Detector], tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        category.train(tmp_path, track=interrupt_after(stop))
    assert not (tmp_path / "detector.pt").exists()
    seen: dict[str, int] = {}

    def count(items: Iterable[Any], description: str, total: int) -> Iterable[Any]:
        seen[description] = total
        return items

    assert_same(category.train(tmp_path, track=count), trained[1])
    assert seen["align"] == (
        8 if "align" in stop else 0
    )  # it went on from step 4, the last checkpoint before 6


def test_other_settings_do_not_continue_this_run(
    category: Category, trained: tuple[Path, Detector], tmp_path: Path
) -> None:
    category.train(tmp_path, settings=replace(CONFIG, temperature=0.5))
    assert_same(category.train(tmp_path), trained[1])
    other = category.train(tmp_path, settings=replace(CONFIG, seed=1))
    assert not torch.equal(
        other.networks["mfm"].fusion.first.weight, trained[1].networks["mfm"].fusion.first.weight
    )


def test_a_trained_detector_loads_back(trained: tuple[Path, Detector]) -> None:
    folder, detector = trained
    loaded = load_detector(folder)
    for name, network in detector.modules().items():
        assert not loaded.modules()[name].training
        other = loaded.modules()[name].state_dict()
        assert all(torch.equal(v, other[k]) for k, v in network.state_dict().items())
    assert loaded.record["threshold"]["value"] == max(loaded.record["threshold"]["validation_scores"])
    assert loaded.record["encoders"]["rgb"]["weights"]["kind"] == "random"
    assert (folder / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_the_vote_alone_can_be_fitted_anew(
    category: Category, trained: tuple[Path, Detector], tmp_path: Path
) -> None:
    """On the same frames it is the same vote; on masked ones every later frame is masked, too."""
    splits = category.samples("train"), category.samples("validation")
    same = refit(trained[1], *splits, tmp_path / "same")
    assert same.record["threshold"] == trained[1].record["threshold"]
    loaded = load_detector(tmp_path / "same")
    assert torch.equal(loaded.networks["vm"].baseline, trained[1].networks["vm"].baseline)
    blind = refit(trained[1], *splits, tmp_path / "blind", without="rgb", settings={"baseline_frames": "1"})
    assert not torch.equal(blind.networks["vm"].baseline, trained[1].networks["vm"].baseline)
    settings = Preprocessing.from_json(blind.record["preprocessing"])
    assert settings.without == "rgb"
    pipeline = Pipeline(blind.contract.steps("chain"), stage_functions(blind))
    frame = without_modality(read_sample(splits[1][0]), "rgb")
    values, _ = pipeline.run(model_arrays(prepare(frame, Preprocessing())))
    assert blind.record["threshold"]["value"] == pytest.approx(float(values["score"][0]), abs=1e-5)
    assert trained[1].record["preprocessing"]["without"] is None
    with pytest.raises(M3adError, match="holds a detector already; name another folder for the refitted one"):
        refit(trained[1], *splits, tmp_path / "blind")
    planar = replace(
        trained[1],
        record={**trained[1].record, "preprocessing": Preprocessing(plane="ransac").to_json()},
    )
    with pytest.raises(M3adError, match="flat has no plane to remove; train a detector with --plane none"):
        refit(planar, *splits, tmp_path / "none", without="xyz")
    with pytest.raises(FrameError, match="the validation split holds 0 frames"):
        refit(trained[1], splits[0], [], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_command_fits_the_vote_of_a_masked_line(
    category: Category, trained: tuple[Path, Detector], tmp_path: Path
) -> None:
    arguments = ["vote", str(trained[0]), str(tmp_path / "out"), "--data", str(category.root)]
    refused = CliRunner().invoke(app, [*arguments, "--without", "depth"])
    assert refused.exit_code == 2
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(app, [*arguments, "--without", "xyz"])
    assert done.exit_code == 0, done.output
    record = load_detector(tmp_path / "out").record
    assert record["preprocessing"]["without"] == "xyz"
    assert record["training"]["baseline_frames"] == CONFIG.baseline_frames
    assert f"threshold {record['threshold']['value']:.6g}, xyz masked out" in done.stdout
    again = CliRunner().invoke(app, arguments)
    assert isinstance(again.exception, M3adError)


def test_a_folder_without_a_detector_is_refused(trained: tuple[Path, Detector], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no detector of this version"):
        load_detector(tmp_path)
    for text in (
        '{"method": "mentor3ad", "encoders": []}',
        '{"method": "mentor3ad", "encoders": {"rgb": 1}}',
        "[]",
    ):
        (tmp_path / "detector.json").write_text(text)
        with pytest.raises(ArtifactError, match="holds no detector of this version"):
            load_detector(tmp_path)
    (tmp_path / "detector.json").write_text("[" * 100_000)
    with pytest.raises(ArtifactError, match=r"is not valid JSON .* Train one: m3ad-export train"):
        load_detector(tmp_path)
    (tmp_path / "detector.json").write_bytes((trained[0] / "detector.json").read_bytes())
    with pytest.raises(ArtifactError, match="no weights file at"):
        load_detector(tmp_path)
    torch.save({"mfm": trained[1].networks["mfm"].state_dict()}, tmp_path / "detector.pt")
    with pytest.raises(ArtifactError, match="not a checkpoint of VisionTransformer"):
        load_detector(tmp_path)


def test_only_good_frames_train(category: Category, tmp_path: Path) -> None:
    good = category.samples("validation")
    fixed: dict[str, Any] = {"category": "tiny", "preprocessing": Preprocessing(), "settings": CONFIG}
    with pytest.raises(FrameError, match=r"the training split holds 4 frames, 3 of them defective"):
        train(category.samples("test"), good, category.encoders, tmp_path, **fixed)
    with pytest.raises(FrameError, match="the validation split holds 0 frames"):
        train(good, [], category.encoders, tmp_path, **fixed)


def extractor(category: Category, cache: Path, **changed: Any) -> FeatureExtractor:
    encoders = category.encoders
    parts = {"rgb": encoders.rgb, "xyz": encoders.xyz, "preprocessing": Preprocessing(), **changed}
    return FeatureExtractor(**parts, cache=cache)


def test_maps_from_cached_features_are_those_of_the_pipeline(
    category: Category, trained: tuple[Path, Detector], tmp_path: Path
) -> None:
    sample, detector = category.samples("test")[0], trained[1]
    pipeline = Pipeline(detector.contract.steps("chain"), stage_functions(detector))
    values, _ = pipeline.run(model_arrays(prepare(read_sample(sample), Preprocessing())))
    head = fused_head(detector.networks)
    extract = extractor(category, tmp_path)
    for frame in (extract(sample), extract(sample)):  # encoded, then read back
        with torch.inference_mode():
            maps = detector.networks["vm"].score_maps(*frame_scores(frame, head, METHOD.pairs))
        np.testing.assert_allclose(maps, values["score_maps"], atol=1e-5)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_cache_entry_serves_only_what_made_it(category: Category, tmp_path: Path) -> None:
    first, second = category.samples("train")
    extract = extractor(category, tmp_path)
    other_weights, _ = load_rgb_encoder(TINY_RGB, None, seed=9)
    names = {
        extract.key(first),
        extract.key(second),
        extractor(category, tmp_path, rgb=other_weights).key(first),
        extractor(category, tmp_path, preprocessing=Preprocessing(plane="ransac")).key(first),
        extract.key(replace(first, xyz_path=second.xyz_path)),
    }
    assert len(names) == 5
    assert extractor(category, tmp_path / "b").key(first) in names


def test_a_damaged_cache_entry_is_made_again(category: Category, tmp_path: Path) -> None:
    (sample,) = category.samples("validation")
    extract = extractor(category, tmp_path)
    tokens = extract(sample).xyz_tokens
    path = tmp_path / f"{extract.key(sample)}.npz"
    whole = path.read_bytes()
    for damaged in (b"", whole[:1000], whole[:5000] + b"\0" * 64 + whole[5064:]):
        path.write_bytes(damaged)
        np.testing.assert_array_equal(extract(sample).xyz_tokens, tokens)
        assert path.stat().st_size == len(whole)


def test_pool_rows_stay_paired_by_pixel(category: Category, tmp_path: Path) -> None:
    extract = extractor(category, tmp_path)
    samples = category.samples("train")
    rgb, xyz = draw_pool(
        samples, extract, CONFIG.pool_rows, CONFIG.seed, lambda items, _description, _total: items
    )
    assert rgb.shape == (1200, TINY_RGB.token_width)
    for i, sample in enumerate(samples):
        frame = extract(sample)
        every = torch.cat([torch.cat([*pair.values()], dim=1) for pair in frame.chunks()])
        paired = torch.cat([rgb, xyz], dim=1)[600 * i : 600 * (i + 1)]
        distance = torch.cdist(paired.double(), every.double())
        assert distance.min(dim=1).values.max() < 1e-4


def test_info_nce_is_the_mean_cross_entropy_both_ways() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 20, 8))
    cosine = (a / np.linalg.norm(a, axis=1)[:, None]) @ (b / np.linalg.norm(b, axis=1)[:, None]).T
    odds = np.exp(cosine / 0.1)
    ways = [-np.log(np.diag(odds) / odds.sum(axis=axis)).mean() for axis in (1, 0)]
    found = info_nce(torch.from_numpy(a), torch.from_numpy(b), 0.1)
    assert found.item() == pytest.approx(np.mean(ways), rel=1e-6)


@pytest.mark.parametrize("fusion", ["frozen", "aligned"])
def test_the_outer_mlp_is_trained_only_when_asked(fusion: Fusion, category: Category, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(CONFIG.seed)
        untrained = Mfm(HEADS)
    mfm = category.train(tmp_path, settings=replace(CONFIG, fusion=fusion)).networks["mfm"]
    before, after = untrained.state_dict(), mfm.state_dict()
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"rgb_branch", "xyz_branch"} | ({"fusion"} if fusion == "aligned" else set())


def test_both_losses_fall(category: Category, tmp_path: Path) -> None:
    longer = replace(CONFIG, align_steps=60, guide_steps=60, checkpoint_steps=60)
    category.train(tmp_path, settings=longer)
    for stage, expected in (("align", np.log(32)), ("guide", 1.0)):
        losses = torch.load(tmp_path / "checkpoints" / f"{stage}.pt", weights_only=True)["losses"]
        assert len(losses) == 60
        assert np.mean(losses[-10:]) < 0.9 * min(expected, np.mean(losses[:5]))
