"""What of a bundle's graphs good frames fit without training: per-pixel baseline, one-class SVM, M3DM's banks.

Each function changes a bundle in place: a copy that nobody uses yet.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import onnx
import torch
from m3ad import bundle as artefact
from m3ad.bundle import Bundle
from m3ad.contract import IMAGE_SIZE
from m3ad.errors import ArtifactError, FrameError
from m3ad.frames import Frame
from m3ad.methods.m3dm import METHODS, SIDES, UFF_METHOD, UFF_SIDES
from m3ad.preprocess import ModelInput, prepare
from m3ad_export.graphs.compose import write_banks
from m3ad_export.graphs.head import head_model, read_parts
from m3ad_export.graphs.trace import dense_model
from m3ad_export.heads.bank import Bank, TwoBanks
from m3ad_export.heads.coverage import Coverage, on_grid
from m3ad_export.heads.three_banks import FusionBank, ThreeBanks
from m3ad_export.heads.voting import SCORES, expected, smooth
from m3ad_export.train.coreset import coreset
from m3ad_export.train.samples import sample_evenly
from m3ad_runtime.banks import queries_of
from m3ad_runtime.pipeline import Inspector, Pipeline, model_arrays
from onnx import numpy_helper
from torch import Tensor

from m3ad_calibrate.quantize import write_golden
from m3ad_calibrate.svm import refit_svm, svm_frames

BASELINES = {"vm": "baseline", "head_vote": "vm.baseline"}


def refit_vote(bundle: Bundle, frames: Sequence[Frame], source: Bundle, *, with_baseline: bool) -> Bundle:
    """The one-class SVM of good frames, and before it the per-pixel baseline where asked.

    Args:
        bundle: is written to.
        frames: good ones.
        source: an untouched bundle whose golden frame this one's is, too.
        with_baseline: also what to expect at each pixel (`voting.fit_baseline`).

    Raises:
        ArtifactError: the method votes without an SVM, or the bundle is one whose graphs others were gated against.
        FrameError: there are no frames.
    """
    require_own_graphs(source)
    if source.manifest.voting is None:
        raise ArtifactError(
            f"{source.path} has no one-class SVM, {source.contract.method.title} votes without one; refit its threshold"
        )
    if not frames:
        raise FrameError("no frame of a reviewed good part is there any more; raise the station's keep_days")
    if with_baseline:
        bundle = _refit_baseline(bundle, frames, source)
    inspector = Inspector(bundle)
    chosen = sample_evenly(frames, svm_frames(bundle))
    maps = [
        inspector.inspect_prepared(_prepared(frame, bundle), with_maps=True).score_maps for frame in chosen
    ]
    return refit_svm(bundle, [m for m in maps if m is not None])


def _refit_baseline(bundle: Bundle, frames: Sequence[Frame], source: Bundle) -> Bundle:
    # With a baseline of ones a score map is the smoothed score itself.
    ones = torch.ones(len(SCORES), IMAGE_SIZE * IMAGE_SIZE)
    inspector = Inspector(_with_baseline(bundle, ones, source))
    coverage, total = Coverage(), torch.zeros(len(SCORES) + 1, IMAGE_SIZE, IMAGE_SIZE)
    for frame in frames:
        prepared = _prepared(frame, bundle)
        found = inspector.inspect_prepared(prepared, with_maps=True).score_maps
        assert found is not None
        scored, points = (torch.from_numpy(prepared._asdict()[n]) for n in ("scored_pixel", "point_pixel"))
        every = smooth(on_grid(torch.ones(1, len(scored)), scored))
        if bundle.contract.lattice != "all":
            every = every * coverage(scored, points)
        total += torch.cat([torch.from_numpy(found[: len(SCORES)]), every])
    return _with_baseline(bundle, expected(total, len(frames)), source)


def _with_baseline(bundle: Bundle, baseline: Tensor, source: Bundle) -> Bundle:
    for file, name in BASELINES.items():
        path = bundle.path / "onnx" / f"{file}.onnx"
        if path.exists():
            model = onnx.load(path)
            _initializer(model, name, path).CopyFrom(numpy_helper.from_array(baseline.numpy(), name))
            onnx.save(model, path)
    if "fused" in bundle.manifest.layouts:
        onnx.save(
            head_model(bundle.contract, read_parts(bundle.path / "onnx")), bundle.path / "onnx" / "head.onnx"
        )
    return _rewritten(bundle, source)


def refit_bank(bundle: Bundle, frames: Sequence[Frame], source: Bundle, seed: int) -> Bundle:
    """M3DM's banks with the features of good frames beside their own rows, thinned to the rows they had.

    The coreset chooses among both, so that what the old rows show stays good. Scale and vote stay.

    Raises:
        ArtifactError: the method has no bank, or see `refit_vote`.
        FrameError: there are no frames.
    """
    require_own_graphs(source)
    if source.contract.method not in METHODS:
        raise ArtifactError(
            f"{source.path} has no bank, {source.contract.method.title} keeps no features; refit its threshold"
        )
    if not frames:
        raise FrameError("no frame of a reviewed good part is there any more; raise the station's keep_days")
    path = bundle.path / "onnx" / "bank.onnx"
    model = onnx.load(path)
    pipeline = Inspector(bundle).pipeline
    assert isinstance(pipeline, Pipeline)
    found = [pipeline.run(model_arrays(_prepared(f, bundle)), keep_all=True)[0] for f in frames]
    has_fusion, dims = bundle.contract.method is UFF_METHOD, bundle.dims
    banks, scale = {}, torch.ones(())
    for side in UFF_SIDES if has_fusion else SIDES:
        parts = ("xyz_", "rgb_") if side == "fusion" else ("",)
        old = torch.cat([_rows(model, f"{side}.{part}", path) for part in parts], dim=1)
        features = [torch.from_numpy(queries_of(side, values)) for values in found]
        # The exporter folds the scale into the graph: it is what a distance was divided by.
        distance = torch.from_numpy(found[0][f"{side}_distance"])
        worst = int(distance.argmax())
        scale = (features[0][worst] - old).norm(dim=1).amin() / distance[worst]
        # Of three banks the 3D one ends in a row that stands for no feature: it stays.
        own = len(old) - (has_fusion and side == "xyz")
        joined = torch.cat([old[:own], *features])
        banks[side] = torch.cat([joined[coreset(joined, own, seed)], old[own:]])
    rgb, xyz = Bank(banks["rgb"]), Bank(banks["xyz"])
    all_of: TwoBanks | ThreeBanks = TwoBanks(rgb, xyz)
    if has_fusion:
        all_of = ThreeBanks(rgb, xyz, FusionBank(banks["fusion"], dims.xyz_width, dims.rgb_side))
        all_of.fusion.find_neighbors()
    all_of.scale = scale
    for bank in (rgb, xyz):
        bank.find_neighbors()
    onnx.save(dense_model(all_of, bundle.contract.stages["bank"]), path)
    write_banks(path, bundle.contract.method.cpu["bank"])
    return _rewritten(bundle, source)


def _rows(model: onnx.ModelProto, name: str, path: Path) -> Tensor:
    """A bank's rows, their mean added again."""
    rows, mean = (
        torch.from_numpy(numpy_helper.to_array(_initializer(model, f"{name}{part}", path)).copy())
        for part in ("rows", "mean")
    )
    return rows + mean


