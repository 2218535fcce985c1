"""`m3ad-calibrate search`: which combination of a lattice and a plan it takes, and the bundle that has both."""

import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from m3ad.bundle import Bundle
from m3ad.errors import ArtifactError, M3adError
from m3ad.frames import find_samples, read_sample
from m3ad.preprocess import prepare
from m3ad.scored import Lattice
from m3ad_calibrate import joint
from m3ad_calibrate.cli import app
from m3ad_calibrate.gate import gate
from m3ad_calibrate.joint import Combination, cheapest, search, work, write
from m3ad_calibrate.lattice_probe import LatticeProbe
from m3ad_calibrate.probe import Probe, QualityLoss
from m3ad_calibrate.quantize import Settings
from m3ad_calibrate.record import read_record, record
from m3ad_calibrate.sensitivity import Group, Searcher
from m3ad_export.graphs.plan import default_plan
from m3ad_export.sample_data import write_sample_data
from m3ad_runtime.pipeline import Inspector
from scipy import stats
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("one_thread")
DROPS = dict.fromkeys(("image_auroc", "aupro_30", "aupro_1"), 0.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "category"
    write_sample_data(folder, train=2, validation=2, test_per_kind=1, size=128)
    return folder


@pytest.fixture(scope="module")
def source(tiny_bundle: Bundle, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = shutil.copytree(tiny_bundle.path, tmp_path_factory.mktemp("bundle") / "tiny")
    record(Bundle.open(path), data, megabytes=20)
    return Bundle.open(path)


@pytest.fixture(scope="module")
def probe(source: Bundle, data: Path) -> Probe:
    return Probe(source, find_samples(data, "validation")[:1], source.manifest.layouts)


@pytest.fixture(scope="module")
def scored(source: Bundle, data: Path, probe: Probe) -> LatticeProbe:
    samples = find_samples(data, "validation")[:1]
    return LatticeProbe(source, samples, lambda changed: probe.walk("fused", changed))


@pytest.fixture(scope="module")
def searcher(source: Bundle, probe: Probe) -> Searcher:
    return Searcher(probe, read_record(source), default_plan("int8"), Settings(), budget=10)


@pytest.mark.parametrize("seed", range(20))
def test_it_takes_what_trying_everything_would_take(seed: int) -> None:
    """Any lattice with any number of promotions from the plan's own on: the same work as of the best of them all."""
    rng = np.random.default_rng(seed)
    shares = {"all": 1.0, "half": 0.5, 2: 0.25, 3: 0.11, 4: 0.06}
    lost = dict(zip(shares, [0.0, *np.sort(rng.uniform(0, 1.6, 4))], strict=True))
    parts = rng.dirichlet(np.ones(6))
    groups = [Group(str(i), "", part, part * rng.uniform() * (i % 2)) for i, part in enumerate(parts)]
    moves = [(group, step) for step in ("int8_weights", "rest") for group in groups]
    own, each = int(rng.integers(0, 5)), rng.uniform(0, 0.2)

    def loss(lattice: Lattice, promoted: int | None) -> float:
        return float(lost[lattice] + (0 if promoted is None else each * (len(moves) - promoted)))

    found = SimpleNamespace(moves=moves, promoted=own, findings=[])
    fake: Any = SimpleNamespace(
        groups=groups,
        budget=0.005,
        search=lambda _say: found,
        with_moves=lambda taken, _findings: SimpleNamespace(precision="int8", taken=len(taken)),
        changed=lambda plan: {"promoted": plan.taken},
    )
    lattices: Any = SimpleNamespace(
        share=shares.get,
        loss_of=lambda lattice, _budget, changed: QualityLoss(
            DROPS, 1.0, loss(lattice, changed.get("promoted"))
        ),
    )
    chosen = cheapest(search(fake, lattices))
    assert chosen is not None
    counts: list[int | None] = [None, *range(own, len(moves) + 1)]
    everything = [
        work(fake, cast(Any, found), promoted, shares[lattice])
        for lattice, promoted in itertools.product(shares, counts)
        if loss(lattice, promoted) <= 1
    ]
    assert chosen.work == pytest.approx(min(everything))
    assert loss(chosen.lattice, chosen.promoted) <= 1


def test_work_counts_rows_by_the_lattice_and_eight_bits_as_a_half(searcher: Searcher) -> None:
    groups = {group.name: group for group in searcher.groups}
    assert groups["RGB block 0"].row_share == 0
    assert groups["second pass"].row_share == groups["second pass"].share > 0
    moves = [(group, step) for step in ("int8_weights", "rest") for group in searcher.groups]
    found: Any = SimpleNamespace(moves=moves)
    by_rows = sum(group.row_share for group in searcher.groups)
    assert work(searcher, found, None, 1) == pytest.approx(1)
    assert work(searcher, found, 0, 1) == pytest.approx(0.5)
    assert work(searcher, found, None, 0.25) == pytest.approx(1 - 0.75 * by_rows)
    assert work(searcher, found, len(groups), 1) == pytest.approx(1.15)
    assert work(searcher, found, len(moves), 1) == pytest.approx(1)


def test_a_plan_and_a_lattice_are_judged_together(scored: LatticeProbe, searcher: Searcher) -> None:
    """Nothing changed costs nothing; a spoiled graph costs at every lattice what it costs at all pixels, or more."""
    assert scored.loss_of("all", 10).rank_correlation == 1
    plan = searcher.with_moves([])
    changed = searcher.changed(plan)
    honest = scored.loss_of(2, 10, changed).rank_correlation
    assert honest < 1
    assert honest < scored.loss_of(2, 10).rank_correlation
    # What the scores are at a lattice's pixels does not depend on the lattice.
    every, some = (scored._maps(lattice, changed) for lattice in ("all", 2))
    for one, other, frame in zip(every, some, scored.frames, strict=True):
        pixels = frame.inputs["point_pixel"]
        assert stats.spearmanr(one.ravel()[pixels], other.ravel()[pixels]).statistic > 0.95


@pytest.fixture(scope="module")
def both(
    source: Bundle, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Bundle, dict[str, Any]]:
    """What the command writes with a budget that is no limit."""
    out = tmp_path_factory.mktemp("out") / "fast"
    arguments = ["search", str(source.path), "--data", str(data), "--out", str(out)]
    result = CliRunner().invoke(
        app, [*arguments, "--frames", "1", "--budget", "10", "--lattice", "half", "--json"]
    )
    assert result.exit_code == 0 or "is not usable" in str(result.exception), result.exception
    assert (out.parent / "fast.png").read_bytes().startswith(b"\x89PNG")
    return Bundle.open(out), json.loads(result.stdout.strip())


def test_command_writes_and_records_both(
    both: tuple[Bundle, dict[str, Any]], source: Bundle, data: Path
) -> None:
    bundle, told = both
    assert bundle.preprocessing.lattice == "half"
    assert bundle.precision == "int8"
    assert told["gate"] == bundle.document["gate"]
    assert told["precision"]["type"] == "int8"
    assert (
        told["lattice"]["source_onnx"] == gate(bundle, source, find_samples(data, "test"), 10)["source_onnx"]
    )
    tried = bundle.document["search"]
    assert [t["lattice"] for t in tried] == ["half"] * len(tried)
    assert {t["precision"] for t in tried} == {None, "int8"}
    assert min(t["work"] for t in tried if t["loss"] <= 1) < min(
        t["work"] for t in tried if not t["precision"]
    )
    figures = told["gate"]["figures"]["fused"]
    assert figures["aupro_30"]["drop"] == figures["aupro_30"]["source"] - figures["aupro_30"]["quantized"]
    assert figures["largest_score_change"] > 0


def test_threshold_is_of_the_lattice_in_its_precision(
    both: tuple[Bundle, dict[str, Any]], data: Path
) -> None:
    bundle, _ = both
    inspector = Inspector(bundle)
    scores = [inspector.inspect(read_sample(s)).score for s in find_samples(data, "validation")]
    assert bundle.manifest.threshold.value == pytest.approx(max(scores), rel=1e-6)


def test_the_svm_is_of_the_lattice(both: tuple[Bundle, dict[str, Any]], data: Path) -> None:
    """Alg. 1 with one column and nu 0.5: the decision is the product less its median over what was fitted, in fp32."""
    bundle, _ = both
    found = Inspector(bundle).inspect(read_sample(find_samples(data, "train")[0]), with_maps=True)
    assert found.score_maps is not None
    product = found.score_maps[3:].prod(axis=0, dtype=np.float64) ** 0.25
    offset = product - found.anomaly_map
    assert offset.std() < 1e-3 * product.max()
    assert offset.mean() == pytest.approx(np.median(product), abs=0.05 * product.max())


def test_a_combination_holds_against_either_of_its_sources(
    both: tuple[Bundle, dict[str, Any]], source: Bundle, tiny_bundle: Bundle, data: Path
) -> None:
    bundle, _ = both
    other = Bundle.of_document(bundle.path, {**bundle.document, "lattice": None})
    with pytest.raises(ArtifactError, match="was not made from"):
        gate(other, source, find_samples(data, "test"))
    assert gate(bundle, tiny_bundle, find_samples(data, "test"), 10)["frames"] > 0


def test_what_saves_nothing_is_not_written(source: Bundle, tmp_path: Path) -> None:
    alone = Combination("all", None, None, 1.0, 1.0, QualityLoss(DROPS, 1.0, 0.0))
    out = tmp_path / "out"
    with pytest.raises(M3adError, match="no lattice and no plan within the budget is cheaper"):
        write(source, out, alone, {}, Settings(), None, [], [], [])
    assert not out.exists()
    assert joint.report([alone])[0]["precision"] is None


def test_one_of_both_is_written_alone(source: Bundle, data: Path, tmp_path: Path, searcher: Searcher) -> None:
    good = {split: find_samples(data, split) for split in ("train", "validation")}
    quality = QualityLoss(DROPS, 1.0, 0.0)
    plan = searcher.with_moves([])
    feeds, settings = read_record(source), Settings()
    for chosen, lattice, precision in (
        (Combination("half", None, None, 0.5, 0.6, quality), "half", "fp32"),
        (Combination("all", plan, 0, 1.0, 0.5, quality), "all", "int8"),
    ):
        out = tmp_path / precision
        written = write(source, out, chosen, feeds, settings, None, good["train"], good["validation"], [])
        assert written.preprocessing.lattice == lattice
        assert written.precision == precision
        frame = prepare(read_sample(good["train"][0]), written.preprocessing)
        assert Inspector(written).inspect_prepared(frame).score == pytest.approx(
            Inspector(written, "chain").inspect_prepared(frame).score, rel=0.05
        )


def test_a_source_that_has_a_lattice_is_refused_before_the_search(
    both: tuple[Bundle, dict[str, Any]], data: Path, tmp_path: Path
) -> None:
    result = CliRunner().invoke(
        app, ["search", str(both[0].path), "--data", str(data), "--out", str(tmp_path / "o")]
    )
    assert isinstance(result.exception, ArtifactError)
    assert "is quantized; give the bundle it was made from a lattice first" in str(result.exception)
    assert not (tmp_path / "o").exists()
