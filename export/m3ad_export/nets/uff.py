"""UFF, M3DM's network that fuses both modalities' features cell by cell, with the authors' tensor names."""

from torch import Tensor, nn

RATIO = 4  # hidden width of an MLP to its own
HEAD_WIDTH = 256


class Mlp(nn.Module):
    """Linear, GELU, Linear: [.., D] -> [.., D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, RATIO * width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(RATIO * width, width)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.fc2(self.act(self.fc1(x)))
        return found


class Half(nn.Module):
    """One modality's part of a fused row, MLP(LN(x)): [R, D] -> [R, D]."""

    def __init__(self, norm: nn.LayerNorm, mlp: Mlp) -> None:
        super().__init__()
        self.norm, self.mlp = norm, mlp

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.mlp(self.norm(x))
        return found


class Uff(nn.Module):
    """rgb_tokens [P, D], xyz_cells [Q, D'] -> rgb_half [P, D], xyz_half [Q, D'].

    A fused row is [MLP(LN x), MLP(LN r)], nothing added to it (M3DM). Neither half reads the other, so that each stays
    on its own grid. The heads are of the authors' loss alone and stand here so that their file loads strictly.

    Args:
        rgb_width: D.
        xyz_width: D'.
    """

    def __init__(self, rgb_width: int = 768, xyz_width: int = 1152) -> None:
        super().__init__()
        self.xyz_norm = nn.LayerNorm(xyz_width)
        self.xyz_mlp = Mlp(xyz_width)
        self.rgb_norm = nn.LayerNorm(rgb_width)
        self.rgb_mlp = Mlp(rgb_width)
        self.rgb_head = nn.Linear(rgb_width, HEAD_WIDTH)
        self.xyz_head = nn.Linear(xyz_width, HEAD_WIDTH)

    def part(self, side: str) -> Half:
        """The half of `rgb` or `xyz`."""
        return Half(self.rgb_norm, self.rgb_mlp) if side == "rgb" else Half(self.xyz_norm, self.xyz_mlp)

    def forward(self, rgb_tokens: Tensor, xyz_cells: Tensor) -> tuple[Tensor, Tensor]:
        return self.rgb_mlp(self.rgb_norm(rgb_tokens)), self.xyz_mlp(self.xyz_norm(xyz_cells))
