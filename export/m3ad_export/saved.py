"""A detector's folder: `detector.pt` with every network, `detector.json` with the record."""

from pathlib import Path
from typing import Any

from m3ad.bundle import write_json
from m3ad.errors import ArtifactError
from m3ad.typed_json import read_json

from m3ad_export.checkpoints import load_strictly, read_checkpoint, save_checkpoint
from m3ad_export.detector import Detector
from m3ad_export.methods import IMPLEMENTATIONS
from m3ad_export.nets.configs import EfficientNetConfig, RgbEncoderConfig, WideResNetConfig, XyzEncoderConfig
from m3ad_export.nets.efficientnet import EfficientNet
from m3ad_export.nets.point_mae import PointMaeEncoder
from m3ad_export.nets.vit import VisionTransformer
from m3ad_export.nets.wide_resnet import WideResNet


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
    advice = "train one: m3ad-export train"
    if not (folder / "detector.json").is_file():
        raise ArtifactError(f"{folder} holds no detector of this version (no detector.json); {advice}")
    record = read_json(folder / "detector.json", advice.capitalize())
    try:
        method = IMPLEMENTATIONS[record["method"]]
        encoders = {side: _without(values, "weights") for side, values in record["encoders"].items()}
        detector = Detector(
            VisionTransformer(RgbEncoderConfig(**encoders["rgb"])) if "rgb" in encoders else None,
            PointMaeEncoder(XyzEncoderConfig(**encoders["xyz"])) if "xyz" in encoders else None,
            method.build(record),
            record,
            len(method.score_maps(record)),
            WideResNet(WideResNetConfig(**encoders["teacher"])) if "teacher" in encoders else None,
            EfficientNet(EfficientNetConfig(**encoders["efficientnet"]))
            if "efficientnet" in encoders
            else None,
        )
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ArtifactError(f"{folder} holds no detector of this version ({error}); {advice}") from error
    states = read_checkpoint(folder / "detector.pt")
    for name, network in detector.modules().items():
        load_strictly(network, states.get(name, {}), folder / "detector.pt")
        network.requires_grad_(False).eval()
    return detector


def _without(values: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in values.items() if k != key}