def require_own_graphs(source: Bundle) -> None:
    """Check that a bundle's graphs may be changed.

    Raises:
        ArtifactError: they were made from another bundle's, or a second pass promises that bundle's scores.
    """
    lattice = source.manifest.lattice
    if source.manifest.precision is not None or (lattice is not None and lattice.refine):
        raise ArtifactError(
            f"the graphs of {source.path} stand for those of the bundle it was made from, which its gate compared; "
            "refit that bundle and make this one from it again, or refit the threshold alone"
        )


def _prepared(frame: Frame, bundle: Bundle) -> ModelInput:
    return prepare(frame, bundle.preprocessing)


def _initializer(model: onnx.ModelProto, name: str, path: Path) -> onnx.TensorProto:
    for i, found in enumerate(model.graph.initializer):
        if found.name == name:
            tensor: onnx.TensorProto = model.graph.initializer[i]
            return tensor
    raise ArtifactError(f"{path} holds no {name}; export the bundle again: m3ad-export bundle")


def _rewritten(bundle: Bundle, source: Bundle) -> Bundle:
    """The bundle with golden values and hashes of its graphs as they are now."""
    shutil.rmtree(bundle.path / "golden")
    write_golden(bundle.path, source, bundle.contract, bundle.manifest.layouts)
    document = {**bundle.document, "files": artefact.file_entries(bundle.path)}
    artefact.write_json(bundle.path / artefact.MANIFEST, document)
    return Bundle.open(bundle.path)
