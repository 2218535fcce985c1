"""The fused head: MFM -> MGM -> MFM -> VM from tokens to the anomaly map, by identities that hold exactly.

What is linear is moved to where there is less of it: a first layer runs on a thousand tokens instead of on every pixel
(interpolation and pooling commute with it, its bias is added afterwards), and the second pass's first layer is merged
with MGM's last. Only scored pixels are computed, in tiles of a fixed number of rows, so that memory does not grow with
the part. Each rewrite is a function of the trained modules.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3ad_export.heads import Mapping, Mfm, Mgm
from m3ad_export.voting import CosineScores


def merged_linear(last: nn.Linear, first: nn.Linear) -> nn.Linear:
    """`first(last(x))` as one layer: W = W_first W_last, b = W_first b_last + b_first."""
    merged = nn.Linear(last.in_features, first.out_features)
    with torch.no_grad():
        merged.weight.copy_(first.weight.double() @ last.weight.double())
        merged.bias.copy_(first.weight.double() @ last.bias.double() + first.bias.double())
    return merged


def split_columns(layer: nn.Linear, width: int) -> tuple[Tensor, Tensor]:
    """The weight's columns for the first `width` inputs and for the rest: W [a, b] = W_a a + W_b b."""
    weight = layer.weight.detach()
    return weight[:, :width], weight[:, width:]


def first_layer_on_tokens(layers: list[Tensor]) -> Tensor:
    """First-layer weights stacked, so that one product with the tokens feeds them all: [sum of outs, D]."""
    return torch.cat(layers)


FIRST_LAYERS = ("rgb_mfm", "rgb_mgm", "xyz_mfm", "xyz_mgm")  # of HeadTokens, to HeadRows


