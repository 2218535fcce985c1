"""A trained detector in PyTorch: the modules of every stage, and the same stages as functions of arrays.

The functions run in `m3ad.pipeline.Pipeline` like any runtime's; with the ops' NumPy reference between the modules they
are the form every other one is held against.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from m3ad.bundle import write_json
from m3ad.contract import IMAGE_SIZE, Dims, stages
from m3ad.errors import ArtifactError
from m3ad.stages import Ops, Project, StageFunction, bilinear_taps
from torch import Tensor, nn

from m3ad_export.checkpoints import load_strictly, read_checkpoint, save_checkpoint
from m3ad_export.heads.mentor import HeadConfig, Mfm, Mgm
from m3ad_export.heads.voting import Vm, VotingConfig, map_names
from m3ad_export.nets.point_mae import PointMaeEncoder, XyzEncoderConfig
from m3ad_export.nets.vit import RgbEncoderConfig, VisionTransformer


class RgbRows(nn.Module):
    """rgb_tokens [P, D], scored_pixel [R] int32 -> rgb_features [R, D].

    Bilinear, align_corners=False, from the P tokens' square grid to 224 x 224, at the scored pixels only.
    """

    taps: Tensor
    weights: Tensor

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side
        taps, weights = bilinear_taps(side)
        self.register_buffer("taps", torch.from_numpy(taps).long())  # [224, 2]
        self.register_buffer("weights", torch.from_numpy(weights))  # [224, 2]

    def forward(self, tokens: Tensor, scored_pixel: Tensor) -> Tensor:
        pixel = scored_pixel.long()
        y, x = pixel // IMAGE_SIZE, pixel % IMAGE_SIZE
        weights_y, weights_x = self.weights.index_select(0, y), self.weights.index_select(0, x)  # [R, 2]
        taps_y, taps_x = self.taps.index_select(0, y) * self.side, self.taps.index_select(0, x)  # [R, 2]
        corners = [
            (weights_y[:, i : i + 1] * weights_x[:, j : j + 1])
            * tokens.index_select(0, taps_y[:, i] + taps_x[:, j])
            for i in range(2)
            for j in range(2)
        ]
        return (corners[0] + corners[1]) + (corners[2] + corners[3])


@dataclass
class Detector:
    """The modules of a detector, in eval mode, and the record of how they came to be.

    Attributes:
        record: what the bundle's manifest says of the detector (category, encoders, heads, preprocessing, threshold,
            training), JSON-able.
    """

    rgb: VisionTransformer
    xyz: PointMaeEncoder
    mfm: Mfm
    mgm: Mgm
    vm: Vm
    record: dict[str, Any]

    @property
    def dims(self) -> Dims:
        """The sizes of the detector's tensors."""
        xyz = self.xyz.config
        return Dims(
            rgb_tokens=self.rgb.config.side**2,
            rgb_width=self.rgb.config.token_width,
            groups=xyz.groups,
            group_size=xyz.group_size,
            xyz_width=xyz.token_width,
            mentor_width=self.mfm.config.mentor_width,
            score_maps=len(map_names(self.vm.config)),
            min_norm_sq=xyz.min_norm_sq,
        )

    def modules(self) -> dict[str, nn.Module]:
        """Every module by the name of the stage it is the dense part of."""
        return {
            "rgb_extractor": self.rgb,
            "xyz_encoder": self.xyz,
            "mfm": self.mfm,
            "mgm": self.mgm,
            "vm": self.vm,
        }

    def stage_functions(self, ops: Ops) -> dict[str, StageFunction]:
        """Each stage of the chain layout in PyTorch, with these ops between the modules."""
        dims = self.dims

        def xyz_extractor(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
            points = arrays["points"]
            idx = ops.farthest_point_sample(points, dims.groups, self.xyz.config.min_norm_sq)
            neighborhood, _ = ops.knn_group(points, idx, dims.group_size)
            (tokens,) = call(self.xyz, neighborhood, points[idx])
            return {"centers": points[idx], "xyz_tokens": tokens}

        def module_stage(
            module: nn.Module, inputs: tuple[str, ...], outputs: tuple[str, ...]
        ) -> StageFunction:
            def run(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
                return dict(zip(outputs, call(module, *(arrays[n] for n in inputs)), strict=True))

            return run

        table = stages(dims)
        dense = {
            name: module_stage(
                module, tuple(t.name for t in table[name].inputs), tuple(t.name for t in table[name].outputs)
            )
            for name, module in self.modules().items()
            if name in table
        }
        return {**dense, "xyz_extractor": xyz_extractor, "project": Project(dims, ops)}


def call(module: nn.Module, *arrays: npt.NDArray[Any]) -> tuple[npt.NDArray[np.float32], ...]:
    """Run a module on arrays without gradients; a single output comes back as a tuple of one."""
    with torch.inference_mode():
        outputs = module(*(torch.from_numpy(np.ascontiguousarray(a)) for a in arrays))
    many = outputs if isinstance(outputs, tuple) else (outputs,)
    return tuple(o.numpy() for o in many)


def save_detector(detector: Detector, folder: Path) -> None:
    """Write `detector.pt` (every network) and `detector.json` (the record) into `folder`."""
    save_checkpoint(
        {name: network.state_dict() for name, network in detector.modules().items()}, folder / "detector.pt"
    )
    write_json(folder / "detector.json", detector.record)


def load_detector(folder: Path) -> Detector:
    """The detector that `train` left in `folder`, in eval mode.

    Raises:
        ArtifactError: there is none, or it is damaged or of another version.
    """
    try:
        record = json.loads((folder / "detector.json").read_text(encoding="utf-8"))
        rgb, xyz = record["encoders"]["rgb"], record["encoders"]["xyz"]
        heads = HeadConfig(**record["heads"])
        detector = Detector(
            VisionTransformer(RgbEncoderConfig(**_without(rgb, "weights"))),
            PointMaeEncoder(XyzEncoderConfig(**_without(xyz, "weights"))),
            Mfm(heads),
            Mgm(heads),
            Vm(VotingConfig(**record["voting"])),
            record,
        )
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{folder} holds no detector of this version ({error}); train one: m3ad-export train"
        ) from error
    states = read_checkpoint(folder / "detector.pt")
    for name, network in detector.modules().items():
        load_strictly(network, states.get(name, {}), folder / "detector.pt")
        network.requires_grad_(False).eval()
    return detector


def _without(values: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in values.items() if k != key}
