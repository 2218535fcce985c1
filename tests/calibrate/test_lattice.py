"""`m3ad-calibrate lattice`: the graphs it writes, what it fits, and its gate."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import make_input
from m3ad.bundle import Bundle
from m3ad.errors import ArtifactError, M3adError
from m3ad.frames import find_samples, read_sample
from m3ad.preprocess import prepare
from m3ad.scored import on_lattice
from m3ad_calibrate.cli import app
from m3ad_calibrate.gate import gate
from m3ad_calibrate.lattice import write_lattice
from m3ad_calibrate.lattice_probe import measure
from m3ad_export.graphs.vote import with_coverage
from m3ad_export.sample_data import write_sample_data
from m3ad_runtime.onnx_graph import OnnxGraph
from m3ad_runtime.pipeline import Inspector, Pipeline, model_arrays
from m3ad_runtime.stages import cpu_stage
from m3ad_triton.config import read_config
from m3ad_triton.repository import write_repository
from m3ad_triton.stage_model import TritonPythonModel
from m3ad_triton.verify import find_problems
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "category"
    write_sample_data(folder, train=2, validation=2, test_per_kind=1, size=128)
    return folder


@pytest.fixture(scope="module")
def half(tiny_bundle: Bundle, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    good = {split: find_samples(data, split) for split in ("train", "validation")}
    out = tmp_path_factory.mktemp("lattice") / "half"
    return write_lattice(tiny_bundle, out, "half", good["train"], good["validation"])


@pytest.mark.parametrize("name", ["vm", "head_vote"])
def test_a_voting_graph_changes_no_bit_at_all_pixels(tiny_bundle: Bundle, name: str) -> None:
    model = onnx.load(tiny_bundle.file(f"onnx/{name}.onnx"))
    first, second = (OnnxGraph(m.SerializeToString(), 1) for m in (model, with_coverage(model)))
    assert second.inputs == [*first.inputs, "point_pixel"]
    frame = make_input(1500)
    rng, rows = np.random.default_rng(0), len(frame.scored_pixel)
    arrays = {"scored_pixel": frame.scored_pixel, "point_pixel": frame.point_pixel}
    for value in first.session.get_inputs():
        if value.name not in arrays:
            shape = [rows if isinstance(size, str) else size for size in value.shape]
            arrays[value.name] = rng.random(shape, np.float32)
    for output, array in first(arrays).items():
        np.testing.assert_array_equal(second(arrays)[output], array)


def test_scores_of_the_lattice_are_what_the_map_is_made_of(half: Bundle, tiny_bundle: Bundle) -> None:
    """Both layouts agree, and a frame that is prepared for all pixels differs by the lattice alone."""
    frame = make_input(3000)
    some = frame._replace(scored_pixel=on_lattice(frame.scored_pixel, "half"))
    fused, chain = (
        Inspector(half, layout).inspect_prepared(some, with_maps=True) for layout in ("fused", "chain")
    )
    full = Inspector(tiny_bundle).inspect_prepared(frame, with_maps=True)
    assert fused.score_maps is not None
    assert chain.score_maps is not None
    assert full.score_maps is not None
    np.testing.assert_allclose(fused.score_maps, chain.score_maps, rtol=1e-3, atol=1e-5)
    inside = frame.point_pixel
    ratio = fused.score_maps.reshape(7, -1)[:, inside] / full.score_maps.reshape(7, -1)[:, inside]
    assert np.abs(np.median(ratio, axis=1) - 1).max() < 0.02
    assert not np.array_equal(fused.score_maps, full.score_maps)


def test_svm_and_threshold_are_fitted_on_the_lattice(half: Bundle, data: Path) -> None:
    inspector = Inspector(half)
    assert inspector.preprocessing.lattice == "half"
    frame = prepare(read_sample(find_samples(data, "train")[0]), half.preprocessing)
    y, x = np.divmod(frame.scored_pixel, 224)
    assert ((x + y) % 2 == 0).all()
    scores = [inspector.inspect(read_sample(s)).score for s in find_samples(data, "validation")]
    assert half.manifest.threshold.value == pytest.approx(max(scores))
    maps = [inspector.inspect(read_sample(s), with_maps=True).score_maps for s in find_samples(data, "train")]
    products = np.stack([m[3:].prod(axis=0, dtype=np.float64) ** 0.25 for m in maps if m is not None])
    found = inspector.inspect(read_sample(find_samples(data, "train")[0])).anomaly_map
    # Alg. 1 with one column and nu 0.5: the decision is the product less its median over the fitted pixels.
    np.testing.assert_allclose(found, products[0] - np.median(products), atol=1e-4 * products.max())


def test_it_is_gated_against_its_source_before_it_is_used(
    half: Bundle, tiny_bundle: Bundle, data: Path
) -> None:
    with pytest.raises(ArtifactError, match="scores the lattice half and was never gated; choose one with"):
        half.verify_usable()
    found = gate(half, tiny_bundle, find_samples(data, "test"), budget=1.0)
    for layout in ("chain", "fused"):
        values = found["figures"][layout]
        assert values["rank_correlation"]["lowest"] > 0.9
        assert values["largest_score_change"] > 0
        assert values["aupro_30"]["drop"] == values["aupro_30"]["source"] - values["aupro_30"]["lattice"]
    with pytest.raises(ArtifactError, match="there is nothing to gate; write one with m3ad-calibrate"):
        gate(tiny_bundle, tiny_bundle, find_samples(data, "test"))
    with pytest.raises(ArtifactError, match="was not made from"):
        gate(half, half, find_samples(data, "test"))


def test_command_chooses_writes_and_gates(tiny_bundle: Bundle, data: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_bundle.path, tmp_path / "bundle")
    arguments = ["lattice", str(source), "--data", str(data), "--frames", "1", "--budget", "10", "--json"]
    result = CliRunner().invoke(app, [*arguments, "--lattice", "2"])
    written = Bundle.open(tmp_path / "bundle-lattice")
    assert written.preprocessing.lattice == 2
    assert json.loads(result.stdout.strip())["gate"] == written.document["gate"]
    assert (tmp_path / "bundle-lattice.png").is_file()
    (tried,) = written.document["lattice"]["tried"]
    assert tried["lattice"] == 2
    assert tried["share"] == pytest.approx(0.25, abs=0.01)


def test_what_cannot_be_given_a_lattice_is_refused(half: Bundle, tiny_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(
        ArtifactError, match="scores the lattice half already; start from the bundle that scores"
    ):
        measure(half, [], 0.005)
    with pytest.raises(M3adError, match="name a lattice other than all, and another folder than"):
        write_lattice(tiny_bundle, tmp_path / "out", "all", [], [])
    result = CliRunner().invoke(
        app, ["lattice", str(tiny_bundle.path), "--data", str(tmp_path), "--lattice", "1"]
    )
    assert result.exit_code != 0
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def refined(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("lattice") / "refined"
    written = write_lattice(tiny_bundle, out, 2, [], [], refine=True)
    return written.update(gate={"passed": True})


def test_a_second_pass_gives_the_score_of_all_pixels(refined: Bundle, tiny_bundle: Bundle) -> None:
    frame = make_input(6000)
    some = frame._replace(scored_pixel=on_lattice(frame.scored_pixel, 2))
    full, twice = Inspector(tiny_bundle).inspect_prepared(frame), Inspector(refined).inspect_prepared(some)
    coarse = Inspector(refined)
    assert isinstance(coarse.pipeline, Pipeline)
    coarse.pipeline.functions["head"] = cpu_stage("head", refined.path / "onnx", refined.contract, 1)
    assert twice.score == pytest.approx(full.score, rel=1e-5)
    assert coarse.inspect_prepared(some).score != pytest.approx(full.score, rel=1e-3)
    peak = np.unravel_index(full.anomaly_map.argmax(), (224, 224))
    assert twice.anomaly_map[peak] == pytest.approx(full.anomaly_map[peak], rel=1e-5)


def test_a_second_pass_keeps_svm_threshold_and_review(refined: Bundle, tiny_bundle: Bundle) -> None:
    assert refined.manifest.threshold == tiny_bundle.manifest.threshold
    assert refined.refine == tiny_bundle.manifest.threshold.value
    assert refined.update(threshold={"value": 0.5, "review": 0.25}).refine == 0.25
    assert tiny_bundle.refine is None


def test_a_second_pass_is_served_on_a_cpu(refined: Bundle, tmp_path: Path) -> None:
    """The stage model that Triton's Python backend loads answers as in process; the linter knows the setting."""
    repository = write_repository(refined.path, tmp_path / "repository", "onnxruntime", "fused")
    assert find_problems(repository.path) == []
    folder = repository.path / "tiny_head"
    told = read_config(folder / "config.pbtxt").parameters
    config = {"parameters": {name: {"string_value": told[name].string_value} for name in told}}
    model = TritonPythonModel()
    model.initialize(
        {"model_config": json.dumps(config), "model_repository": str(folder), "model_version": "1"}
    )
    frame = make_input(3000)
    arrays = model_arrays(frame._replace(scored_pixel=on_lattice(frame.scored_pixel, 2)))
    pipeline = Inspector(refined).pipeline
    assert isinstance(pipeline, Pipeline)
    values, _ = pipeline.run(arrays, keep_all=True)
    np.testing.assert_array_equal(model.function(values)["anomaly_map"], values["anomaly_map"])
