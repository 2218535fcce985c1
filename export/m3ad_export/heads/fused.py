"""The fused head: MFM -> MGM -> MFM -> VM from tokens to the anomaly map, by identities that hold exactly.

What is linear is moved to where there is less of it: a first layer runs on a thousand tokens instead of on every pixel
(interpolation and pooling commute with it, its bias is added afterwards). The features that MGM reconstructs are
compared in a basis of whose axes MFM's first layer reads only the first ones. Only scored pixels are computed, in
tiles of a fixed number of rows, so that memory does not grow with the part. Each rewrite is a function of the trained
modules.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3ad_export.heads.mentor import Mapping, Mfm, Mgm


def row_space_basis(first: nn.Linear) -> tuple[Tensor, Tensor]:
    """An orthonormal basis Q [D, D] whose first H axes are all that `first` reads: W Q = [M 0], M [H, H], in float64.

    A cosine is the same in every orthonormal basis. So F~ may be made as Q^T F~, MGM's last layer with other weights,
    and `first` becomes M on its first H columns: H^2 products a row for H D (or, merged with MGM's last, H times that
    layer's width). The features are rotated too, which costs D^2 for each token instead of each pixel.

    Any H axes that span the same do. The factorization's own make M a triangle, some weights far larger than the rest,
    which costs digits in eight bits; mixed at random they are all alike (QuaRot, Ashkboos et al. 2024).
    """
    read = first.out_features
    basis, triangle = torch.linalg.qr(first.weight.detach().double().T, mode="complete")
    noise = torch.randn(read, read, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mixed = torch.linalg.qr(noise)[0].to(basis.device)
    basis[:, :read] = basis[:, :read] @ mixed
    return basis, triangle[:read].T @ mixed


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A layer of these weights [out, in], in fp32."""
    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, bias=bias is not None, device=weight.device)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def split_columns(layer: nn.Linear, width: int) -> tuple[Tensor, Tensor]:
    """The weight's columns for the first `width` inputs and for the rest: W [a, b] = W_a a + W_b b."""
    weight = layer.weight.detach()
    return weight[:, :width], weight[:, width:]


PROJECTED = ("rgb_mfm", "rgb_mgm", "rgb_rotated", "xyz_mfm", "xyz_mgm", "xyz_rotated")  # of HeadTokens


