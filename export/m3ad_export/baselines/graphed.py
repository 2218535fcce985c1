"""A whole frame in PyTorch with the CUDA kernels between, in one CUDA graph, beside eager PyTorch on the same GPU.

`python -m m3ad_export.baselines.graphed KERNELS [--detector FOLDER]` is a step of `m3ad-plugins gpu`: KERNELS is the
library of `m3ad_plugins.gpu.kernels`. Without a detector the networks are Mentor3AD's at full size, weights random.
"""

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np
import torch
from m3ad.contract import IMAGE_SIZE
from m3ad.errors import M3adError
from m3ad.frame_settings import Preprocessing
from m3ad.scored import scored_pixels
from m3ad_plugins.gpu.cases import organised
from m3ad_plugins.gpu.steps import LACKS
from m3ad_runtime.stages import modality_of
from torch import Tensor

from m3ad_export.baselines.forms import cfm, dense, fused, fused_parts
from m3ad_export.dense.torch_ops import upsampled
from m3ad_export.detector import Detector
from m3ad_export.heads.mentor import HeadConfig
from m3ad_export.heads.tiled import spread_names, tile_scores
from m3ad_export.heads.voting import VotingConfig, map_names
from m3ad_export.methods.mentor3ad import build
from m3ad_export.nets.configs import RGB_ENCODERS, XyzEncoderConfig
from m3ad_export.nets.point_mae import PointMaeEncoder
from m3ad_export.nets.vit import VisionTransformer
from m3ad_export.saved import load_detector

POINTS = 21_600  # of the frame, as in the CPU's figures
ROUNDS, WARMUP = 20, 3
TOLERANCE = 1e-3  # of the largest value of the map: fp32 sums of another order


class FrameOps(Protocol):
    """The custom ops on tensors of one device."""

    def point_group(
        self, points: Tensor, groups: int, size: int, min_norm_sq: float
    ) -> tuple[Tensor, Tensor]:
        """points [N, 3] -> idx [G] int32, neighborhood [G, S, 3]."""

    def rows(
        self, points: Tensor, point_pixel: Tensor, centers: Tensor, tokens: Tensor, at: Tensor
    ) -> Tensor:
        """Tokens [G, D] interpolated at pixels [R] -> [R, D]."""


