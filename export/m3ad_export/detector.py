"""A trained detector in PyTorch: its encoders, its method's networks, and the record of how they came to be."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from m3ad.contract import Dims
from m3ad.frame_settings import Preprocessing
from m3ad.method import Contract
from m3ad.methods import contract_of
from torch import nn

from m3ad_export.nets.efficientnet import EfficientNet
from m3ad_export.nets.point_mae import PointMaeEncoder
from m3ad_export.nets.vit import VisionTransformer
from m3ad_export.nets.wide_resnet import WideResNet


@dataclass
class Detector:
    """The modules of a detector, in eval mode, and the record of how they came to be.

    Attributes:
        rgb: the RGB encoder, None where the method has none.
        xyz: the 3D encoder, likewise.
        networks: all else, as trained, by the names they are saved under.
        record: what the bundle's manifest says of the detector (method, category, encoders, preprocessing, threshold,
            training), JSON-able.
        score_maps: how many a frame has.
        teacher: the network whose levels of images are rebuilt, None where the method has none.
        efficientnet: the network whose features of images a flow learns, likewise.
    """

    rgb: VisionTransformer | None
    xyz: PointMaeEncoder | None
    networks: dict[str, nn.Module]
    record: dict[str, Any]
    score_maps: int
    teacher: WideResNet | None = None
    efficientnet: EfficientNet | None = None

    @property
    def dims(self) -> Dims:
        """The sizes of the detector's tensors."""
        sizes: dict[str, Any] = {"score_maps": self.score_maps}
        if self.rgb:
            sizes |= {"rgb_tokens": self.rgb.config.side**2, "rgb_width": self.rgb.config.token_width}
        if self.xyz:
            config = self.xyz.config
            sizes |= {
                "groups": config.groups,
                "group_size": config.group_size,
                "xyz_width": config.token_width,
                "min_norm_sq": config.min_norm_sq,
            }
        if self.teacher:
            sizes["rgb_width"] = self.teacher.config.channels[0]
        if self.efficientnet:
            sizes["rgb_width"] = self.efficientnet.config.channels
        heads = self.record.get("heads", {})
        if "groups" in heads:  # of a method that has no encoder of tokens but groups the cloud
            sizes |= {name: heads[name] for name in ("groups", "group_size", "xyz_width")}
        if "mentor_width" in heads:
            sizes["mentor_width"] = heads["mentor_width"]
        return Dims(**sizes)

    @property
    def contract(self) -> Contract:
        """What crosses the stage boundaries of this detector."""
        return contract_of(self.record["method"], self.dims, self.preprocessing.lattice)

    @property
    def preprocessing(self) -> Preprocessing:
        """What is done with a frame before the first stage."""
        return Preprocessing.from_json(self.record["preprocessing"])

    @property
    def encoders(self) -> tuple[VisionTransformer, PointMaeEncoder]:
        """Both encoders, of a method that has both."""
        assert self.rgb
        assert self.xyz
        return self.rgb, self.xyz

    def modules(self) -> dict[str, nn.Module]:
        """Every module by the name it is saved under."""
        encoders = {
            "rgb_extractor": self.rgb,
            "xyz_encoder": self.xyz,
            "teacher": self.teacher,
            "efficientnet": self.efficientnet,
        }
        return {**{name: module for name, module in encoders.items() if module}, **self.networks}


def call(module: nn.Module, *arrays: npt.NDArray[Any]) -> tuple[npt.NDArray[np.float32], ...]:
    """Run a module on arrays without gradients; a single output comes back as a tuple of one."""
    with torch.inference_mode():
        outputs = module(*(torch.from_numpy(np.ascontiguousarray(a)) for a in arrays))
    many = outputs if isinstance(outputs, tuple) else (outputs,)
    return tuple(o.numpy() for o in many)
