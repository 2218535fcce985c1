"""What a frame rate is measured against, in plain eager PyTorch with the detector's own frozen encoders.

`python -m m3ad_export.baselines FORM DETECTOR` is the process that `m3ad-client bench --baseline FORM` talks to.

    dense   the chain as one writes it: every pixel through MFM -> MGM -> MFM -> VM, no identity used; same map as ours
    cfm     CFM's published graph: its own grouping and interpolation, its two MLPs on every pixel, its scoring
    fused   the fused head in PyTorch, for a device on which no engine runs yet

References:
    CFM (Costanzino et al. 2024)  https://github.com/CVLAB-Unibo/crossmodal-feature-mapping
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from m3ad.contract import IMAGE_SIZE
from m3ad.errors import MissingDependencyError
from m3ad.manifest import Encoder
from m3ad.pipeline import weights_line
from m3ad.preprocess import ModelInput, Preprocessing
from m3ad.stages import by_modality
from m3ad.typed_json import typed
from m3ad.worker import MapAndTimes, Runner
from torch import Tensor

from m3ad_export.baselines.torch_ops import (
    distances,
    farthest_points,
    interpolated,
    normalised_inverse,
    pooled,
    scored_pixels,
    three_nearest,
    upsampled,
)
from m3ad_export.detector import Detector, load_detector
from m3ad_export.heads.fused import TABLES, HeadRows, HeadTokens, tile_scores
from m3ad_export.heads.mentor import Mapping
from m3ad_export.heads.voting import score, smooth

Form = Callable[[Tensor, Tensor, Tensor], Tensor]  # image, points, point_pixel -> anomaly map [224, 224]
ROWS_AT_ONCE = 8192


def dense(detector: Detector) -> Form:
    """Mentor3AD on every pixel of the grid; its map is the chain's."""

    def run(image: Tensor, points: Tensor, point_pixel: Tensor) -> Tensor:
        rgb_tokens, centers, xyz_tokens = _tokens(detector, image, points)
        rgb = upsampled(rgb_tokens, detector.rgb.config.side)
        xyz = pooled(interpolated(xyz_tokens, *three_nearest(points, centers)), point_pixel)
        mentor = detector.mfm(rgb, xyz)
        rgb_again, xyz_again = detector.mgm(rgb, xyz, mentor)
        mentor_again = detector.mfm(rgb_again, xyz_again)
        pairs = ((rgb, rgb_again), (xyz, xyz_again), (mentor, mentor_again))
        pixel = scored_pixels(point_pixel)
        anomaly_map: Tensor = detector.vm.voted(torch.stack([score(a, b)[pixel] for a, b in pairs]), pixel)[0]
        return anomaly_map

    return run


def cfm(detector: Detector) -> Form:
    """CFM on the same encoders; its MLPs have random weights, which cost what trained ones do.

    m = f(|unit F~_RGB - unit F_RGB| |unit F~_XYZ - unit F_XYZ|), then m / sqrt(mean of m where it is not 0)
    """
    rgb_width, xyz_width = detector.dims.rgb_width, detector.dims.xyz_width
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        device = next(detector.rgb.parameters()).device
        to_xyz = Mapping(rgb_width, xyz_width).to(device).requires_grad_(False)
        to_rgb = Mapping(xyz_width, rgb_width).to(device).requires_grad_(False)
    config = detector.xyz.config

    def grouped(points: Tensor) -> tuple[Tensor, Tensor]:
        centers = points[farthest_points(points, config.groups, config.min_norm_sq)]
        distance = torch.norm(points[:, None] - centers[None], dim=2)  # [N, G, 3] is formed, as published
        nearest = distance.topk(config.group_size, dim=0, largest=False).indices.T
        return points[nearest] - centers[:, None], centers

    def three(points: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
        squared = (
            points.square().sum(1)[:, None] + centers.square().sum(1)[None] - 2 * points @ centers.T
        )  # the expanded form, and the whole row sorted, as published
        distance, order = squared.sort(dim=1)
        return order[:, :3], normalised_inverse(distance[:, :3])

    def run(image: Tensor, points: Tensor, point_pixel: Tensor) -> Tensor:
        rgb_tokens = detector.rgb(image)
        neighborhood, centers = grouped(points)
        xyz_tokens = detector.xyz(neighborhood, centers)
        rgb = upsampled(rgb_tokens, detector.rgb.config.side)
        xyz = pooled(interpolated(xyz_tokens, *three(points, centers)), point_pixel)
        errors = [
            torch.linalg.vector_norm(F.normalize(found) - F.normalize(real), dim=1)
            for found, real in ((to_rgb(xyz), rgb), (to_xyz(rgb), xyz))
        ]
        mask = torch.zeros_like(errors[0])
        mask[scored_pixels(point_pixel)] = 1
        product = (errors[0] * mask * errors[1] * mask).reshape(1, IMAGE_SIZE, IMAGE_SIZE)
        smoothed = smooth(product)[0]
        return smoothed / smoothed[smoothed != 0].mean().sqrt()

    return run


def fused(detector: Detector) -> Form:
    """First layers on the tokens and scored pixels only, tile by tile; its map is the chain's."""
    tokens, rows = HeadTokens(detector.mfm, detector.mgm), HeadRows(detector.mfm, detector.mgm)

    def run(image: Tensor, points: Tensor, point_pixel: Tensor) -> Tensor:
        rgb_tokens, centers, xyz_tokens = _tokens(detector, image, points)
        rgb, xyz = by_modality(dict(zip(TABLES, tokens(rgb_tokens, xyz_tokens), strict=True)))
        pixel = scored_pixels(point_pixel)
        three = three_nearest(points, centers)
        spread = {name: upsampled(table, detector.rgb.config.side)[pixel] for name, table in rgb.items()}
        for name, table in xyz.items():
            spread[name] = pooled(interpolated(table, *three), point_pixel)[pixel]
        tiles = zip(*(torch.split(each, ROWS_AT_ONCE) for each in spread.values()), strict=True)
        scores = torch.cat([tile_scores(rows, dict(zip(spread, tile, strict=True))) for tile in tiles], dim=1)
        anomaly_map: Tensor = detector.vm.voted(scores, pixel)[0]
        return anomaly_map

    return run


FORMS: dict[str, Callable[[Detector], Form]] = {"dense": dense, "cfm": cfm, "fused": fused}
HEAD_WEIGHTS = {"dense": "the detector's heads", "cfm": "random heads", "fused": "the detector's heads"}


def _tokens(detector: Detector, image: Tensor, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    config = detector.xyz.config
    centers = points[farthest_points(points, config.groups, config.min_norm_sq)]
    nearest = distances(centers, points).topk(config.group_size, dim=1, largest=False).indices
    return detector.rgb(image), centers, detector.xyz(points[nearest] - centers[:, None], centers)


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
        arrays = (frame.image, frame.points, frame.point_pixel)
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
            "layout": form,
            "threads": threads,
            "weights": f"{weights_line(encoders)}; {HEAD_WEIGHTS[form]}",
            "parameter_bytes": sum(
                p.numel() * p.element_size() for m in detector.modules().values() for p in m.parameters()
            ),
        },
        torch.cuda.max_memory_allocated if device == "cuda" else None,
    )
