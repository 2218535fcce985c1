"""Training's stage 3: what good frames score at each pixel, the one-class SVM, the verdict threshold.

It takes a minute where the heads' training takes many, so a trained detector can have it anew, from another line's good
parts or for a line that lacks a modality: `refit_vote`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from m3ad.errors import FrameError, M3adError
from m3ad.frames import Sample
from m3ad.preprocess import Modality, Preprocessing
from m3ad.stages import Ops, by_modality
from torch import Tensor

from m3ad_export.detector import Detector, save_detector
from m3ad_export.heads.fused import TABLES, HeadRows, HeadTokens, tile_scores
from m3ad_export.heads.mentor import Mfm, Mgm
from m3ad_export.heads.voting import Vm, fit_expected, fit_one_class_svm
from m3ad_export.train.features import FeatureExtractor, FrameFeatures

# Wraps an iterable of known length to show progress under a description; the command line hands in rich's.
Track = Callable[[Iterable[Any], str, int], Iterable[Any]]
Item = TypeVar("Item")


def require_good(split: str, samples: Sequence[Sample]) -> None:
    """Refuse an empty split, and one that holds a defect.

    Raises:
        FrameError: see above.
    """
    bad = [s.name for s in samples if not s.is_good]
    if not samples or bad:
        raise FrameError(
            f"the {split} split holds {len(samples)} frames, {len(bad)} of them defective ({', '.join(bad[:3])}); "
            "training needs good frames only, at least one in each split"
        )


def fit_vote(
    vm: Vm,
    mfm: Mfm,
    mgm: Mgm,
    train_samples: Sequence[Sample],
    validation_samples: Sequence[Sample],
    extract: FeatureExtractor,
    *,
    expected_frames: int,
    svm_frames: int,
    svm_nu: float,
    track: Track,
) -> dict[str, Any]:
    """Fit VM in place to good training frames (Alg. 1) and find the threshold that every validation frame passes.

    Returns:
        The threshold as a detector's record has it.
    """
    head = HeadTokens(mfm, mgm), HeadRows(mfm, mgm)
    good = spread_over(train_samples, max(expected_frames, svm_frames))
    scored = [frame_scores(extract(s), *head) for s in track(good, "voting", len(good))]
    if expected_frames:
        fit_expected(vm, spread_over(scored, expected_frames))
    x = torch.cat([vm.svm_rows(vm.score_maps(*s)) for s in spread_over(scored, svm_frames)])
    fit_one_class_svm(vm.svm, x, svm_nu)
    checked = track(validation_samples, "threshold", len(validation_samples))
    scores = [float(vm.voted(*frame_scores(extract(s), *head))[1]) for s in checked]
    return {"value": max(scores), "rule": "largest validation score", "validation_scores": scores}


def refit_vote(
    detector: Detector,
    train_samples: Sequence[Sample],
    validation_samples: Sequence[Sample],
    folder: Path,
    ops: Ops,
    *,
    without: Modality | None = None,
    expected_frames: int | None = None,
    track: Track = lambda steps, _description, _total: steps,
) -> Detector:
    """The same encoders and heads with stage 3 from these frames.

    Args:
        detector: trained; it stays as it is.
        train_samples: good frames.
        validation_samples: good frames; they set the verdict threshold only.
        folder: gets `features/` and the detector.
        ops: the custom ops.
        without: a modality to mask out of these frames and of every later one; None takes frames as they are.
        expected_frames: as in TrainConfig; None for as many as the detector was trained with.
        track: shows progress.

    Raises:
        FrameError: a split is empty or holds a defect, or a frame cannot be read.
        M3adError: `folder` already holds a detector, or the detector's plane removal needs the modality.
    """
    require_good("training", train_samples)
    require_good("validation", validation_samples)
    if (folder / "detector.json").exists():
        raise M3adError(f"{folder} holds a detector already; name another folder for the refitted one")
    settings = detector.record["training"]
    expected_frames = settings["expected_frames"] if expected_frames is None else expected_frames
    try:
        preprocessing = replace(Preprocessing.from_json(detector.record["preprocessing"]), without=without)
    except ValueError as error:
        raise M3adError(f"{error}; train a detector with --plane none for this line") from error
    vm = Vm(detector.vm.config)
    threshold = fit_vote(
        vm,
        detector.mfm,
        detector.mgm,
        train_samples,
        validation_samples,
        FeatureExtractor(detector.rgb, detector.xyz, preprocessing, ops, folder / "features"),
        expected_frames=expected_frames,
        svm_frames=settings["svm_frames"],
        svm_nu=settings["svm_nu"],
        track=track,
    )
    record = {
        **detector.record,
        "preprocessing": preprocessing.to_json(),
        "threshold": threshold,
        "training": {**settings, "expected_frames": expected_frames, "vote_frames": len(train_samples)},
    }
    refitted = replace(detector, vm=vm.eval(), record=record)
    save_detector(refitted, folder)
    return refitted


def spread_over(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` of the items, evenly spread."""
    return [items[int(i)] for i in torch.linspace(0, len(items) - 1, min(count, len(items)))]


@torch.inference_mode()
def frame_scores(frame: FrameFeatures, tokens: HeadTokens, rows: HeadRows) -> tuple[Tensor, Tensor]:
    """One frame through the fused head, a few thousand rows at a time: scores [3, R], scored_pixel [R]."""
    made = tokens(torch.from_numpy(frame.rgb_tokens), torch.from_numpy(frame.xyz_tokens))
    tables = {name: table.numpy() for name, table in zip(TABLES, made, strict=True)}
    scores = [tile_scores(rows, tile) for tile in frame.chunks(*by_modality(tables))]
    return torch.cat(scores, dim=1), torch.from_numpy(frame.scored_pixel)