class HeadTokens(nn.Module):
    """rgb_tokens [P, D], xyz_tokens [G, D] -> rgb_mfm [P, H], rgb_mgm [P, H'], xyz_mfm [G, H], xyz_mgm [G, H'].

    Every first layer that reads the tokens: MFM's, and MGM's of the mapping to the other modality. The RGB ones have
    their bias, because bilinear weights sum to one; those of pooling do not at the foreground's border, so the XYZ
    ones get theirs afterwards.
    """

    rgb_weight: Tensor
    rgb_bias: Tensor
    xyz_weight: Tensor

    def __init__(self, mfm: Mfm, mgm: Mgm) -> None:
        super().__init__()
        width = mfm.config.mentor_width
        to_xyz_rgb = split_columns(mgm.to_xyz.input, width)[1]
        to_rgb_xyz = split_columns(mgm.to_rgb.input, width)[1]
        self.rgb_split = [mfm.rgb_branch.first.out_features, mgm.to_xyz.input.out_features]
        self.xyz_split = [mfm.xyz_branch.first.out_features, mgm.to_rgb.input.out_features]
        rgb = first_layer_on_tokens([mfm.rgb_branch.first.weight.detach(), to_xyz_rgb])
        xyz = first_layer_on_tokens([mfm.xyz_branch.first.weight.detach(), to_rgb_xyz])
        rgb_bias = torch.cat([mfm.rgb_branch.first.bias.detach(), mgm.to_xyz.input.bias.detach()])
        self.register_buffer("rgb_weight", rgb)
        self.register_buffer("rgb_bias", rgb_bias)
        self.register_buffer("xyz_weight", xyz)

    def forward(self, rgb_tokens: Tensor, xyz_tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rgb_mfm, rgb_mgm = torch.split(
            F.linear(rgb_tokens, self.rgb_weight, self.rgb_bias), self.rgb_split, dim=1
        )
        xyz_mfm, xyz_mgm = torch.split(xyz_tokens @ self.xyz_weight.T, self.xyz_split, dim=1)
        return rgb_mfm, rgb_mgm, xyz_mfm, xyz_mgm


class GuidedMapping(nn.Module):
    """One direction of MGM after its first layer has met the features: mentor, hidden rows -> last hidden rows.

    The hidden rows lack the first layer's bias where `bias` is given.
    """

    guide_weight: Tensor
    bias: Tensor | None

    def __init__(
        self, mentor_layer: nn.Linear, mapping: Mapping, width: int, bias: Tensor | None = None
    ) -> None:
        super().__init__()
        self.mentor_layer = mentor_layer
        self.projection = mapping.projection
        self.register_buffer("guide_weight", split_columns(mapping.input, width)[0])
        self.register_buffer("bias", bias)

    def forward(self, mentor: Tensor, hidden: Tensor) -> Tensor:
        hidden = F.gelu(self.mentor_layer(mentor)) @ self.guide_weight.T + hidden
        return F.gelu(self.projection(F.gelu(hidden if self.bias is None else hidden + self.bias)))


class FirstAgain(nn.Module):
    """MFM's first layer of the second pass, on whichever is narrower: MGM's last hidden rows (merged) or F~.

    F~ is formed for its cosine anyway, so merging pays only where F~ is the wider of the two.
    """

    def __init__(self, last: nn.Linear, first: nn.Linear) -> None:
        super().__init__()
        self.is_merged = last.in_features < last.out_features
        self.layer = merged_linear(last, first) if self.is_merged else first

    def forward(self, hidden: Tensor, reconstructed: Tensor) -> Tensor:
        rows: Tensor = self.layer(hidden if self.is_merged else reconstructed)
        return rows


class HeadRows(nn.Module):
    """First layers' rows of T scored pixels -> rgb_reconstructed, xyz_reconstructed, mentor, mentor_reconstructed.

    rgb_mfm, rgb_mgm, xyz_mfm, xyz_mgm: the rows interpolated from `HeadTokens`' tables, [T, ...]
    """

    def __init__(self, mfm: Mfm, mgm: Mgm) -> None:
        super().__init__()
        self.mfm = mfm
        width = mfm.config.mentor_width
        self.to_rgb = GuidedMapping(mgm.mentor_to_rgb, mgm.to_rgb, width, mgm.to_rgb.input.bias.detach())
        self.to_xyz = GuidedMapping(mgm.mentor_to_xyz, mgm.to_xyz, width)
        self.rgb_output, self.xyz_output = mgm.to_rgb.output, mgm.to_xyz.output
        self.rgb_again = FirstAgain(mgm.to_rgb.output, mfm.rgb_branch.first)
        self.xyz_again = FirstAgain(mgm.to_xyz.output, mfm.xyz_branch.first)

    def mentor(self, rgb_hidden: Tensor, xyz_hidden: Tensor) -> Tensor:
        """MFM behind its first layers: their outputs, biases included -> mentor."""
        rgb, xyz = F.gelu(rgb_hidden), F.gelu(xyz_hidden)
        return self.mfm.fuse(*self.mfm.aligned(self.mfm.rgb_branch.last(rgb), self.mfm.xyz_branch.last(xyz)))

    def forward(
        self, rgb_mfm: Tensor, rgb_mgm: Tensor, xyz_mfm: Tensor, xyz_mgm: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mentor = self.mentor(rgb_mfm, xyz_mfm + self.mfm.xyz_branch.first.bias)
        rgb_last = self.to_rgb(mentor, xyz_mgm)
        xyz_last = self.to_xyz(mentor, rgb_mgm)
        rgb_rec, xyz_rec = self.rgb_output(rgb_last), self.xyz_output(xyz_last)
        again = self.mentor(self.rgb_again(rgb_last, rgb_rec), self.xyz_again(xyz_last, xyz_rec))
        return rgb_rec, xyz_rec, mentor, again


def tile_scores(rows: HeadRows, tile: dict[str, Tensor]) -> Tensor:
    """Scores [3, T] of a tile's rows by name: rgb_features, xyz_features and those of FIRST_LAYERS, each [T, ...]."""
    rgb_rec, xyz_rec, mentor, mentor_rec = rows(*(tile[name] for name in FIRST_LAYERS))
    pairs = (tile["rgb_features"], rgb_rec, tile["xyz_features"], xyz_rec, mentor, mentor_rec)
    scores: Tensor = CosineScores()(*pairs)
    return scores
