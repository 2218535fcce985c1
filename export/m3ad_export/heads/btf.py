"""BTF's rows of image features and histograms, its bank, and the map that is made of the distances to it.

References:
    BTF (Horwitz, Hoshen 2023)  https://github.com/eliahuhorwitz/3D-ADS (MIT), its method RGB+FPFH
    PatchCore (Roth et al. 2022), from which bank, coreset and weighing by neighbours come
"""

import torch
import torch.nn.functional as F
from m3ad.contract import IMAGE_SIZE
from m3ad.fpfh import CELL_SIDE, CELLS
from torch import Tensor, nn

from m3ad_export.heads.axis_map import AxisMap, operator
from m3ad_export.heads.bank import Bank
from m3ad_export.heads.map_head import pil4, up

MAPS = ("rgb", "xyz")
SIDES = (IMAGE_SIZE // 8, IMAGE_SIZE // 16)  # of the second and third level


def level_pooling(side: int) -> Tensor:
    """AvgPool(3, stride 1, no padding), then AdaptiveAvgPool to the 28 cells: [28, side] float64."""

    def op(x: Tensor) -> Tensor:
        return F.adaptive_avg_pool1d(F.avg_pool1d(x[None], 3, stride=1), CELL_SIDE)[0]

    return operator(op, side)


class LevelRows(nn.Module):
    """image [1, 3, 224, 224] -> [784, C2 + C3]: a network's second and third level, averaged over 28 x 28 cells."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.pools = nn.ModuleList(AxisMap(level_pooling(side)) for side in SIDES)

    def forward(self, image: Tensor) -> Tensor:
        _, *levels = self.network(image)
        rows = [pool(level[0]) for pool, level in zip(self.pools, levels, strict=True)]
        return torch.cat(rows).reshape(-1, CELLS).T


class CellBank(nn.Module):
    """rgb_rows [784, D], fpfh [784, 33] -> distance, rgb_distance, xyz_distance [784], bank_score [1].

        s = w delta*,  w = 1 - e^(delta*/sqrt D) / (e^(|q* - b1|/sqrt D) + e^(|q* - b2|/sqrt D))

    delta* is the largest distance, of q* to b*; b1, b2 are the rows nearest to b*. rgb_distance and xyz_distance are
    the lengths of both parts of the difference to the nearest row: their squares sum to that of the distance.   (ours)
    """

    def __init__(self, bank: Bank, rgb_width: int) -> None:
        super().__init__()
        self.bank, self.rgb_width = bank, rgb_width

    def forward(self, rgb_rows: Tensor, fpfh: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = torch.cat([rgb_rows, fpfh], dim=1)
        distance, index = self.bank(rows)
        square = (rows - self.bank.mean - F.embedding(index, self.bank.rows)).square()
        rgb, xyz = (
            part.sum(dim=1).sqrt() for part in (square[:, : self.rgb_width], square[:, self.rgb_width :])
        )
        return distance, rgb, xyz, self.weighed(rows, distance, index)

    def weighed(self, rows: Tensor, distance: Tensor, index: Tensor) -> Tensor:
        """s: [1]."""
        worst = distance[None].argmax(dim=1)  # [1]: TensorRT takes no largest of one axis alone
        query = F.embedding(worst, rows) - self.bank.mean
        largest = distance.gather(0, worst)
        near = F.embedding(index.gather(0, worst), self.bank.neighbors)[0]
        others = (query - F.embedding(near, self.bank.rows)).square().sum(dim=1).sqrt()
        return (1 - 1 / ((others - largest) / rows.shape[1] ** 0.5).exp().sum()) * largest


class CellVote(nn.Module):
    """distance, rgb_distance, xyz_distance [784], bank_score [1] -> map, score [1], score_maps [2, 224, 224].

    Distances are upsampled bilinearly and blurred as PIL does (sigma 4, no 8 bits): one constant per axis.
    """

    def __init__(self) -> None:
        super().__init__()
        self.map = AxisMap(pil4() @ up(CELL_SIDE, IMAGE_SIZE))

    def forward(
        self, distance: Tensor, rgb_distance: Tensor, xyz_distance: Tensor, bank_score: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        grids = torch.stack([distance, rgb_distance, xyz_distance]).reshape(-1, CELL_SIDE, CELL_SIDE)
        maps = self.map(grids)
        return maps[0], bank_score * 1.0, maps[1:]
