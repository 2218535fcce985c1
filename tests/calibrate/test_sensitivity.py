import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from m3ad.bundle import Bundle
from m3ad.errors import FrameError
from m3ad.frames import Frame, find_samples, read_sample
from m3ad.preprocess import prepare, with_holes
from m3ad_calibrate.cli import app
from m3ad_calibrate.defects import with_defect
from m3ad_calibrate.probe import Probe, QualityLoss
from m3ad_calibrate.quantize import Settings
from m3ad_calibrate.record import read_record, record
from m3ad_calibrate.sensitivity import TARGET, Searcher, find_groups
from m3ad_export.graphs.plan import default_plan, read_plan
from m3ad_export.sample_data import write_sample_data
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "category"
    write_sample_data(folder, train=2, validation=1, test_per_kind=1, size=128)
    return folder


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Bundle, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("bundle") / "tiny"
    shutil.copytree(tiny_bundle.path, path)
    record(Bundle.open(path), data, megabytes=20)
    return Bundle.open(path)


@pytest.fixture(scope="module")
def probe(bundle: Bundle, data: Path) -> Probe:
    return Probe(bundle, find_samples(data, "validation"), ("chain", "fused"))


def test_frames_are_sampled_by_their_pixels(bundle: Bundle, data: Path, sampled_by: list[np.ndarray]) -> None:
    sample = find_samples(data, "validation")[0]
    Probe(bundle, [sample])
    clean, defective = sampled_by  # the same part with and without a synthetic defect
    frame = with_holes(read_sample(sample), bundle.preprocessing)
    np.testing.assert_array_equal(clean, prepare(frame, bundle.preprocessing).point_pixel)
    assert defective is not None


@pytest.mark.parametrize("seed", range(4))
def test_a_defect_changes_what_its_mask_says(data: Path, seed: int) -> None:
    frame = read_sample(find_samples(data, "train")[0])
    defective, mask = with_defect(frame, seed)
    again, _ = with_defect(frame, seed)
    np.testing.assert_array_equal(defective.rgb, again.rgb)
    np.testing.assert_array_equal(defective.xyz, again.xyz)
    changed_rgb = (defective.rgb != frame.rgb).any(axis=2)
    moved = np.linalg.norm(defective.xyz - frame.xyz, axis=2)
    assert 30 < mask.sum() < mask.size / 20
    if seed % 2 == 0:
        assert changed_rgb[mask].mean() > 0.9
        assert not moved.any()
    else:
        assert not changed_rgb.any()
        assert (moved[mask] > 0.2 * moved.max()).all()
        assert 1e-4 < moved.max() < 0.05
    far = np.ones_like(mask)
    rows, columns = np.nonzero(mask)
    far[rows.min() - 20 : rows.max() + 20, columns.min() - 20 : columns.max() + 20] = False
    assert not (changed_rgb | (moved > 0))[far].any()


def test_a_frame_without_a_part_has_no_defect() -> None:
    empty = Frame(np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64, 3), np.float32), "empty")
    with pytest.raises(FrameError, match="frame empty shows no part to put a defect on"):
        with_defect(empty, 0)


def test_both_layouts_of_an_unchanged_bundle_agree(probe: Probe) -> None:
    """The probe's own chain and vote against the exported head, and no change is no quality."""
    for chain, fused in zip(probe.reference["chain"], probe.reference["fused"], strict=True):
        np.testing.assert_allclose(chain, fused, atol=1e-3 * np.abs(fused).max())
    assert probe.loss_of({}, 0.005) == QualityLoss({"image_auroc": 0, "aupro_30": 0, "aupro_1": 0}, 1.0, 0.0)
    same = {"mfm": probe.session(probe.models["mfm"])}
    assert probe.loss_of(same, 0.005).rank_correlation == 1


def test_groups_cover_every_product_of_the_plan_once(probe: Probe) -> None:
    base = default_plan("int8")
    method = probe.bundle.contract.method
    products = [graph.name for graph in method.graphs if graph.name in probe.models and graph.axis != "map"]
    groups = find_groups({n: probe.models[n] for n in products}, method, 1000, base)
    names = [g.name for g in groups]
    assert sum(g.share for g in groups) == pytest.approx(1)
    assert len(set(names)) == len(names)
    assert {"RGB block 0", "RGB block 1", "XYZ block 0", "XYZ block 1", "projection", "output"} <= set(names)
    assert not [name for name in names if name.startswith(("head_", "mfm", "mgm"))], (
        "a head's layer has no group"
    )
    for stage, model in probe.models.items():
        for node in model.graph.node:
            if node.op_type in ("MatMul", "Gemm") and base.choice(stage, node).precision == "int8":
                weights = {i.name for i in model.graph.initializer}
                if weights & set(node.input):
                    found = [g.name for g in groups if re.search(g.pattern, f"{stage}:{node.name}")]
                    assert len(found) == 1, (stage, node.name, found)


def test_a_broken_group_is_found_and_promoted(probe: Probe, bundle: Bundle) -> None:
    """One layer's recorded inputs are noise: its group must rank first, and the plan must promote it."""
    feeds = read_record(bundle)
    base = default_plan("int8")
    searcher = Searcher(probe, feeds, base, Settings(), budget=0.5)
    for graph in (searcher.graphs["head_rows"], searcher.graphs["mgm"]):
        for node in graph.model.graph.node:
            if node.op_type == "MatMul" and ".projection" in node.name:
                graph.seen[node.input[0]].largest = 1e-3
    said: list[str] = []
    search = searcher.search(said.append)
    assert search.findings[0].group.name == "projection"
    assert search.findings[0].quality.loss > TARGET
    assert search.quality.loss <= TARGET
    promoted = {k.pattern: k.precision for k in search.plan.keep if k not in base.keep}
    assert promoted[search.findings[0].group.pattern] in ("int8_weights", "rest")
    assert f"{len(searcher.groups)} of {len(searcher.groups)}" in "\n".join(said)
    # A plan the search wrote is a plan that `quantize` reads: the same products, the same loss.
    assert searcher.loss_of(search.plan).loss == pytest.approx(search.quality.loss)


def test_command_writes_plan_plot_and_figures(bundle: Bundle, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    arguments = [
        "sensitivity",
        str(bundle.path),
        "--data",
        str(data),
        "--out",
        str(out),
        "--frames",
        "1",
        "--json",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document == json.loads((tmp_path / "found.figures.json").read_text())
    losses = [g["loss"] for g in document["groups"]]
    assert losses == sorted(losses, reverse=True)
    assert read_plan(out).precision == "int8"
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")


def test_a_layout_alone_is_probed(bundle: Bundle, data: Path, probe: Probe) -> None:
    """The same network in each layout: a changed encoder costs the same, and a chain needs no fused head beside it."""
    chain = Bundle.of_document(bundle.path, {**bundle.document, "layouts": ["chain"]})
    alone = Probe(chain, find_samples(data, "validation"), ("chain",))
    for one, both in zip(alone.reference["chain"], probe.reference["fused"], strict=True):
        np.testing.assert_allclose(one, both, rtol=1e-4, atol=1e-6)


def test_without_frames_it_says_so(bundle: Bundle) -> None:
    with pytest.raises(FrameError, match="there are no good validation frames to probe with"):
        Probe(bundle, [])