class Kernels:
    """The launchers of the CUDA kernels on PyTorch's current stream; nothing waits for the GPU."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        for name in ("workspaceKnnGroup", "workspaceTokenInterpolate"):
            getattr(self._library, name).restype = ctypes.c_size_t

    def point_group(
        self, points: Tensor, groups: int, size: int, min_norm_sq: float
    ) -> tuple[Tensor, Tensor]:
        idx = torch.empty(groups, dtype=torch.int32, device=points.device)
        neighborhood = points.new_empty(groups, size, 3)
        knn = torch.empty(groups, size, dtype=torch.int32, device=points.device)
        attributes = (len(points), groups, ctypes.c_float(min_norm_sq), size)
        scratch = self._library.workspaceKnnGroup(len(points))
        self._launch("PointGroup", (idx, neighborhood, knn, points), attributes, scratch)
        return idx, neighborhood

    def rows(
        self, points: Tensor, point_pixel: Tensor, centers: Tensor, tokens: Tensor, at: Tensor
    ) -> Tensor:
        made = tokens.new_empty(len(at), tokens.shape[1])
        is_half = ctypes.c_bool(tokens.dtype == torch.float16)
        sizes = (len(points), *tokens.shape, len(at), is_half, IMAGE_SIZE, IMAGE_SIZE)
        tensors = (made, points, point_pixel, centers.contiguous(), tokens.contiguous(), at)
        self._launch("TokenInterpolate", tensors, sizes, self._library.workspaceTokenInterpolate(IMAGE_SIZE))
        return made

    def _launch(self, name: str, tensors: tuple[Tensor, ...], plain: tuple[Any, ...], scratch: int) -> None:
        workspace = torch.empty(scratch, dtype=torch.uint8, device=tensors[0].device)
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (*tensors, workspace)]
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        status = getattr(self._library, f"launch{name}")(*pointers[:-1], *plain, pointers[-1], stream)
        if status != 0:
            raise M3adError(f"{name} failed with CUDA error {status}")


def with_ops(detector: Detector, ops: FrameOps) -> Callable[..., Tensor]:
    """The fused head on scored pixels, sampling, grouping and interpolation by `ops`.

    The form takes image, points, point_pixel and scored_pixel, and returns the anomaly map; no size depends on data and
    nothing is read back, so it can be captured in a CUDA graph.
    """
    head, pairs = fused_parts(detector)
    rgb_encoder, xyz_encoder = detector.encoders
    config = xyz_encoder.config

    def run(image: Tensor, points: Tensor, point_pixel: Tensor, scored_pixel: Tensor) -> Tensor:
        idx, neighborhood = ops.point_group(points, config.groups, config.group_size, config.min_norm_sq)
        centers = points.index_select(0, idx)
        own = {"rgb_tokens": rgb_encoder(image), "xyz_tokens": xyz_encoder(neighborhood, centers)}
        tokens = {**own, **dict(zip(head.projected, head.tokens(*own.values()), strict=True))}
        spread = {
            name: upsampled(tokens[name], rgb_encoder.config.side).index_select(0, scored_pixel)
            if modality_of(name) == "rgb"
            else ops.rows(points, point_pixel, centers, tokens[name], scored_pixel)
            for name in spread_names(head, pairs)
        }
        anomaly_map: Tensor = head.vote(tile_scores(head, pairs, spread), scored_pixel)[0]
        return anomaly_map

    return run


def random_detector() -> Detector:
    """Mentor3AD at full size, ViT-B/8 and Point-MAE, with seeded random weights."""
    rgb, xyz = RGB_ENCODERS["dino_vitb8"], XyzEncoderConfig()
    heads = HeadConfig(rgb_width=rgb.token_width, xyz_width=xyz.token_width, mentor_width=256)
    record = {
        "method": "mentor3ad",
        "category": "random weights",
        "encoders": {"rgb": asdict(rgb), "xyz": asdict(xyz)},
        "heads": asdict(heads),
        "voting": asdict(VotingConfig()),
        "preprocessing": Preprocessing().to_json(),
        "threshold": {"value": 0.0},
    }
    torch.manual_seed(0)
    detector = Detector(
        VisionTransformer(rgb), PointMaeEncoder(xyz), build(record), record, len(map_names(VotingConfig()))
    )
    for module in detector.modules().values():
        module.requires_grad_(False).eval()
    return detector


def captured(form: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    """The form on these very tensors as one CUDA graph."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries allocate at their first call, which a graph may not
        for _ in range(WARMUP):
            form(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = form(*inputs)

    def run() -> Tensor:
        graph.replay()
        return result

    return run


def measured(
    forms: dict[str, Callable[[], Tensor]], wait: Callable[[], None], rounds: int = ROUNDS
) -> dict[str, float]:
    """Time the forms in turn; the first's time is what the others are held against.

    Args:
        forms: by name.
        wait: returns once the device has nothing left to do.
        rounds: how often each runs, warm-up on top.

    Returns:
        Median milliseconds of each form, and how many times as long as the first it takes.
    """
    times: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(WARMUP + rounds):
        for name, form in forms.items():
            wait()
            started = time.perf_counter()
            form()
            wait()
            if turn >= WARMUP:
                times[name].append((time.perf_counter() - started) * 1e3)
    first, *others = forms
    figures = {f"{name} ms": round(median(times[name]), 3) for name in forms}
    for name in others:
        ratios = [other / own for other, own in zip(times[name], times[first], strict=True)]
        figures[f"{name} over {first}"] = round(median(ratios), 3)
    return figures


def require_same_map(found: Tensor, expected: Tensor) -> float:
    """The largest difference of two maps over the largest value.

    Raises:
        M3adError: it is larger than rounding explains, or a map is not finite.
    """
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE:
        raise M3adError(
            f"the map in the CUDA graph differs from the dense form's by {difference:.1e} of its largest value, "
            f"expected at most {TOLERANCE:.0e}"
        )
    return difference


@torch.inference_mode()
def main() -> None:
    """Measure and print one JSON document."""
    parser = argparse.ArgumentParser(prog="python -m m3ad_export.baselines.graphed", description=__doc__)
    parser.add_argument("kernels", type=Path)
    parser.add_argument("--detector", type=Path)
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stderr.write("PyTorch sees no CUDA device: it is built for the CPU, or the driver is missing\n")
        sys.exit(LACKS)
    try:
        detector = load_detector(chosen.detector) if chosen.detector else random_detector()
        for module in detector.modules().values():
            module.to("cuda")
        points, pixel = organised(0, IMAGE_SIZE, POINTS)
        image = np.random.default_rng(0).normal(size=(1, 3, IMAGE_SIZE, IMAGE_SIZE)).astype(np.float32)
        arrays = (image, points, pixel, scored_pixels(pixel))
        inputs = tuple(torch.from_numpy(array).to("cuda") for array in arrays)
        form = with_ops(detector, Kernels(chosen.kernels))
        eager = {"fused eager": fused(detector), "dense eager": dense(detector), "CFM eager": cfm(detector)}
        forms: dict[str, Callable[[], Tensor]] = {
            "kernels in a CUDA graph": captured(form, inputs),
            "kernels eager": lambda: form(*inputs),
            **{name: (lambda run=run: run(*inputs[:3])) for name, run in eager.items()},  # type: ignore[misc]
        }
        difference = require_same_map(forms["kernels in a CUDA graph"](), forms["dense eager"]())
        figures = measured(forms, torch.cuda.synchronize)
    except M3adError as error:
        sys.exit(f"error: {error}")
    figures["largest difference of the map"] = float(f"{difference:.1e}")
    figures["peak memory of all forms MiB"] = torch.cuda.max_memory_allocated() // 2**20
    print(json.dumps({"weights": "detector" if chosen.detector else "random", **figures}))  # noqa: T201


if __name__ == "__main__":
    main()
