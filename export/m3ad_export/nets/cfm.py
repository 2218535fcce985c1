"""CFM: each modality's features mapped to the other's; where a part is as it should be, both mappings meet.

References:
    CFM (Costanzino et al. 2024)  https://github.com/CVLAB-Unibo/crossmodal-feature-mapping (non-commercial)
Two forms. The chain `CfmMap` -> `CfmVote` on the rows of the scored pixels; and the fused one, `CfmTokens` (first
layers on the tokens) -> `CfmRows` (the rest, tile by tile) -> `ChordProduct`, which has the same map.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3ad_export.fused import linear
from m3ad_export.heads import Mapping
from m3ad_export.nets.map_head import ChordProduct, ImageNorm
from m3ad_export.nets.official_files import load_frozen, official_file, official_state
from m3ad_export.voting import cosine_scores
from m3ad_export.weights import WeightsInfo

LICENCE = "non-commercial"
RGB_WIDTH, XYZ_WIDTH = 768, 1152
BIG_LAYERS = tuple(f"projection_{letter}" for letter in "abcde")


class BigMapping(nn.Module):
    """CFM's `_big` mapping, by its author the one of Eyecandies: five hidden layers for one, [R, in] -> [R, out]."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        hidden = (width_in + width_out) // 2
        self.input = nn.Linear(width_in, hidden)
        for name in BIG_LAYERS:
            self.add_module(name, nn.Linear(hidden, hidden))
        self.output = nn.Linear(hidden, width_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(hidden_layers(self, self.input(x)))


AnyMapping = Mapping | BigMapping


def hidden_layers(mapping: AnyMapping, x: Tensor) -> Tensor:
    """What lies between a mapping's first layer and its last: [R, H] -> [R, H]."""
    layers = (
        [mapping.projection] if isinstance(mapping, Mapping) else [getattr(mapping, n) for n in BIG_LAYERS]
    )
    for layer in layers:
        x = layer(F.gelu(x))
    return F.gelu(x)


class CfmMap(nn.Module):
    """rgb_features [R, D], xyz_features [R, D'] -> rgb_reconstructed [R, D], xyz_reconstructed [R, D']."""

    def __init__(self, to_xyz: AnyMapping, to_rgb: AnyMapping) -> None:
        super().__init__()
        self.to_xyz, self.to_rgb = to_xyz, to_rgb

    def forward(self, rgb: Tensor, xyz: Tensor) -> tuple[Tensor, Tensor]:
        return self.to_rgb(xyz), self.to_xyz(rgb)


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


class CfmTokens(nn.Module):
    """rgb_tokens [P, D], xyz_tokens [G, D'] -> rgb_map [P, H], xyz_map [G, H]: both first layers.

    Bilinear weights sum to one, so rgb_map has its bias; those of pooling do not at the foreground's border, so xyz_map
    gets it behind the spread.
    """

    def __init__(self, networks: CfmMap) -> None:
        super().__init__()
        self.rgb_map = linear(networks.to_xyz.input.weight, networks.to_xyz.input.bias)
        self.xyz_map = linear(networks.to_rgb.input.weight)

    def forward(self, rgb_tokens: Tensor, xyz_tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.rgb_map(rgb_tokens), self.xyz_map(xyz_tokens)


class CfmRows(nn.Module):
    """Rows of the two tables at T scored pixels, [T, H] -> rgb_reconstructed [T, D], xyz_reconstructed [T, D']."""

    def __init__(self, networks: CfmMap) -> None:
        super().__init__()
        self.networks = networks

    def forward(self, rgb_map: Tensor, xyz_map: Tensor) -> tuple[Tensor, Tensor]:
        to_rgb, to_xyz = self.networks.to_rgb, self.networks.to_xyz
        rgb = to_rgb.output(hidden_layers(to_rgb, xyz_map + to_rgb.input.bias))
        return rgb, to_xyz.output(hidden_layers(to_xyz, rgb_map))


def random_networks(
    rgb_width: int = RGB_WIDTH, xyz_width: int = XYZ_WIDTH, *, big: bool = False, seed: int = 115
) -> CfmMap:
    """Both mappings untrained, PyTorch's default initialisation under a seed."""
    kind = BigMapping if big else Mapping
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CfmMap(kind(rgb_width, xyz_width), kind(xyz_width, rgb_width))


def load_official(folder: Path, category: str) -> tuple[CfmMap, dict[str, WeightsInfo]]:
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
    return CfmMap(*networks), dict(zip(("to_xyz", "to_rgb"), infos, strict=True))
