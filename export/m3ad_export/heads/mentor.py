"""The trainable heads, rows in and rows out: MFM makes the mentor, MGM reconstructs each modality under its guidance.

References:
    Mentor3AD (no public code): written from the paper's description; what it leaves open is a field of HeadConfig
    CFM (Costanzino et al. 2024), whose mapping MGM keeps  https://github.com/CVLAB-Unibo/crossmodal-feature-mapping
Every first layer is linear in the features, so that it may run on tokens instead of pixels.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadConfig:
    """Widths, and how the open places of the paper are read.

    Args:
        join: how MFM fuses its two branches: side by side, or their sum.
        unit_branches: L2-normalise each branch before the fusion, the form in which the contrast aligned them.
    """

    rgb_width: int = 768
    xyz_width: int = 1152
    mentor_width: int = 256
    join: Literal["concat", "sum"] = "concat"
    unit_branches: bool = True

    def __post_init__(self) -> None:
        if self.join not in ("concat", "sum"):
            raise ValueError(f"join must be concat or sum, got {self.join!r}")
        if not 1 <= self.mentor_width < min(self.rgb_width, self.xyz_width):
            raise ValueError(
                f"mentor_width must be narrower than the features, {self.rgb_width} and {self.xyz_width}, got "
                f"{self.mentor_width}"
            )


def unit(rows: Tensor) -> Tensor:
    """F / max(|F|, 1e-12), row by row: [R, D] -> [R, D]. F.normalize without the copy of |F| that its export writes."""
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1e-12)


class TwoLayers(nn.Module):
    """Linear, GELU, Linear with CFM's hidden width (in + out) // 2: [R, in] -> [R, out]."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        hidden = (width_in + width_out) // 2
        self.first = nn.Linear(width_in, hidden)
        self.last = nn.Linear(hidden, width_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.gelu(self.first(x)))


class Mapping(nn.Module):
    """CFM's feature mapping, three linears with GELU after the first two: [R, in] -> [R, out].

    Parameter names are those of CFM_{2Dto3D,3Dto2D}_*.pth.
    """

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        hidden = (width_in + width_out) // 2
        self.input = nn.Linear(width_in, hidden)
        self.projection = nn.Linear(hidden, hidden)
        self.output = nn.Linear(hidden, width_out)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.output(F.gelu(self.projection(F.gelu(self.input(x)))))
        return out


class Mfm(nn.Module):
    """Mentor of fusion: F_Mtr = MLP(MLP(F_RGB) (+) MLP(F_XYZ)); rgb [R, D], xyz [R, D] -> mentor [R, 256]."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        width = config.mentor_width
        self.rgb_branch = TwoLayers(config.rgb_width, width)
        self.xyz_branch = TwoLayers(config.xyz_width, width)
        self.fusion = TwoLayers(2 * width if config.join == "concat" else width, width)

    def branches(self, rgb: Tensor, xyz: Tensor) -> tuple[Tensor, Tensor]:
        """The two features brought to one space by the contrastive loss: [R, 256] each."""
        return self.aligned(self.rgb_branch(rgb), self.xyz_branch(xyz))

    def aligned(self, rgb: Tensor, xyz: Tensor) -> tuple[Tensor, Tensor]:
        """The branches' outputs as the contrast and the fusion see them: [R, 256] each."""
        if self.config.unit_branches:
            return unit(rgb), unit(xyz)
        return rgb, xyz

    def fuse(self, rgb: Tensor, xyz: Tensor) -> Tensor:
        """The outer MLP on the branches: [R, 256] each -> mentor [R, 256]."""
        joined = torch.cat([rgb, xyz], dim=1) if self.config.join == "concat" else rgb + xyz
        mentor: Tensor = self.fusion(joined)
        return mentor

    def forward(self, rgb: Tensor, xyz: Tensor) -> Tensor:
        return self.fuse(*self.branches(rgb, xyz))


class Mgm(nn.Module):
    """Mentor guidance: F~_XYZ = MLP(MLP(F_Mtr) (+) F_RGB), F~_RGB = MLP(MLP(F_Mtr) (+) F_XYZ).

    rgb [R, D], xyz [R, D], mentor [R, 256] -> rgb_reconstructed [R, D], xyz_reconstructed [R, D]
    """

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        width = config.mentor_width
        self.mentor_to_rgb = nn.Linear(width, width)
        self.mentor_to_xyz = nn.Linear(width, width)
        self.to_rgb = Mapping(width + config.xyz_width, config.rgb_width)
        self.to_xyz = Mapping(width + config.rgb_width, config.xyz_width)

    def forward(self, rgb: Tensor, xyz: Tensor, mentor: Tensor) -> tuple[Tensor, Tensor]:
        guided_xyz = torch.cat([F.gelu(self.mentor_to_rgb(mentor)), xyz], dim=1)
        guided_rgb = torch.cat([F.gelu(self.mentor_to_xyz(mentor)), rgb], dim=1)
        return self.to_rgb(guided_xyz), self.to_xyz(guided_rgb)


def heads_from_config(config: HeadConfig) -> tuple[Mfm, Mgm]:
    """Untrained heads."""
    return Mfm(config), Mgm(config)