class HeadTokens(nn.Module):
    """rgb_tokens [P, D], xyz_tokens [G, D] -> PROJECTED, whose rows of the scored pixels the rest of the head takes.

    Every first layer that reads the tokens: MFM's [H], and MGM's of the mapping to the other modality [H']. The RGB
    ones have their bias, because bilinear weights sum to one; those of pooling do not at the foreground's border, so
    the XYZ ones get theirs afterwards. And the tokens themselves [D] in MFM's basis, for the scores.
    """

    def __init__(self, mfm: Mfm, mgm: Mgm) -> None:
        super().__init__()
        width = mfm.config.mentor_width
        rgb_first, xyz_first = mfm.rgb_branch.first, mfm.xyz_branch.first
        self.rgb_mfm = linear(rgb_first.weight, rgb_first.bias)
        self.rgb_mgm = linear(split_columns(mgm.to_xyz.input, width)[1], mgm.to_xyz.input.bias)
        self.rgb_rotation = linear(row_space_basis(rgb_first)[0].T)
        self.xyz_mfm = linear(xyz_first.weight)
        self.xyz_mgm = linear(split_columns(mgm.to_rgb.input, width)[1])
        self.xyz_rotation = linear(row_space_basis(xyz_first)[0].T)

    @property
    def widths(self) -> dict[str, int]:
        """Columns of PROJECTED."""
        rgb, xyz = (
            (self.rgb_mfm, self.rgb_mgm, self.rgb_rotation),
            (self.xyz_mfm, self.xyz_mgm, self.xyz_rotation),
        )
        return dict(zip(PROJECTED, (layer.out_features for layer in (*rgb, *xyz)), strict=True))

    def forward(
        self, rgb_tokens: Tensor, xyz_tokens: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        return (
            self.rgb_mfm(rgb_tokens),
            self.rgb_mgm(rgb_tokens),
            self.rgb_rotation(rgb_tokens),
            self.xyz_mfm(xyz_tokens),
            self.xyz_mgm(xyz_tokens),
            self.xyz_rotation(xyz_tokens),
        )


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


class RotatedOutput(nn.Module):
    """MGM's last layer in the basis of MFM's first: last hidden rows -> the H columns that it reads and the rest."""

    def __init__(self, last: nn.Linear, first: nn.Linear) -> None:
        super().__init__()
        basis = row_space_basis(first)[0].T
        weight, bias = basis @ last.weight.double(), basis @ last.bias.double()
        self.read = linear(weight[: first.out_features], bias[: first.out_features])
        self.rest = linear(weight[first.out_features :], bias[first.out_features :])

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self.read(hidden), self.rest(hidden)


class HeadRows(nn.Module):
    """INPUTS' rows of T scored pixels, [T, ...] -> F~_RGB and F~_XYZ as `RotatedOutput`s, mentor, F~_Mtr."""

    INPUTS = ("rgb_mfm", "rgb_mgm", "xyz_mfm", "xyz_mgm")

    def __init__(self, mfm: Mfm, mgm: Mgm) -> None:
        super().__init__()
        self.mfm = mfm
        width = mfm.config.mentor_width
        self.to_rgb = GuidedMapping(mgm.mentor_to_rgb, mgm.to_rgb, width, mgm.to_rgb.input.bias.detach())
        self.to_xyz = GuidedMapping(mgm.mentor_to_xyz, mgm.to_xyz, width)
        rgb_first, xyz_first = mfm.rgb_branch.first, mfm.xyz_branch.first
        self.rgb_output = RotatedOutput(mgm.to_rgb.output, rgb_first)
        self.xyz_output = RotatedOutput(mgm.to_xyz.output, xyz_first)
        self.rgb_again = linear(row_space_basis(rgb_first)[1], rgb_first.bias)
        self.xyz_again = linear(row_space_basis(xyz_first)[1], xyz_first.bias)

    @property
    def widths(self) -> dict[str, int]:
        """Names and columns of what comes out."""
        mentor = self.mfm.config.mentor_width
        return {
            "rgb_reconstructed_row_space": self.rgb_output.read.out_features,
            "rgb_reconstructed_null_space": self.rgb_output.rest.out_features,
            "xyz_reconstructed_row_space": self.xyz_output.read.out_features,
            "xyz_reconstructed_null_space": self.xyz_output.rest.out_features,
            "mentor": mentor,
            "mentor_reconstructed": mentor,
        }

    def mentor(self, rgb_hidden: Tensor, xyz_hidden: Tensor) -> Tensor:
        """MFM behind its first layers: their outputs, biases included -> mentor."""
        rgb, xyz = F.gelu(rgb_hidden), F.gelu(xyz_hidden)
        return self.mfm.fuse(*self.mfm.aligned(self.mfm.rgb_branch.last(rgb), self.mfm.xyz_branch.last(xyz)))

    def forward(
        self, rgb_mfm: Tensor, rgb_mgm: Tensor, xyz_mfm: Tensor, xyz_mgm: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        mentor = self.mentor(rgb_mfm, xyz_mfm + self.mfm.xyz_branch.first.bias)
        rgb_read, rgb_rest = self.rgb_output(self.to_rgb(mentor, xyz_mgm))
        xyz_read, xyz_rest = self.xyz_output(self.to_xyz(mentor, rgb_mgm))
        again = self.mentor(self.rgb_again(rgb_read), self.xyz_again(xyz_read))
        return rgb_read, rgb_rest, xyz_read, xyz_rest, mentor, again
