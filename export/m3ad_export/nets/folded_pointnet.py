"""Point-MAE's mini-PointNet with fewer passes over its rows, by identities that hold exactly.

The plain form touches G S = 32,768 rows of 512 channels a dozen times. Here the statistics of both batch norms follow
from the covariance of what goes into the linear layer before them, each norm is one multiply and one add, and the
local path 128 -> 256 -> 512 is one layer, because nothing but a max stands beside its middle.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3ad_export.nets.point_mae import BatchNorm, MiniPointNet, PointMaeEncoder


def folded_encoder(encoder: PointMaeEncoder) -> PointMaeEncoder:
    """A copy of an encoder whose mini-PointNet is folded; same tokens to fp32 rounding."""
    folded = copy.deepcopy(encoder)
    folded.encoder = FoldedPointNet(encoder.encoder)  # type: ignore[assignment]
    return folded.requires_grad_(False).eval()


class Affine(nn.Module):
    """A batch norm as y = scale x + shift: scale = weight / sqrt(var + eps), shift = bias - scale mean.

    mean [C], var [C] of the frame (`sample`) -> scale [C], shift [C]
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, norm: BatchNorm) -> None:
        super().__init__()
        self.eps = norm.eps
        self.register_buffer("weight", norm.weight.detach())
        self.register_buffer("bias", norm.bias.detach())

    def forward(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.weight * torch.rsqrt(var.clamp_min(0) + self.eps)
        return scale, self.bias - scale * mean


class FirstConv(nn.Module):
    """Offsets x [G S, 3] -> relu(bn(W x)) [G S, 128]; mean = W mean(x), var = diag(W cov(x) W^T)."""

    matrix: Tensor
    running: tuple[Tensor, Tensor] | None

    def __init__(self, net: MiniPointNet) -> None:
        super().__init__()
        first: Any = net.first_conv
        conv, norm = first[0], first[1]
        self.register_buffer("matrix", conv.weight[:, :, 0].detach())
        self.affine = Affine(norm)
        self.running = None if norm.mode == "sample" else (norm.running_mean - conv.bias, norm.running_var)

    def forward(self, x: Tensor) -> Tensor:
        if self.running is None:
            mean = x.mean(dim=0)
            centred = x - mean
            covariance = centred.T @ centred / len(x)
            mean, var = self.matrix @ mean, ((self.matrix @ covariance) * self.matrix).sum(dim=1)
        else:
            mean, var = self.running
        scale, shift = self.affine(mean, var)
        return F.relu(F.linear(x, self.matrix) * scale + shift)


class Moments(nn.Module):
    """Mean and variance of h = W_m a + W_g g over all rows, from the covariance of [a, g].

    a [G S, 128], g [G, 256] -> mean [512], var [512]
    """

    local: Tensor
    globl: Tensor

    def __init__(self, local: Tensor, globl: Tensor) -> None:
        super().__init__()
        self.register_buffer("local", local)
        self.register_buffer("globl", globl)

    def forward(self, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        groups = len(g)
        mean_a, mean_g = a.mean(dim=0), g.mean(dim=0)
        a, g = a - mean_a, g - mean_g
        in_group = a.reshape(groups, -1, a.shape[1]).mean(dim=1)
        var = (
            ((self.local @ (a.T @ a / len(a))) * self.local).sum(dim=1)
            + 2 * ((self.local @ (in_group.T @ g / groups)) * self.globl).sum(dim=1)
            + ((self.globl @ (g.T @ g / groups)) * self.globl).sum(dim=1)
        )
        return self.local @ mean_a + self.globl @ mean_g, var


class FoldedPointNet(nn.Module):
    """`MiniPointNet` by the identities above: neighbourhood [G, S, 3] -> [G, D].

    The submodules carry the plain form's names, so that precision plans speak of both.
    """

    local: Tensor
    globl: Tensor
    running: tuple[Tensor, Tensor] | None

    def __init__(self, net: MiniPointNet) -> None:
        super().__init__()
        first: Any = net.first_conv
        second: Any = net.second_conv
        middle, conv, norm, last = first[3], second[0], second[1], second[3]
        weight = conv.weight[:, :, 0].detach().double()
        w_globl, w_local = weight[:, :256], weight[:, 256:]
        self.register_buffer("local", (w_local @ middle.weight[:, :, 0].detach().double()).float())
        self.register_buffer("globl", w_globl.float())
        self.first_conv = nn.ModuleList([FirstConv(net), middle])
        self.second_conv = nn.ModuleList([Moments(self.local, self.globl), Affine(norm), last])
        # What is constant over the rows cancels against the frame's own mean; against a running mean it counts.
        constant = w_local @ middle.bias.detach().double() + conv.bias.detach().double()
        self.running = (
            None
            if norm.mode == "sample"
            else ((norm.running_mean.double() - constant).float(), norm.running_var)
        )

    def forward(self, neighborhood: Tensor) -> Tensor:
        G, S, _ = neighborhood.shape
        a = self.first_conv[0](neighborhood.reshape(G * S, 3))  # [G S, 128]
        g = self.first_conv[1](a).reshape(G, S, -1).amax(dim=1)  # [G, 256]
        mean, var = self.second_conv[0](a, g) if self.running is None else self.running
        scale, shift = self.second_conv[1](mean, var)
        of_group = F.linear(g, self.globl) * scale + shift  # [G, 512]
        hidden = F.linear(a, self.local).reshape(G, S, -1) * scale + of_group[:, None]
        shape: Tensor = self.second_conv[2](F.relu(hidden).reshape(G * S, -1))
        return shape.reshape(G, S, -1).amax(dim=1)
