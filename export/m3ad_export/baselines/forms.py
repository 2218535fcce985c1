"""What a frame rate is measured against, in plain eager PyTorch with the detector's own frozen encoders.

`python -m m3ad_export.baselines FORM DETECTOR` is the process that `m3ad-client bench --baseline FORM` talks to.

    dense   the method as one writes it: every pixel through every layer, no identity used; same map as ours
    cfm     CFM's published graph on the same encoders, with the detector's mappings where it is CFM, else random ones
    fused   the fused head in PyTorch, for a device on which no engine runs yet
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from m3ad.errors import M3adError, MissingDependencyError
from m3ad.frame_settings import Preprocessing
from m3ad.manifest import Encoder
from m3ad.method import Pair
from m3ad.preprocess import ModelInput
from m3ad.serving import weights_line
from m3ad.typed_json import typed
from m3ad_runtime.stages import modality_of
from m3ad_runtime.worker import MapAndTimes, Runner
from torch import Tensor

from m3ad_export.dense.cfm import published, random_mappings
from m3ad_export.dense.encoders import xyz_tokens
from m3ad_export.dense.torch_ops import interpolated, pooled, scored_pixels, three_nearest, upsampled
from m3ad_export.detector import Detector
from m3ad_export.heads.tiled import FusedHead, spread_names, tile_scores
from m3ad_export.method import Form
from m3ad_export.methods import IMPLEMENTATIONS
from m3ad_export.saved import load_detector

ROWS_AT_ONCE = 8192


def dense(detector: Detector) -> Form:
    """The plain form of the detector's method."""
    return IMPLEMENTATIONS[detector.record["method"]].dense(detector)


def cfm(detector: Detector) -> Form:
    """CFM on the same encoders."""
    if detector.record["method"] == "cfm":
        return dense(detector)
    if not (detector.rgb and detector.xyz):
        raise M3adError(f"CFM needs both modalities, {detector.record['method']} has one; measure with dense")
    return published(detector, random_mappings(detector))


def fused_parts(detector: Detector) -> tuple[FusedHead, tuple[Pair, ...]]:
    """The fused head's modules and what its rows are compared with.

    Raises:
        M3adError: the method has no fused head, or one that takes more than tokens.
    """
    method = detector.contract.method
    make = IMPLEMENTATIONS[method.name].fused
    given = {t.name for t in detector.contract.stages["head"].inputs} if make else set()
    if make is None or any(name.endswith("_rebuilt") for name in given):
        raise M3adError(f"{method.name} has no fused form in PyTorch; measure with dense")
    return make(detector), method.pairs


def fused(detector: Detector) -> Form:
    """First layers on the tokens and scored pixels only, tile by tile; its map is the chain's.

    Raises:
        M3adError: the method has no fused head, or one that takes more than tokens.
    """
    head, pairs = fused_parts(detector)
    rgb_encoder, _ = detector.encoders
    side = rgb_encoder.config.side

    def run(image: Tensor, points: Tensor, point_pixel: Tensor) -> Tensor:
        centers, tokens = xyz_tokens(detector, points)
        own = {"rgb_tokens": rgb_encoder(image), "xyz_tokens": tokens}
        by_name = {**own, **dict(zip(head.projected, head.tokens(*own.values()), strict=True))}
        pixel = scored_pixels(point_pixel)
        three = three_nearest(points, centers)
        spread = {}
        for name in spread_names(head, pairs):
            if modality_of(name) == "rgb":
                spread[name] = upsampled(by_name[name], side)[pixel]
            else:
                spread[name] = pooled(interpolated(by_name[name], *three), point_pixel)[pixel]
        tiles = zip(*(torch.split(each, ROWS_AT_ONCE) for each in spread.values()), strict=True)
        scores = [tile_scores(head, pairs, dict(zip(spread, tile, strict=True))) for tile in tiles]
        anomaly_map: Tensor = head.vote(torch.cat(scores, dim=1), pixel)[0]
        return anomaly_map

    return run


FORMS: dict[str, Callable[[Detector], Form]] = {"dense": dense, "cfm": cfm, "fused": fused}


def heads_line(form: str, detector: Detector) -> str:
    """Whose heads a form has, for the line that says which weights a figure is from."""
    own = form != "cfm" or detector.record["method"] == "cfm"
    return "the detector's heads" if own else "random heads"


def runner(form: str, folder: Path, threads: int, device: str) -> Runner:
    """Load a detector and make the form of it that a worker serves.

    Raises:
        ArtifactError: there is no detector in `folder`.
        MissingDependencyError: PyTorch sees no such device.
    """
    torch.set_num_threads(threads)
    if device == "cuda" and not torch.cuda.is_available():
        raise MissingDependencyError("PyTorch sees no CUDA device here; measure with --device cpu")
    detector = load_detector(folder)
    for module in detector.modules().values():
        module.to(device)
    run_form = FORMS[form](detector)

    @torch.inference_mode()
    def run(frame: ModelInput) -> MapAndTimes:
        arrays = (frame.image, *frame.cloud)
        tensors = [torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in arrays]
        return run_form(*tensors).cpu().numpy(), {}

    encoders = typed(detector.record["encoders"], dict[str, Encoder], "detector.json", "Train it again")
    return Runner(
        run,
        Preprocessing.from_json(detector.record["preprocessing"]),
        {
            "runtime": f"PyTorch {torch.__version__} eager",
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "precision": "fp32",
            "lattice": "all",
            "layout": form,
            "threads": threads,
            "weights": f"{weights_line(encoders)}; {heads_line(form, detector)}",
            "parameter_bytes": sum(
                p.numel() * p.element_size() for m in detector.modules().values() for p in m.parameters()
            ),
        },
        torch.cuda.max_memory_allocated if device == "cuda" else None,
    )
