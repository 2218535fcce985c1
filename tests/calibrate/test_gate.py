"""The gate on a small trained detector: what passes, and three negative controls that must not."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import TINY_RGB, TINY_XYZ
from m3ad.bundle import Bundle, file_entry, write_json
from m3ad.errors import ArtifactError, M3adError
from m3ad.frame_settings import Preprocessing
from m3ad.frames import find_samples, read_sample, read_sample_mask
from m3ad.grid import prepare_mask
from m3ad.metrics import aupro, image_auroc
from m3ad.preprocess import ModelInput, prepare
from m3ad_calibrate.cli import app
from m3ad_calibrate.gate import failures, gate, summary
from m3ad_calibrate.quantize import Settings, quantize
from m3ad_calibrate.record import Feeds, read_record, record
from m3ad_export.bundle_writer import write_bundle
from m3ad_export.graphs.plan import Plan, default_plan
from m3ad_export.methods.mentor3ad import MentorSettings
from m3ad_export.sample_data import write_sample_data
from m3ad_export.training import Encoders, train
from m3ad_export.weights import load_rgb_encoder, load_xyz_encoder
from m3ad_runtime.pipeline import Inspector
from onnx import TensorProto, helper, numpy_helper
from scipy import stats
from typer.testing import CliRunner

BRIEF = MentorSettings(
    mentor_width=16,
    pool_rows=4000,
    align_steps=40,
    align_rows=64,
    guide_steps=150,
    guide_rows=256,
    svm_frames=1,
    checkpoint_steps=1000,
)
# Random encoders find little, so the metrics of a few frames jump; the ranks of the maps do not.
LOOSE = 0.2


@dataclass
class Trained:
    data: Path
    source: Bundle
    feeds: dict[str, Feeds]


pytestmark = pytest.mark.usefixtures("one_thread")


def make_trained(folder: Path, shared: float) -> Trained:
    """A trained detector and its bundle; `shared` is what all tokens have in common, in units of their spread."""
    write_sample_data(folder / "data", train=3, validation=1, test_per_kind=1, size=128)
    rgb, xyz = load_rgb_encoder(TINY_RGB, None), load_xyz_encoder(TINY_XYZ, None)
    encoders = Encoders(*rgb, *xyz)
    with torch.no_grad():
        for seed, encoder in enumerate((rgb[0], xyz[0])):
            generator = torch.Generator().manual_seed(seed)
            encoder.norm.bias.add_(shared * torch.randn(len(encoder.norm.bias), generator=generator))
    detector = train(
        find_samples(folder / "data", "train"),
        find_samples(folder / "data", "validation"),
        encoders,
        folder / "detector",
        category="tiny",
        preprocessing=Preprocessing(),
        settings=BRIEF,
    )
    sample = find_samples(folder / "data", "validation")[0]
    golden = prepare(read_sample(sample), Preprocessing())
    write_bundle(detector, golden, folder / "bundle", parity_points=(1024,))
    source = Bundle.open(folder / "bundle")
    record(source, folder / "data", megabytes=40)
    return Trained(folder / "data", source, read_record(source))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Trained:
    return make_trained(tmp_path_factory.mktemp("gate"), 0)


@pytest.fixture(scope="module")
def confident(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Trained:
    """Its scores of good pixels are 1e-4, because what it rebuilds is mostly what all tokens share."""
    return make_trained(tmp_path_factory.mktemp("gate"), 20)


def written(
    trained: Trained,
    out: Path,
    plan: Plan,
    feeds: dict[str, Feeds] | None = None,
    settings: Settings | None = None,
) -> Bundle:
    return quantize(trained.source, out, plan, feeds or trained.feeds, settings or Settings(), None)


def gated(trained: Trained, bundle: Bundle, budget: float = LOOSE) -> list[str]:
    found = gate(bundle, trained.source, find_samples(trained.data, "test"), budget)
    json.dumps(found, allow_nan=False)
    assert found["passed"] is not bool(failures(found["figures"], budget))
    return failures(found["figures"], budget)


def relist(bundle: Bundle, relative: str) -> None:
    """Write the manifest as if a changed file had been written so."""
    files = {**bundle.document["files"], relative: file_entry(bundle.path / relative)}
    write_json(bundle.path / "manifest.json", {**bundle.document, "files": files})


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_an_honest_bundle_of_every_type_passes(trained: Trained, tmp_path: Path, precision: str) -> None:
    bundle = written(trained, tmp_path / "out", default_plan(precision))  # type: ignore[arg-type]
    entry = bundle.document["precision"]
    assert (entry["type"], entry["plan"]["precision"]) == (precision, precision)
    assert "parity" not in bundle.document
    assert gated(trained, bundle) == []
    name = {"fp16": "FLOAT16", "int8": "INT8"}[precision]
    graphs = ("rgb_extractor", "xyz_encoder", "mgm", "head_rows")
    assert all(entry["products"][graph].get(name, 0) > 0 for graph in graphs)
    frame = ModelInput(**{n: np.load(bundle.file(f"golden/{n}.npy")) for n in bundle.contract.method.inputs})
    golden = np.load(bundle.file("golden/anomaly_map.npy"))
    assert not np.array_equal(golden, np.load(trained.source.file("golden/anomaly_map.npy")))
    for layout in ("chain", "fused"):  # every runner takes it as it takes any bundle
        found = Inspector(bundle, layout).inspect_prepared(frame)
        assert stats.spearmanr(found.anomaly_map.ravel(), golden.ravel()).statistic > 0.99


def test_fp8_and_bf16_bundles_are_gated_too(trained: Trained, tmp_path: Path) -> None:
    """Their few bits of mantissa are hard on a network of 24 channels; bf16 is emulated, CPUs do not run it."""
    samples = find_samples(trained.data, "test")
    for precision, name, runs in (("fp8", "FLOAT8E4M3FN", True), ("bf16", "BFLOAT16", False)):
        bundle = written(trained, tmp_path / precision, default_plan(precision))  # type: ignore[arg-type]
        assert bundle.document["precision"]["products"]["mgm"] == {name: 8}
        found = gate(bundle, trained.source, samples, LOOSE)
        assert 0.9 < found["figures"]["fused"]["rank_correlation"]["lowest"] < 1
        assert (found["frame_ms"] is not None) == runs
        assert found["emulated"] is not runs
        assert precision in summary(found, precision)
    with pytest.raises(ArtifactError, match=r"cannot run on a CPU .*; bf16 is for engines"):
        Inspector(bundle)


def test_figures_are_those_of_the_bundles_themselves(trained: Trained, tmp_path: Path) -> None:
    """Against inspectors and metrics called one by one."""
    bundle = written(trained, tmp_path / "out", default_plan("int8"))
    samples = find_samples(trained.data, "test")
    found = gate(bundle, trained.source, samples)
    labels = np.array([not s.is_good for s in samples])
    masks = np.stack([prepare_mask(read_sample_mask(s, read_sample(s).rgb.shape[:2])) for s in samples])
    results = {
        name: [Inspector(b, "chain").inspect(read_sample(s)) for s in samples]
        for name, b in (("source", trained.source), ("quantized", bundle))
    }
    for name, inspections in results.items():
        maps = np.stack([i.anomaly_map for i in inspections])
        entry = found["figures"]["chain"]
        assert entry["image_auroc"][name] == image_auroc(np.array([i.score for i in inspections]), labels)
        assert entry["aupro_1"][name] == pytest.approx(aupro(maps, masks, 0.01, "exact"), abs=2e-3)
    ranks = []
    for sample, a, b in zip(samples, results["source"], results["quantized"], strict=True):
        pixels = prepare(read_sample(sample), Preprocessing()).point_pixel
        ranks.append(stats.spearmanr(a.anomaly_map.ravel()[pixels], b.anomaly_map.ravel()[pixels]).statistic)
    assert found["figures"]["chain"]["rank_correlation"]["lowest"] == pytest.approx(min(ranks), abs=1e-5)
    assert found["frames"] == 4
    assert found["frame_ms"]["ratio"] == found["frame_ms"]["quantized"] / found["frame_ms"]["source"]
    slow = {**found, "frame_ms": {**found["frame_ms"], "ratio": 1.5}}
    assert "1.50 times the source's: slower on this CPU" in summary(slow, "int8")
    # One good and three defective parts are three pairs: a budget of 0.005 is finer than anything they can show.
    assert "one pair of test parts that change places is 0.3333 of image AUROC" in summary(found, "int8")
    assert "one pair" not in summary({**found, "budget": 0.34}, "int8")


def test_verdicts_that_change_are_counted_and_told(trained: Trained, tmp_path: Path) -> None:
    """At a limit between a part's score before and after, that part's verdict changes."""
    bundle = written(trained, tmp_path / "out", default_plan("int8"))
    samples = find_samples(trained.data, "test")
    before, after = (
        [Inspector(b, "chain").inspect(read_sample(s)).score for s in samples]
        for b in (trained.source, bundle)
    )
    limit = (before[0] + after[0]) / 2
    changed = sum((a > limit) != (b > limit) for a, b in zip(before, after, strict=True))
    assert changed > 0
    shutil.copytree(trained.source.path, tmp_path / "source")
    source = Bundle.open(tmp_path / "source").update(threshold={"value": limit, "review": None})

    def told(value: float) -> str:
        Bundle.open(bundle.path).update(threshold={"value": value, "review": None})
        done = CliRunner().invoke(
            app,
            [
                "gate",
                str(bundle.path),
                "--against",
                str(source.path),
                "--data",
                str(trained.data),
                "--budget",
                "1",
            ],
        )
        return done.stdout

    advice = f"set them anew: m3ad-calibrate threshold {bundle.path} --data DATA"
    kept = told(limit)
    (line,) = (line for line in kept.splitlines() if line.startswith("chain: "))
    assert line.endswith(f", verdicts of {changed} of {len(samples)} parts change")
    assert advice in kept
    assert Bundle.open(bundle.path).document["gate"]["limits_kept"] is True
    assert advice not in told(limit * 1.5)  # its own by now


def test_calibration_on_noise_is_caught(trained: Trained, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = {
        graph: [
            {n: rng.normal(scale=1e-3, size=v.shape).astype(np.float32) for n, v in run.items()}
            for run in runs
        ]
        for graph, runs in trained.feeds.items()
    }
    failed = gated(trained, written(trained, tmp_path / "out", default_plan("int8"), noise))
    assert any("maps rank alike by" in line for line in failed)


def test_swapped_scales_are_caught(trained: Trained, tmp_path: Path) -> None:
    """Each graph's smallest and largest activation with each other's scale, written as if nothing had happened."""
    bundle = written(trained, tmp_path / "out", default_plan("int8"))
    for path in sorted((bundle.path / "onnx").glob("*.onnx")):
        model = onnx.load(path)
        names = {n.input[1] for n in model.graph.node if n.op_type == "QuantizeLinear"}
        scales = {i.name: i for i in model.graph.initializer if i.name in names}
        if not scales:
            continue
        ordered = sorted(scales, key=lambda name: float(numpy_helper.to_array(scales[name])))
        low, high = (numpy_helper.to_array(scales[n]).copy() for n in (ordered[0], ordered[-1]))
        scales[ordered[0]].CopyFrom(numpy_helper.from_array(high, ordered[0]))
        scales[ordered[-1]].CopyFrom(numpy_helper.from_array(low, ordered[-1]))
        onnx.save(model, path)
        relist(bundle, f"onnx/{path.name}")
        bundle = Bundle.open(bundle.path)
    failed = gated(trained, bundle)
    for layout in ("chain", "fused"):
        assert any(f"{layout} maps rank alike by" in line for line in failed), failed


def fp16_cosine(model: onnx.ModelProto, vote: onnx.ModelProto) -> onnx.ModelProto:
    """VM with its scores as 1 - cos in fp16, where the numbers just below 1 are 4.9e-4 apart; the vote stays."""
    nodes = []
    names = [v.name for v in model.graph.input]
    for i in range(3):
        half = [f"{name}.half" for name in names[2 * i : 2 * i + 2]]
        for name, cast in zip(names[2 * i : 2 * i + 2], half, strict=True):
            nodes += [
                helper.make_node("Cast", [name], [cast], to=TensorProto.FLOAT16),
                helper.make_node("ReduceL2", [cast, "axis"], [f"{cast}.norm"]),
                helper.make_node("Div", [cast, f"{cast}.norm"], [f"{cast}.unit"]),
            ]
        nodes += [
            helper.make_node("Mul", [f"{half[0]}.unit", f"{half[1]}.unit"], [f"product{i}"]),
            helper.make_node("ReduceSum", [f"product{i}", "axis"], [f"cos{i}"]),
            helper.make_node("Sub", ["one", f"cos{i}"], [f"score{i}.half"]),
            helper.make_node("Cast", [f"score{i}.half"], [f"score{i}"], to=TensorProto.FLOAT),
        ]
    nodes += [
        helper.make_node("Concat", [f"score{i}" for i in range(3)], ["rows"], axis=1),
        helper.make_node("Transpose", ["rows"], ["scores"]),
    ]
    added = [numpy_helper.from_array(np.array([1]), "axis"), numpy_helper.from_array(np.float16(1), "one")]
    broken = onnx.ModelProto()
    broken.CopyFrom(model)
    del broken.graph.node[:], broken.graph.initializer[:]
    broken.graph.node.extend([*nodes, *vote.graph.node])
    broken.graph.initializer.extend([*added, *vote.graph.initializer])
    return broken


def test_an_all_fp16_cosine_is_caught(confident: Trained, tmp_path: Path) -> None:
    bundle = written(confident, tmp_path / "out", default_plan("fp16"))
    vote, path = onnx.load(bundle.file("onnx/head_vote.onnx")), bundle.file("onnx/vm.onnx")
    onnx.save(fp16_cosine(onnx.load(path), vote), path)
    relist(bundle, "onnx/vm.onnx")
    failed = gated(confident, Bundle.open(bundle.path))
    assert any("chain maps rank alike by" in line for line in failed), failed
    assert not any(line.startswith("fused") for line in failed)  # whose scores are as the plan has them


def test_a_bundle_is_gated_against_its_source_only(
    trained: Trained, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    bundle = written(trained, tmp_path / "out", default_plan("fp16"))
    samples = find_samples(trained.data, "test")
    with pytest.raises(ArtifactError, match=r"was not made from .*; gate it against its source"):
        gate(bundle, tiny_bundle, samples)
    with pytest.raises(ArtifactError, match=r"is not quantized, .* there is nothing to gate"):
        gate(trained.source, trained.source, samples)
    with pytest.raises(ArtifactError, match="is quantized already; quantize the bundle it was made from"):
        quantize(bundle, tmp_path / "twice", default_plan("fp16"), {}, Settings(), None)
    with pytest.raises(M3adError, match="is the bundle to quantize; name another folder"):
        quantize(trained.source, trained.source.path, default_plan("fp16"), {}, Settings(), None)


def test_int8_weights_are_a_quarter_and_run(trained: Trained, tmp_path: Path) -> None:
    bundle = written(trained, tmp_path / "out", default_plan("int8"))
    model = onnx.load(bundle.file("onnx/mgm.onnx"))
    stored = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    eight = sum(v.size for v in stored.values() if v.dtype == np.int8 and v.ndim == 2)
    full = onnx.load(trained.source.file("onnx/mgm.onnx"))
    assert eight == sum(numpy_helper.to_array(i).size for i in full.graph.initializer if len(i.dims) == 2)
    assert ort.InferenceSession(str(bundle.file("onnx/head.onnx"))).get_inputs()[0].name == "rgb_tokens"
    counted = bundle.document["precision"]["weight_bytes"]
    assert counted["quantized"] < counted["source"]


def test_command_writes_a_failed_bundle_but_says_so(confident: Trained, tmp_path: Path) -> None:
    """The whole way: a plan file, a bundle, its gate, an engine refused and taken on somebody's account."""
    source, data = str(confident.source.path), str(confident.data)
    default_plan("fp8").write(tmp_path / "broken.json")  # whose three bits of mantissa miss scores of 1e-4
    arguments = ["quantize", source, str(tmp_path / "bad"), "--data", data, "--budget", str(LOOSE)]
    result = CliRunner().invoke(app, [*arguments, "--plan", str(tmp_path / "broken.json")])
    assert isinstance(result.exception, M3adError)
    assert "is not usable: " in str(result.exception)
    assert "\n" not in str(result.exception)
    bad = Bundle.open(tmp_path / "bad")
    assert bad.document["gate"]["passed"] is False
    with pytest.raises(ArtifactError, match="is quantized and failed its gate"):
        bad.verify_usable()
    default_plan("fp16").write(tmp_path / "plan.json")
    arguments[2] = str(tmp_path / "good")
    result = CliRunner().invoke(app, [*arguments, "--plan", str(tmp_path / "plan.json"), "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    good = Bundle.open(tmp_path / "good")
    assert document["gate"] == good.document["gate"]
    assert good.document["gate"]["passed"] is True
    good.verify_usable()
    confident.source.verify_usable()  # a bundle in fp32 needs no gate
    result = CliRunner().invoke(
        app, ["gate", str(tmp_path / "good"), "--against", source, "--data", data, "--budget", str(LOOSE)]
    )
    assert result.exit_code == 0, result.output
    assert "passed its gate" in result.stdout


def test_command_wants_a_precision_or_a_plan(trained: Trained, tmp_path: Path) -> None:
    arguments = ["quantize", str(trained.source.path), str(tmp_path / "out"), "--data", str(trained.data)]
    result = CliRunner().invoke(app, arguments)
    assert "name either --precision, for the default plan, or --plan" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_nobody_builds_engines_of_an_ungated_bundle(trained: Trained, tmp_path: Path) -> None:
    from m3ad_export.engine import accepted, build_engines

    pytest.importorskip("tensorrt_rtx", reason="extra rtx is not installed: pip install 'm3ad[rtx]'")
    bundle = written(trained, tmp_path / "out", default_plan("int8"))
    with pytest.raises(ArtifactError, match=r"is quantized and was never gated; .*--accept-loss"):
        build_engines(bundle, "sm89")
    with pytest.raises(M3adError, match="--accept-loss needs a name and a reason, 'NAME: REASON', got 'Ada'"):
        accepted(bundle, "Ada")
    taken = accepted(bundle, "Ada: a trial on line 3")
    with pytest.raises(M3adError, match="is quantized to int8 already; leave --precision out"):
        build_engines(taken, "sm89", "fp16")
    folder = build_engines(Bundle.open(bundle.path), "sm86", None, ("chain", "fused"))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["precision"] == "int8"
    assert manifest["accepted_loss"] == {"by": "Ada", "reason": "a trial on line 3"}
    asked = bundle.document["precision"]["products"]
    for stage in ("rgb_extractor", "mfm", "mgm", "head_tokens", "head_rows"):
        assert manifest["files"][f"{stage}.plan"]["precision_histogram"]["INT8"] == asked[stage]["INT8"]
    with pytest.raises(M3adError, match="has no loss to accept"):
        accepted(trained.source, "Ada: why not")


@pytest.mark.parametrize(("target", "builds"), [("sm89", True), ("sm86", False)])
def test_fp8_engines_are_for_targets_that_have_it(
    trained: Trained, tmp_path: Path, target: str, builds: bool
) -> None:
    from m3ad_export.engine import accepted, build_engines

    pytest.importorskip("tensorrt_rtx", reason="extra rtx is not installed: pip install 'm3ad[rtx]'")
    bundle = accepted(written(trained, tmp_path / "out", default_plan("fp8")), "Ada: a test")
    if not builds:
        with pytest.raises(M3adError, match="sm86 has no FP8 units, they come with sm89"):
            build_engines(bundle, target)
        assert not (bundle.path / "engines").exists()
        return
    folder = build_engines(bundle, target, None, ("fused",))
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert files["head_rows.plan"]["precision_histogram"] == {"FLOAT8E4M3FN": 20}


def test_a_folder_that_is_no_bundle_is_left_alone(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"has no manifest.json"):
        written(trained, tmp_path / "out", default_plan("fp16"))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["notes.txt"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
