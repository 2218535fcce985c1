"""Metrics of a test split: image and pixel AUROC and AUPRO of the final map, per defect kind, and the verdicts."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from m3ad.contract import GRID_SIZE
from m3ad.frame_settings import Modality
from m3ad.frames import Sample, read_sample, read_sample_mask
from m3ad.grid import prepare_mask
from m3ad.metrics import evaluate, image_auroc, pixel_auroc
from m3ad.preprocess import prepare, with_holes, without_modality

from m3ad_client.infer import AnyInspector


def evaluate_samples(
    inspector: AnyInspector,
    samples: Iterable[Sample],
    *,
    with_maps: bool = False,
    without: Modality | None = None,
) -> dict[str, Any]:
    """Inspect every frame of a split and compute its metrics on the 224 x 224 grid.

    Args:
        inspector: in process or on a server.
        samples: good and defective frames, with masks as far as they are drawn.
        without: a modality that is masked out in every frame, good ones too.
        with_maps: also image and pixel AUROC of each score map alone, an image's score being its map's maximum.

    Returns:
        `metrics` over all frames, `per_defect` for each kind against the good frames, `verdicts` at the threshold,
        `without_mask` with the number of defective frames of each kind that no mask marks, which pixel metrics leave
        out, and `score_maps` when asked for.

    Raises:
        FrameError: a frame cannot be read or inspected, or the split lacks good or defective ones.
    """
    maps, scores, kinds, parts = [], [], [], []
    masks = list[npt.NDArray[np.bool_]]()
    for sample in samples:
        frame = read_sample(sample, inspector.preprocessing.camera)
        shown = without_modality(with_holes(frame, inspector.preprocessing), without) if without else frame
        result = inspector.inspect_prepared(prepare(shown, inspector.preprocessing), with_maps=with_maps)
        maps.append(result.anomaly_map)
        scores.append(result.score)
        height, width = frame.rgb.shape[:2]
        is_drawn = sample.is_good or sample.mask_path is not None
        grid = inspector.preprocessing.geometry
        masks.append(
            prepare_mask(read_sample_mask(sample, (height, width)), grid)
            if is_drawn
            else np.zeros((GRID_SIZE[grid],) * 2, np.bool_)  # of a defect that nobody drew
        )
        kinds.append(sample.defect)
        if result.score_maps is not None:
            parts.append(result.score_maps)
    all_maps, all_scores, all_masks = np.stack(maps), np.array(scores, np.float64), np.stack(masks)
    kind = np.array(kinds)
    is_bad = kind != "good"
    is_marked = ~is_bad | all_masks.any(axis=(1, 2))

    def metrics(chosen: npt.NDArray[np.bool_]) -> dict[str, float]:
        seen = chosen & is_marked
        if (seen & is_bad).any():
            by_pixel = evaluate(all_maps[seen], all_scores[seen], all_masks[seen], is_bad[seen])
        else:
            by_pixel = {}
        return {**by_pixel, "image_auroc": image_auroc(all_scores[chosen], is_bad[chosen])}

    document: dict[str, Any] = {
        "frames": len(kinds),
        "metrics": metrics(np.ones(len(kinds), np.bool_)),
        "per_defect": {},
        "verdicts": _verdicts(all_scores > inspector.limits.reject, is_bad),
        "without_mask": {
            name: int(((kind == name) & ~is_marked).sum()) for name in np.unique(kind[~is_marked]).tolist()
        },
    }
    for name in sorted({*kinds} - {"good"}):
        found = metrics((kind == name) | ~is_bad)
        document["per_defect"][name] = {"frames": int((kind == name).sum()), **found}
    if parts:
        by_map = np.stack(parts, axis=1)  # [maps, frames, 224, 224]
        document["score_maps"] = {}
        for name, values in zip(inspector.record.score_maps, by_map, strict=True):
            tops = values.max(axis=(1, 2)).astype(np.float64)
            document["score_maps"][name] = {"image_auroc": image_auroc(tops, is_bad)}
            if (is_marked & is_bad).any():
                document["score_maps"][name]["pixel_auroc"] = pixel_auroc(
                    values[is_marked], all_masks[is_marked]
                )
    return document


def _verdicts(flagged: npt.NDArray[np.bool_], is_bad: npt.NDArray[np.bool_]) -> dict[str, int]:
    return {
        "found": int((flagged & is_bad).sum()),
        "missed": int((~flagged & is_bad).sum()),
        "false_alarms": int((flagged & ~is_bad).sum()),
        "passed": int((~flagged & ~is_bad).sum()),
    }
