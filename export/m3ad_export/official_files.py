"""The per-category files in which the authors keep their heads: one file a network, of CRD one with both students.

Those of CFM and CMDR-IAD were trained on features of DINO ViT-B/8 and of Point-MAE with 128 neighbours, batch
statistics of the frame. Other encoders may give features as wide; the heads would then say nothing of them.
"""

from pathlib import Path

from m3ad.bundle import sha256_of
from m3ad.errors import ArtifactError, M3adError
from torch import nn

from m3ad_export.checkpoints import State, load_strictly, read_checkpoint, tensors_of
from m3ad_export.nets.configs import EfficientNetConfig, RgbEncoderConfig, WideResNetConfig, XyzEncoderConfig
from m3ad_export.weights import WeightsInfo

TEACHER, EFFICIENTNET = WideResNetConfig().name, EfficientNetConfig().name
RGB_ENCODER, XYZ_ENCODER = "dino_vitb8", XyzEncoderConfig(group_size=128, bn_mode="sample")


def require_official_encoders(
    rgb: RgbEncoderConfig | None,
    rgb_weights: WeightsInfo | None,
    xyz: XyzEncoderConfig | None,
    xyz_weights: WeightsInfo | None,
    teacher_weights: WeightsInfo | None = None,
    efficientnet_weights: WeightsInfo | None = None,
) -> None:
    """Refuse encoders that the authors' heads were not trained on; None is a modality that is left out.

    Raises:
        M3adError: one is another network, groups otherwise, or has random weights.
    """
    wrong = []
    if rgb and rgb_weights and (rgb.name != RGB_ENCODER or rgb_weights.kind != "pretrained"):
        wrong.append(f"{rgb.name} with {rgb_weights.kind} weights")
    if xyz and xyz_weights and (xyz != XYZ_ENCODER or xyz_weights.kind != "pretrained"):
        wrong.append(
            f"{xyz.name} with {xyz.group_size} neighbours, bn_mode {xyz.bn_mode}, {xyz_weights.kind} weights"
        )
    if teacher_weights and teacher_weights.kind != "pretrained":
        raise M3adError(
            f"the authors' students rebuild what torchvision's {TEACHER} sees, not a network with "
            f"{teacher_weights.kind} weights: add --teacher-weights FILE"
        )
    if efficientnet_weights and efficientnet_weights.kind != "pretrained":
        raise M3adError(
            f"the authors' networks see what the published {EFFICIENTNET} makes of an image, not a network with "
            f"{efficientnet_weights.kind} weights: add --efficientnet-weights FILE"
        )
    if wrong:
        raise M3adError(
            f"the authors' heads know nothing of features of {' and '.join(wrong)}; they were trained on pretrained "
            f"{RGB_ENCODER} and Point-MAE with {XYZ_ENCODER.group_size} neighbours: add --rgb-encoder {RGB_ENCODER} "
            f"--rgb-weights FILE --xyz-weights FILE"
        )


def official_file(folder: Path, category: str, pattern: str) -> Path:
    """The one file of a category that matches.

    Raises:
        ArtifactError: there is none, or several.
    """
    found = sorted((folder / category).glob(pattern))
    if len(found) != 1:
        raise ArtifactError(f"{folder / category} holds {len(found)} files {pattern}, expected one")
    return found[0]


def official_state(path: Path) -> State:
    """The state dict in a file.

    Raises:
        ArtifactError: it holds none.
    """
    return tensors_of(read_checkpoint(path), path)


def load_frozen(network: nn.Module, path: Path, licence: str, note: str = "") -> WeightsInfo:
    """Load a file into the network strictly; the network is then in eval mode and takes no gradient.

    Raises:
        ArtifactError: the file is not of this network; the message names the keys.
    """
    load_strictly(network, official_state(path), path)
    network.eval().requires_grad_(False)
    return WeightsInfo(name=path.name, kind="pretrained", sha256=sha256_of(path), licence=licence, note=note)
