"""Metrics of a test split: image and pixel AUROC and AUPRO of the final map, per defect kind, and the verdicts."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from m3ad.frames import Sample, read_sample, read_sample_mask
from m3ad.metrics import evaluate, image_auroc, pixel_auroc
from m3ad.preprocess import Modality, prepare, prepare_mask, with_holes, without_modality

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
        samples: good and defective frames with their masks.
        without: a modality that is masked out in every frame, good ones too.
        with_maps: also image and pixel AUROC of each score map alone, an image's score being its map's maximum.

    Returns:
        `metrics` over all frames, `per_defect` for each kind against the good frames, `verdicts` at the threshold,
        and `score_maps` when asked for.

    Raises:
        FrameError: a frame cannot be read or inspected, or the split lacks good or defective ones.
    """
    maps, scores, masks, kinds, parts = [], [], [], [], []
    for sample in samples:
        frame = read_sample(sample)
        shown = without_modality(with_holes(frame, inspector.preprocessing), without) if without else frame
        result = inspector.inspect_prepared(prepare(shown, inspector.preprocessing), with_maps=with_maps)
        maps.append(result.anomaly_map)
        scores.append(result.score)
        masks.append(prepare_mask(read_sample_mask(sample, (frame.rgb.shape[0], frame.rgb.shape[1]))))
        kinds.append(sample.defect)
        if result.score_maps is not None:
            parts.append(result.score_maps)
    all_maps, all_scores, all_masks = np.stack(maps), np.array(scores, np.float64), np.stack(masks)
    kind = np.array(kinds)
    is_bad = kind != "good"
    document: dict[str, Any] = {
        "frames": len(kinds),
        "metrics": evaluate(all_maps, all_scores, all_masks, is_bad),
        "per_defect": {},
        "verdicts": _verdicts(all_scores > inspector.limits.reject, is_bad),
    }
    for name in sorted({*kinds} - {"good"}):
        chosen = (kind == name) | ~is_bad
        metrics = evaluate(all_maps[chosen], all_scores[chosen], all_masks[chosen], is_bad[chosen])
        document["per_defect"][name] = {"frames": int((kind == name).sum()), **metrics}
    if parts:
        by_map = np.stack(parts, axis=1)  # [maps, frames, 224, 224]
        document["score_maps"] = {
            name: {
                "image_auroc": image_auroc(values.max(axis=(1, 2)).astype(np.float64), is_bad),
                "pixel_auroc": pixel_auroc(values, all_masks),
            }
            for name, values in zip(inspector.record.score_maps, by_map, strict=True)
        }
    return document


def _verdicts(flagged: npt.NDArray[np.bool_], is_bad: npt.NDArray[np.bool_]) -> dict[str, int]:
    return {
        "found": int((flagged & is_bad).sum()),
        "missed": int((~flagged & is_bad).sum()),
        "false_alarms": int((flagged & ~is_bad).sum()),
        "passed": int((~flagged & ~is_bad).sum()),
    }
