"""Point-MAE's encoder for the 3D branch: groups of neighbours -> one token a group. Sampling and grouping are ops.

References:
    Point-MAE (Pang et al. 2022, arXiv 2203.06604)  https://github.com/Pang-Yatian/Point-MAE
    as CFM reads it (Costanzino et al. 2024)        https://github.com/CVLAB-Unibo/crossmodal-feature-mapping
Parameter names are those of pretrain.pth below `MAE_encoder.`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3ad_export.nets.configs import BnMode, XyzEncoderConfig
from m3ad_export.nets.vit import Block


class BatchNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias over rows; mean and biased var of this frame or the checkpoint's.

    [rows, C] -> [rows, C]
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int, mode: BnMode, eps: float = 1e-5) -> None:
        super().__init__()
        self.mode, self.eps = mode, eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if self.mode == "sample":
            mean = x.mean(dim=0)
            var = (x - mean).square().mean(dim=0)
        return (x - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias


class Conv1x1(nn.Conv1d):
    """A pointwise convolution kept in the checkpoint's [out, in, 1] shape, run as a matrix product on rows."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(width_in, width_out, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight[:, :, 0], self.bias)


class MiniPointNet(nn.Module):
    """Shape of each group: neighbourhood [G, S, 3] -> [G, D].

    l = conv(relu(bn(conv(x)))); g = max_S l; out = max_S conv(relu(bn(conv([g, l]))))
    """

    def __init__(self, width: int, bn_mode: BnMode) -> None:
        super().__init__()
        # A bias in front of a batch norm with the frame's own statistics cancels. Leaving it out is exact, and it keeps
        # offsets of a millimetre from drowning in the rounding of a bias a hundred times as large.
        self.biased = bn_mode == "running"
        self.first_conv = nn.Sequential(
            Conv1x1(3, 128), BatchNorm(128, bn_mode), nn.ReLU(), Conv1x1(128, 256)
        )
        self.second_conv = nn.Sequential(
            Conv1x1(512, 512), BatchNorm(512, bn_mode), nn.ReLU(), Conv1x1(512, width)
        )

    def forward(self, neighborhood: Tensor) -> Tensor:
        G, S, _ = neighborhood.shape
        first: Any = self.first_conv  # torch does not know what a Sequential holds
        second: Any = self.second_conv
        conv, bn, relu, last = first
        assert isinstance(conv, Conv1x1)  # for the type checker
        local = F.linear(
            neighborhood.reshape(G * S, 3), conv.weight[:, :, 0], conv.bias if self.biased else None
        )
        local = last(relu(bn(local)))  # [G*S, 256]
        globl = local.reshape(G, S, 256).amax(dim=1)  # [G, 256]
        # conv([g, l]) = W_g g + (W_l l + b): the global half is the same for all S points, so it runs once a group.
        conv, bn, relu, last = second
        assert isinstance(conv, Conv1x1)
        w_globl, w_local = conv.weight[:, :256, 0], conv.weight[:, 256:, 0]
        hidden = (
            F.linear(local, w_local, conv.bias if self.biased else None).reshape(G, S, 512)
            + F.linear(globl, w_globl)[:, None]
        )
        shape: Tensor = last(relu(bn(hidden.reshape(G * S, 512))))
        return shape.reshape(G, S, -1).amax(dim=1)


class TransformerEncoder(nn.Module):
    """The blocks, with the position code added anew before each: [1, G, D] -> outputs of the chosen blocks."""

    def __init__(self, config: XyzEncoderConfig) -> None:
        super().__init__()
        self.chosen = config.blocks
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, norm_eps=1e-5, qkv_bias=False) for _ in range(config.depth)
        )

    def forward(self, x: Tensor, pos: Tensor) -> list[Tensor]:
        outputs = {}
        for i in range(max(self.chosen) + 1):
            x = self.blocks[i](x + pos)
            outputs[i] = x
        return [outputs[i] for i in self.chosen]


class PointMaeEncoder(nn.Module):
    """neighborhood [G, S, 3] (metres, minus its centre), centers [G, 3] (metres) -> xyz_tokens [G, D].

    Blocks 3, 7 and 11 (0-based), each through the one final LayerNorm, side by side.
    """

    def __init__(self, config: XyzEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = MiniPointNet(config.width, config.bn_mode)
        self.pos_embed = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, config.width))
        self.blocks = TransformerEncoder(config)
        self.norm = nn.LayerNorm(config.width, eps=1e-5)

    def forward(self, neighborhood: Tensor, centers: Tensor) -> Tensor:
        tokens = self.encoder(neighborhood)[None]  # [1, G, D]
        outputs = self.blocks(tokens, self.pos_embed(centers)[None])
        return torch.cat([self.norm(x)[0] for x in outputs], dim=1)
