"""CFM: each modality's features mapped to the other's; where a part is as it should be, both mappings meet.

References:
    CFM (Costanzino et al. 2024)  https://github.com/CVLAB-Unibo/crossmodal-feature-mapping (non-commercial)
Two forms. The chain `Mappings` -> `CfmVote` on the rows of the scored pixels; and the fused one, `MapTokens` (first
layers on the tokens) -> `MapRows` (the rest, tile by tile) -> `ChordProduct`, which has the same map.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from m3ad_export.heads.mentor import Mapping
from m3ad_export.heads.voting import cosine_scores
from m3ad_export.methods.map_head import ChordProduct, ImageNorm
from m3ad_export.methods.mappings import BIG_LAYERS, AnyMapping, BigMapping, Mappings
from m3ad_export.methods.official_files import load_frozen, official_file, official_state
from m3ad_export.weights import WeightsInfo

LICENCE = "non-commercial"
RGB_WIDTH, XYZ_WIDTH = 768, 1152


class CfmVote(nn.Module):
    """Two pairs of rows and scored_pixel [R] -> anomaly_map [224, 224], score [1], score_maps [3, 224, 224]."""

    def __init__(self, image_norm: ImageNorm = "none") -> None:
        super().__init__()
        self.combine = ChordProduct(image_norm)

    def forward(
        self,
        rgb: Tensor,
        rgb_reconstructed: Tensor,
        xyz: Tensor,
        xyz_reconstructed: Tensor,
        scored_pixel: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        scores = cosine_scores((rgb, rgb_reconstructed), (xyz, xyz_reconstructed))
        voted: tuple[Tensor, Tensor, Tensor] = self.combine(scores, scored_pixel)
        return voted


def random_networks(
    rgb_width: int = RGB_WIDTH, xyz_width: int = XYZ_WIDTH, *, big: bool = False, seed: int = 115
) -> Mappings:
    """Both mappings untrained, PyTorch's default initialisation under a seed."""
    kind = BigMapping if big else Mapping
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Mappings(kind(rgb_width, xyz_width), kind(xyz_width, rgb_width))


def load_official(folder: Path, category: str) -> tuple[Mappings, dict[str, WeightsInfo]]:
    """CFM_{2Dto3D,3Dto2D}_<category>_<E>ep_<B>bs.pth of a category, small or `_big` as the files are.

    Returns:
        The networks, frozen, and what the weights of `to_xyz` and `to_rgb` are.

    Raises:
        ArtifactError: a file is missing, there are several, or it is not CFM's; the message names the keys.
    """
    networks: list[AnyMapping] = []
    infos = []
    for direction, widths in (("2Dto3D", (RGB_WIDTH, XYZ_WIDTH)), ("3Dto2D", (XYZ_WIDTH, RGB_WIDTH))):
        path = official_file(folder, category, f"CFM_{direction}_{category}_*.pth")
        big = f"{BIG_LAYERS[0]}.weight" in official_state(path)
        networks.append((BigMapping if big else Mapping)(*widths))
        infos.append(load_frozen(networks[-1], path, LICENCE))
    return Mappings(*networks), dict(zip(("to_xyz", "to_rgb"), infos, strict=True))
