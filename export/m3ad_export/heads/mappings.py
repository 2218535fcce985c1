"""Mappings between the two modalities' features, of CFM and CMDR-IAD, whole and with their first layers on the tokens.

References:
    CFM (Costanzino et al. 2024)  https://github.com/CVLAB-Unibo/crossmodal-feature-mapping
    CMDR-IAD  https://github.com/ECGAI-Research/CMDR-IAD
Parameter names are those of the authors' files; `heads.Mapping` is CFM's own.
"""

import copy

import torch.nn.functional as F
from torch import Tensor, nn

from m3ad_export.heads.fold import fold_norm
from m3ad_export.heads.fused import linear
from m3ad_export.heads.mentor import Mapping
from m3ad_export.heads.tiled import FusedHead

BIG_LAYERS = tuple(f"projection_{letter}" for letter in "abcde")
DROPOUT = 0.1


def two_normed_layers(width_in: int, width: int) -> nn.Sequential:
    """Linear, GELU, LN, Dropout, Linear, GELU, LN: what every network of CMDR-IAD has near its input."""
    first = (nn.Linear(width_in, width), nn.GELU(), nn.LayerNorm(width), nn.Dropout(DROPOUT))
    return nn.Sequential(*first, nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))


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
        return behind_first(self, self.input(x))


class CrossMap(nn.Module):
    """CMDR-IAD's mapping, normed between its layers: [R, in] -> [R, out]."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        hidden = (width_in + width_out) // 2
        self.input = nn.Linear(width_in, hidden)
        self.projection = two_normed_layers(hidden, hidden)
        self.output = nn.Linear(hidden, width_out)

    def forward(self, x: Tensor) -> Tensor:
        return behind_first(self, self.input(x))


AnyMapping = Mapping | BigMapping | CrossMap


def behind_first(mapping: AnyMapping, hidden: Tensor) -> Tensor:
    """A mapping from its first layer's output on, bias included: [R, H] -> [R, out]."""
    if isinstance(mapping, CrossMap):
        return mapping.output(mapping.projection(F.gelu(hidden)))
    names = BIG_LAYERS if isinstance(mapping, BigMapping) else ("projection",)
    for name in names:
        hidden = getattr(mapping, name)(F.gelu(hidden))
    return mapping.output(F.gelu(hidden))


def folded_map(mapping: CrossMap) -> CrossMap:
    """The same function in eval mode with both LN affines in the layers behind them."""
    folded = copy.deepcopy(mapping)
    projection = folded.projection
    projection[2], projection[4] = fold_norm(mapping.projection[2], mapping.projection[4])
    projection[6], folded.output = fold_norm(mapping.projection[6], mapping.output)
    return folded.requires_grad_(False).eval()


class Mappings(nn.Module):
    """rgb_features [R, D], xyz_features [R, D'] -> rgb_reconstructed [R, D], xyz_reconstructed [R, D']."""

    def __init__(self, to_xyz: AnyMapping, to_rgb: AnyMapping) -> None:
        super().__init__()
        self.to_xyz, self.to_rgb = to_xyz, to_rgb

    def forward(self, rgb: Tensor, xyz: Tensor) -> tuple[Tensor, Tensor]:
        return self.to_rgb(xyz), self.to_xyz(rgb)


class MapTokens(nn.Module):
    """rgb_tokens [P, D], xyz_tokens [G, D'] -> rgb_map [P, H], xyz_map [G, H]: both first layers.

    Bilinear weights sum to one, so rgb_map has its bias; those of pooling do not at the foreground's border, so xyz_map
    gets it behind the spread.
    """

    def __init__(self, networks: Mappings) -> None:
        super().__init__()
        self.rgb_map = linear(networks.to_xyz.input.weight, networks.to_xyz.input.bias)
        self.xyz_map = linear(networks.to_rgb.input.weight)

    def forward(self, rgb_tokens: Tensor, xyz_tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.rgb_map(rgb_tokens), self.xyz_map(xyz_tokens)


class MapRows(nn.Module):
    """Projected tokens at T scored pixels, [T, H] each -> rgb_reconstructed [T, D], xyz_reconstructed [T, D']."""

    def __init__(self, networks: Mappings) -> None:
        super().__init__()
        self.networks = networks

    def forward(self, rgb_map: Tensor, xyz_map: Tensor) -> tuple[Tensor, Tensor]:
        to_rgb, to_xyz = self.networks.to_rgb, self.networks.to_xyz
        return behind_first(to_rgb, xyz_map + to_rgb.input.bias), behind_first(to_xyz, rgb_map)


def mapping_head(maps: Mappings, vote: nn.Module) -> FusedHead:
    """The fused head of two mappings: first layers on the tokens, the rest on rows, then `vote`."""
    projected = {"rgb_map": maps.to_xyz.input.out_features, "xyz_map": maps.to_rgb.input.out_features}
    outputs = {
        "rgb_reconstructed": maps.to_rgb.output.out_features,
        "xyz_reconstructed": maps.to_xyz.output.out_features,
    }
    return FusedHead(MapTokens(maps), projected, MapRows(maps), tuple(projected), outputs, vote)
