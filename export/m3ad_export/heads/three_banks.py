"""M3DM's three banks: each modality's features, and those that UFF fuses (`nets/uff.py`), whose rows lie in two halves.

References:
    M3DM (Wang et al. 2023)  https://github.com/nomewang/M3DM (MIT), its method DINO+Point_MAE+Fusion
"""

from functools import partial

import torch
from m3ad.methods.m3dm import UFF_SIDES, token_of_cell
from torch import Tensor, nn
from torch.nn import functional as F

from m3ad_export.heads.bank import Bank, BankVote, nearest_of, weighed


class FusionBank(nn.Module):
    """delta_q = min_b |q - b| of fused rows q = [x, r]: xyz_half [Q, D'], rgb_half [P, D] -> distance [Q], index [Q].

        |q - b|^2 = |x - b_x|^2 + |r - b_r|^2

    A cell's RGB half is that of the token it lies on (28 -> 56 repeats each 2 x 2), so its product with the bank is
    made of P rows and not of Q. Candidates and ties as of `Bank`.

    Args:
        rows: [B, D' + D] of the bank, at least 3.
        xyz_width: D'.
        rgb_side: tokens along one side of the image; divides 56.
    """

    xyz_mean: Tensor  # [D'] of the bank
    rgb_mean: Tensor  # [D]
    xyz_rows: Tensor  # [B, D'] less the mean
    rgb_rows: Tensor  # [B, D]
    half_norms: Tensor  # [B]
    neighbors: Tensor  # [B, 2] see Bank
    token: Tensor  # [Q] the row of rgb_half of each cell

    def __init__(self, rows: Tensor, xyz_width: int, rgb_side: int) -> None:
        super().__init__()
        whole = Bank(rows)
        for name in ("mean", "rows"):
            xyz, rgb = getattr(whole, name).split((xyz_width, rows.shape[1] - xyz_width), dim=-1)
            self.register_buffer(f"xyz_{name}", xyz.contiguous())
            self.register_buffer(f"rgb_{name}", rgb.contiguous())
        self.register_buffer("half_norms", whole.half_norms)
        self.register_buffer("neighbors", whole.neighbors)
        self.register_buffer("token", torch.from_numpy(token_of_cell(rgb_side)).long(), persistent=False)

    def find_neighbors(self) -> None:
        """Set the 2nd and 3rd nearest rows of each row."""
        whole = Bank(torch.cat([self.xyz_rows, self.rgb_rows], dim=1))
        whole.find_neighbors()
        self.neighbors = whole.neighbors

    def forward(self, xyz_half: Tensor, rgb_half: Tensor) -> tuple[Tensor, Tensor]:
        x, r = xyz_half - self.xyz_mean, rgb_half - self.rgb_mean
        r_of_cell = F.embedding(self.token, r)

        def product(part: slice | None) -> Tensor:
            xyz_rows, rgb_rows, norms = (
                (self.xyz_rows, self.rgb_rows, self.half_norms)
                if part is None
                else (self.xyz_rows[part], self.rgb_rows[part], self.half_norms[part])
            )
            return F.linear(x, xyz_rows, -norms) + F.embedding(self.token, F.linear(r, rgb_rows))

        def squared(index: Tensor) -> Tensor:
            xyz = (x - F.embedding(index, self.xyz_rows)).square().sum(dim=1)
            return xyz + (r_of_cell - F.embedding(index, self.rgb_rows)).square().sum(dim=1)

        return nearest_of(len(self.xyz_rows), product, squared)

    def to_rows(self, xyz_half: Tensor, rgb_half: Tensor, at: Tensor, rows: Tensor) -> Tensor:
        """Distances of the cell at [1] to these rows [K]: [K]."""
        x = F.embedding(at, xyz_half) - self.xyz_mean
        r = F.embedding(self.token.gather(0, at), rgb_half) - self.rgb_mean
        xyz = (x - F.embedding(rows, self.xyz_rows)).square().sum(dim=1)
        return (xyz + (r - F.embedding(rows, self.rgb_rows)).square().sum(dim=1)).sqrt()


class ThreeBanks(nn.Module):
    """Tokens, cells and UFF's halves -> three distances and bank_scores [3], each in the order XYZ, RGB, fusion.

    Distances are divided by `scale`, the standard deviation of good parts' RGB features, all three (M3DM's code).
    Unlike with two banks nothing is divided by 1000 before it is weighed.
    """

    scale: Tensor  # []

    def __init__(self, rgb: Bank, xyz: Bank, fusion: FusionBank) -> None:
        super().__init__()
        self.rgb, self.xyz, self.fusion = rgb, xyz, fusion
        self.register_buffer("scale", torch.ones(()))

    def forward(
        self, rgb_tokens: Tensor, xyz_cells: Tensor, rgb_half: Tensor, xyz_half: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        xyz, rgb = self.xyz(xyz_cells), self.rgb(rgb_tokens)
        fusion = self.fusion(xyz_half, rgb_half)
        asked = (
            (self.xyz.neighbors, partial(self.xyz.to_rows, xyz_cells), xyz, xyz_cells.shape[1]),
            (self.rgb.neighbors, partial(self.rgb.to_rows, rgb_tokens), rgb, rgb_tokens.shape[1]),
            (
                self.fusion.neighbors,
                partial(self.fusion.to_rows, xyz_half, rgb_half),
                fusion,
                xyz_half.shape[1] + rgb_half.shape[1],
            ),
        )
        scores = [weighed(*each, self.scale) for each in asked]
        return xyz[0] / self.scale, rgb[0] / self.scale, fusion[0] / self.scale, torch.cat(scores)


class ThreeDistanceVote(BankVote):
    """xyz_distance [3136], rgb_distance [P], fusion_distance [3136], bank_scores [3] -> map, score [1], score_maps.

    As with two banks; the vector is M3DM's, (xyz, 0.1 rgb, fusion).
    """

    def __init__(self, rgb_side: int) -> None:
        super().__init__(rgb_side, UFF_SIDES)

    def forward(
        self, xyz_distance: Tensor, rgb_distance: Tensor, fusion_distance: Tensor, bank_scores: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.voted(bank_scores, xyz_distance, rgb_distance, fusion_distance)
