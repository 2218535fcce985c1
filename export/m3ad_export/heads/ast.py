"""AST: a normalising flow (teacher) and a plain network (student) see the same grid; where they differ, a part is odd.

References:
    AST  https://github.com/marco-rudolph/AST (Rudolph et al. 2023, MIT), Real-NVP couplings after Dinh et al. 2017
Parameter names are those of the authors' files. A grid is [n, C, 24, 24]: an image's features and the depth of each
cell's 8 x 8 pixels. The teacher appends positions to what it sees, the student has them first.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3ad_export.heads.axis_map import AxisMap
from m3ad_export.heads.map_head import up

SIDE, SIZE = 24, 192  # of the grid, of the map and of the depth
CELL = SIZE // SIDE
DEPTH_CHANNELS = CELL * CELL
POSITIONS = 32
KERNELS = (3, 3, 3, 5)  # of the teacher's four couplings
HIDDEN, STUDENT_HIDDEN, RESIDUALS = 64, 1024, 4
CLAMP, CLAMP_GAIN = 1.9, 0.636
LIMIT = 1e6
MAPS = ("latent_error",)


def positions() -> Tensor:
    """Codes of the columns, then of the rows, sin and cos of 8 frequencies alternating: [1, 32, 24, 24] float32."""
    each = POSITIONS // 2
    frequency = torch.exp(torch.arange(0, each, 2, dtype=torch.float32) * -(math.log(10000.0) / each))
    angle = torch.arange(SIDE, dtype=torch.float32)[:, None] * frequency
    code = torch.stack([angle.sin(), angle.cos()], dim=2).reshape(SIDE, each).T
    columns = code[:, None, :].expand(each, SIDE, SIDE)
    rows = code[:, :, None].expand(each, SIDE, SIDE)
    return torch.cat([columns, rows])[None].contiguous()


def permutation(coupling: int, channels: int) -> Tensor:
    """The order of the channels before a coupling; NumPy's RandomState(k), as it is not in the authors' files."""
    return torch.from_numpy(np.random.RandomState(coupling).permutation(channels))


def grid_of(features: Tensor, depth: Tensor) -> Tensor:
    """[n, C, 24, 24] and depth [n, 1, 192, 192] -> [n, C + 64, 24, 24]."""
    return torch.cat([features, F.pixel_unshuffle(depth, CELL)], dim=1)


class Subnet(nn.Module):
    """What a coupling reads of one half and the positions: gamma conv2(relu(conv1)), borders replicated."""

    def __init__(self, channels: int, out: int, kernel: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))
        pad = kernel // 2
        self.conv1 = nn.Conv2d(channels, HIDDEN, kernel, padding=pad, padding_mode="replicate")
        self.conv2 = nn.Conv2d(HIDDEN, out, kernel, padding=pad, padding_mode="replicate")

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv2(self.conv1(x).relu()) * self.gamma
        return out


def log_scale(s: Tensor) -> Tensor:
    """log e(s) = 1.9 x 0.636 atan(s / 1.9): bounded, so that no coupling explodes."""
    return CLAMP * CLAMP_GAIN * torch.atan(s / CLAMP)


class Coupling(nn.Module):
    """y1 = x1 e(s2) + t2, y2 = x2 e(s1) + t1; s2, t2 of x2 and s1, t1 of y1, each with the positions."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        half = channels // 2
        self.s1 = Subnet(half + POSITIONS, 2 * (channels - half), kernel)
        self.s2 = Subnet(channels - half + POSITIONS, 2 * half, kernel)
        self.split_at = half

    def forward(self, x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Returns y [n, C, 24, 24] and log det [n, 24, 24]."""
        x1, x2 = x[:, : self.split_at], x[:, self.split_at :]
        s2, t2 = self.s2(torch.cat([x2, codes], dim=1)).chunk(2, dim=1)
        first = log_scale(s2)
        y1 = x1 * first.exp() + t2
        s1, t1 = self.s1(torch.cat([y1, codes], dim=1)).chunk(2, dim=1)
        second = log_scale(s1)
        y2 = x2 * second.exp() + t1
        y = torch.cat([y1, y2], dim=1).clamp(-LIMIT, LIMIT)
        return y, first.sum(dim=1) + second.sum(dim=1)


class Teacher(nn.Module):
    """features [n, C, 24, 24], depth [n, 1, 192, 192] -> z [n, C + 64, 24, 24], log det [n, 24, 24]."""

    codes: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.channels = features + DEPTH_CHANNELS
        # A permutation and a coupling by turns, behind two entries of input and positions, as the file counts them.
        self.module_list = nn.ModuleDict(
            {str(2 * k + 3): Coupling(self.channels, kernel) for k, kernel in enumerate(KERNELS)}
        )
        self.register_buffer("codes", positions(), persistent=False)

    def forward(self, features: Tensor, depth: Tensor) -> tuple[Tensor, Tensor]:
        x = grid_of(features, depth)
        codes = self.codes.expand(len(x), -1, -1, -1)
        log_det = x.new_zeros(())
        for k, coupling in enumerate(self.module_list.values()):
            x, own = coupling(x[:, permutation(k, self.channels)], codes)
            log_det = log_det + own
        return x, log_det


class Residual(nn.Module):
    """x + two 3x3 convolutions, each with a norm and a leaky ReLU behind it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.l1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.l2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.bn1(self.l1(x)))
        return F.leaky_relu(self.bn2(self.l2(y))) + x


class Student(nn.Module):
    """features [n, C, 24, 24], depth [n, 1, 192, 192] -> [n, C + 64, 24, 24], which is like the teacher's z."""

    codes: Tensor

    def __init__(self, features: int, hidden: int = STUDENT_HIDDEN) -> None:
        super().__init__()
        channels = features + DEPTH_CHANNELS
        self.hidden = hidden
        self.conv1 = nn.Conv2d(channels + POSITIONS, hidden, 3, padding=1)
        self.res = nn.ModuleList(Residual(hidden) for _ in range(RESIDUALS))
        self.conv2 = nn.Conv2d(hidden, channels, 3, padding=1)
        self.gamma = nn.Parameter(torch.zeros(1))  # in the authors' file; nothing reads it
        self.register_buffer("codes", positions(), persistent=False)

    def forward(self, features: Tensor, depth: Tensor) -> Tensor:
        codes = self.codes.expand(len(features), -1, -1, -1)
        x = F.leaky_relu(self.conv1(torch.cat([codes, grid_of(features, depth)], dim=1)))
        for block in self.res:
            x = block(x)
        out: Tensor = self.conv2(x)
        return out


class LatentError(nn.Module):
    """Both latents and depth_mask [1, 1, 24, 24] -> anomaly_map [192, 192], score [1], score_maps [1, 192, 192].

        m = up(mask^2 mean_c (z_t - z_s)^2),  up bicubic by 8

    The authors weigh by the mask twice. Their image score is the map's largest value; the map may fall below zero
    beside a large one, as cubic interpolation does. The score map is the map.
    """

    def __init__(self) -> None:
        super().__init__()
        self.grow = AxisMap(up(SIDE, SIZE, "bicubic"))

    def forward(self, teacher: Tensor, student: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        error = (teacher - student).square().mean(dim=1) * mask[:, 0].square()
        score_maps = self.grow(error)
        anomaly_map = score_maps[0]
        return anomaly_map, anomaly_map.reshape(-1).amax(dim=0, keepdim=True), score_maps
