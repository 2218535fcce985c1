"""Learning from what people said of a station's parts, held against scores, splits and fits computed here."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import Result
from m3ad.bundle import MANIFEST, Bundle, sha256_of
from m3ad.errors import ArtifactError, FrameError, M3adError
from m3ad.ledger import Ledger, Part, Said
from m3ad.preprocess import prepare
from m3ad_calibrate.cli import app
from m3ad_client.station.config import read_config
from m3ad_client.station.station import Station
from m3ad_runtime.pipeline import Inspector, Pipeline, model_arrays
from onnx import numpy_helper
from scipy import ndimage, stats
from serving import make_frame, write_frame
from typer.testing import CliRunner

COUNT = 10
STATION = """
[station]
folder = "station"

[[camera]]
name = "left"
folder = "left"
settle_s = 0.02
threads = 1
bundle = "bundle"
"""


def judge(root: Path) -> None:
    """Judge what lies in the camera's folder by `root`/bundle."""
    station = Station(read_config(root / "station.toml"), lambda _: None)
    try:
        station.once()
    finally:
        station.close()


@pytest.fixture(scope="module")
def shift(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle, a station over it and ten judged parts, nobody has said anything of; tests copy it."""
    root = tmp_path_factory.mktemp("shift")
    shutil.copytree(tiny_bundle.path, root / "bundle")
    exponents = [[1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]]
    Bundle.open(root / "bundle").update(
        voting={"exponents": exponents, "svm_input": "product"}, threshold={"value": 0.0}
    )
    (root / "station.toml").write_text(STATION)
    for seed in range(COUNT):
        write_frame(root / "left", f"{seed:03}", make_frame(seed))
    judge(root)
    return root


@pytest.fixture
def root(shift: Path, tmp_path: Path) -> Path:
    shutil.copytree(shift, tmp_path / "line")
    return tmp_path / "line"


@pytest.fixture
def ledger(root: Path) -> Iterator[Ledger]:
    with Ledger(root / "station" / "ledger.sqlite") as opened:
        yield opened


def review(ledger: Ledger, defects: tuple[int, ...] = (9, 10)) -> list[Part]:
    """Everything is called good but the named ones; one of those was first called good."""
    for part in ledger.parts():
        said: Said = "defect" if part.id in defects else "good"
        ledger.say(part.id, "good", "ann")
        ledger.say(part.id, said, "bob")
    return ledger.parts()


def run(root: Path, *more: object) -> Result:
    arguments = ["refit", root / "bundle", "--reviewed", root / "station" / "ledger.sqlite", *more]
    return CliRunner().invoke(app, [str(a) for a in arguments])


def done(root: Path, *more: object) -> dict[str, Any]:
    result = run(root, *more, "--json")
    assert result.exit_code == 0, result.exception
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def numbers(parts: list[dict[str, Any]]) -> list[int]:
    return [part["part"] for part in parts]


def test_threshold_of_good_parts_judged_by_others(root: Path, ledger: Ledger) -> None:
    parts = review(ledger)
    before = sha256_of(root / "bundle" / MANIFEST)
    report = done(root, "--seed", 3)
    good = [part for part in parts if part.said == "good"]
    held = sorted(np.random.default_rng(3).permutation(8)[:3])  # a third of eight, rounded
    want = [part for i, part in enumerate(good) if i not in held]
    out, seen = [good[i] for i in held], {part.id: float(part.score or 0) for part in parts}
    assert numbers(report["fitted_to"]) == [part.id for part in want]
    assert numbers(report["held_out"]) == [part.id for part in out]
    limit = max(seen[part.id] for part in want)
    for side, value in (("before", 0.0), ("after", limit)):
        for name, count, of in (
            ("false_alarms", sum(seen[part.id] > value for part in out), 3),
            ("misses", sum(seen[number] <= value for number in (9, 10)), 2),
        ):
            exact = stats.binomtest(count, of).proportion_ci(0.95, method="exact")
            found = report[side][name]
            assert (found["count"], found["of"]) == (count, of)
            assert (found["low"], found["high"]) == pytest.approx((exact.low, exact.high))
    written = Bundle.open(root / "bundle-refit")
    assert written.manifest.threshold.value == limit
    assert written.document["refit"] == report
    assert written.manifest.files == Bundle.open(root / "bundle").manifest.files
    assert written.document["reference"]["frames"] == 5
    assert sha256_of(root / "bundle" / MANIFEST) == before
    assert json.loads((root / "bundle-refit.refit.json").read_text()) == report
    page = (root / "bundle-refit.refit.md").read_text()
    assert "| good parts called defects | " in page
    assert "not of all that the line makes" in page


def test_nothing_is_learned_from_defects_or_what_is_disputed(root: Path, ledger: Ledger) -> None:
    parts = review(ledger, defects=(10,))
    highest = max(parts, key=lambda part: part.score or 0)
    ledger.say(highest.id, "defect", "ann")
    # The content of one part came again by another name, and somebody called that a defect.
    twin = next(part for part in parts if part.id not in (highest.id, 10))
    with ledger.transaction() as db:
        columns = [name for name in Part.__dataclass_fields__ if name not in ("id", "name", "said")]
        names = ", ".join(columns)
        db.execute(
            f"INSERT INTO part (name, said, {names}) SELECT 'again', 'defect', {names} FROM part WHERE id = ?",
            (twin.id,),
        )
    report = done(root)
    assert {highest.id, 10, twin.id}.isdisjoint(numbers([*report["fitted_to"], *report["held_out"]]))
    assert report["after"]["reject"] < (highest.score or 0)
    assert any("1 contents were called good and defect" in note for note in report["notes"])


@pytest.mark.slow
def test_the_svm_is_that_of_the_reviewed_parts(root: Path, ledger: Ledger) -> None:
    parts = review(ledger)
    report = done(root, "--what", "svm")
    fitted = [part for part in parts if part.id in numbers(report["fitted_to"])]
    assert len(fitted) == 5
    learners = fitted[::2]  # the others set the limit
    inspector = Inspector(Bundle.open(root / "bundle"), threads=1)
    rows = []
    for part in learners:
        maps = inspector.inspect(make_frame(int(part.name)), with_maps=True).score_maps
        assert maps is not None
        rows.append((maps[3:].astype(np.float64) ** 0.25).prod(axis=0).ravel())
    new = Bundle.open(root / "bundle-refit")
    model = onnx.load(new.path / "onnx" / "head_vote.onnx")
    (rho,) = (numpy_helper.to_array(t) for t in model.graph.initializer if t.name == "svm.rho")
    assert float(rho[0]) == pytest.approx(np.quantile(np.concatenate(rows), 0.5), rel=1e-4)
    again = Inspector(new, threads=1)
    scores = [again.inspect(make_frame(int(part.name))).score for part in fitted if part not in learners]
    assert new.manifest.threshold.value == pytest.approx(max(scores), abs=1e-6)
    assert new.manifest.threshold.review is None


def smoothed(values: np.ndarray) -> np.ndarray:
    for side, times in ((5, 5), (7, 3)):
        for _ in range(times):
            values = ndimage.uniform_filter(values, side, mode="constant")
    return values


@pytest.mark.slow
def test_the_baseline_is_what_reviewed_parts_show_at_each_pixel(root: Path, ledger: Ledger) -> None:
    parts = review(ledger)
    report = done(root, "--what", "baseline")
    assert report["what"] == ["baseline", "svm", "threshold"]
    fitted = [part for part in parts if part.id in numbers(report["fitted_to"])]
    chain = Inspector(Bundle.open(root / "bundle"), "chain", threads=1)
    assert isinstance(chain.pipeline, Pipeline)
    total = np.zeros((4, 224, 224))
    learners = fitted[::2]
    for part in learners:
        prepared = prepare(make_frame(int(part.name)), chain.preprocessing)
        values = chain.pipeline.run(model_arrays(prepared), keep_all=True)[0]
        for k, name in enumerate(("rgb", "xyz", "mentor")):
            a, b = (
                values[key].astype(np.float64)
                for key in (f"{name}_features" if name != "mentor" else "mentor", f"{name}_reconstructed")
            )
            cosine = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
            grid = np.zeros(224 * 224)
            grid[prepared.scored_pixel] = 1 - cosine
            total[k] += smoothed(grid.reshape(224, 224))
        ones = np.zeros(224 * 224)
        ones[prepared.scored_pixel] = 1
        total[3] += smoothed(ones.reshape(224, 224))
    mean = total[:3] / np.maximum(total[3], 1e-3)
    covered = total[3] > len(learners) / 2
    # torch's median of an even number is the lower of both in the middle
    median = np.array([np.sort(m[covered])[(covered.sum() - 1) // 2] for m in mean])
    want = mean.reshape(3, -1) + 0.25 * median[:, None]
    new = Bundle.open(root / "bundle-refit")
    for file, name in (("vm", "baseline"), ("head_vote", "vm.baseline")):
        model = onnx.load(new.path / "onnx" / f"{file}.onnx")
        (found,) = (numpy_helper.to_array(t) for t in model.graph.initializer if t.name == name)
        np.testing.assert_allclose(found[:, covered.ravel()], want[:, covered.ravel()], rtol=2e-3)
    frame = make_frame(int(fitted[1].name))
    maps = [Inspector(new, layout, threads=1).inspect(frame).anomaly_map for layout in ("chain", "fused")]
    np.testing.assert_allclose(*maps, atol=1e-3)


def test_what_cannot_be_refitted_is_said(root: Path, ledger: Ledger) -> None:
    result = run(root)
    assert "has no reviewed part; review some on the station's page" in str(result.exception)
    for number in range(1, 6):
        ledger.say(number, "good", "ann")
    result = run(root)
    assert isinstance(result.exception, FrameError)
    assert "has 5 good parts that somebody reviewed, a refit needs 4 to learn from" in str(result.exception)
    review(ledger)
    result = run(root, "--held-out", 1)
    assert "--held-out must lie between 0 and 1, got 1.0" in str(result.exception)
    result = run(root, "--out", root / "bundle")
    assert "is written beside it" in str(result.exception)
    result = run(root, "--what", "bank")
    assert "has no bank, Mentor3AD keeps no features; refit its threshold" in str(result.exception)
    Bundle.open(root / "bundle").update(lattice={"source_onnx": "0" * 64, "refine": True})
    result = run(root, "--what", "svm")
    assert isinstance(result.exception, ArtifactError)
    assert "refit that bundle and make this one from it again" in str(result.exception)
    shutil.rmtree(root / "station" / "frames")
    result = run(root)  # another manifest judged the parts: their frames would be needed
    assert "only 0 frames of reviewed good parts are there any more" in str(result.exception)
    assert not (root / "bundle-refit").exists()
    assert [p.name for p in root.iterdir() if "refit" in p.name] == []


def test_a_station_takes_a_bundle_up_by_a_persons_word(root: Path, ledger: Ledger) -> None:
    low = sorted(ledger.parts(), key=lambda part: part.score or 0)
    review(ledger, defects=(low[0].id, low[1].id))
    done(root)
    bundle, refitted = root / "bundle", root / "bundle-refit"
    before, limit = sha256_of(bundle / MANIFEST), Bundle.open(refitted).manifest.threshold.value

    def promote(*more: str) -> Result:
        return CliRunner().invoke(app, ["promote", str(refitted), str(bundle), *more])

    assert promote().exit_code == 2
    assert "by somebody's word" in str(promote("--by", " ").exception)
    report = Bundle.open(refitted).document["refit"]
    worse = report["after"]["misses"]["count"] - report["before"]["misses"]["count"]
    assert worse == 2  # the old limit lies below every score, the new one above these
    assert f"misses {worse} more of the defects" in str(promote("--by", "ann").exception)
    assert sha256_of(bundle / MANIFEST) == before
    result = promote("--by", "ann", "--reason", "they were no defects")
    assert result.exit_code == 0, result.exception
    now = Bundle.open(bundle)
    assert now.manifest.threshold.value == limit
    assert now.document["promoted"]["by"] == "ann"
    assert sha256_of(root / f"bundle.{before[:12]}" / MANIFEST) == before
    Bundle.open(root / f"bundle.{before[:12]}")
    write_frame(root / "left", "new", make_frame(20))
    judge(root)
    *_, last = ledger.parts()
    first, other = (ledger.setup(int(part.setup or 0)) for part in (ledger.parts()[0], last))
    assert first["bundle_sha256"] == before
    assert other["bundle_sha256"] == sha256_of(bundle / MANIFEST)
    assert other["limits"] == {"reject": limit, "review": None}
    # What was compared with another bundle than the one in place is not taken.
    result = promote("--by", "ann", "--reason", "again")
    assert isinstance(result.exception, M3adError)
    assert "was compared with another bundle than" in str(result.exception)
