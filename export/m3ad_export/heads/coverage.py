"""What a lattice of scored pixels leaves out, given back to the smoothed map."""

import torch
from m3ad.contract import IMAGE_SIZE
from m3ad.scored import taps_of
from torch import Tensor, nn

from m3ad_export.heads.axis_map import AxisMap, box


class Coverage(nn.Module):
    """f(1 on all) / f(1 on lattice): scored_pixel [R], point_pixel [N] -> [1, 224, 224] float32.   (ours)

    f is the smoothing `box`; all are the pixels under whose taps T lies a foreground pixel F, T F T^T > 0, as in
    `m3ad.scored`. A map f(s on lattice) times it is that of all pixels where s is constant, to the part's edge. Where
    every pixel is scored it is exactly 1, and 0 where the lattice does not reach.
    """

    taps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.smooth = AxisMap(box())
        self.register_buffer("taps", torch.from_numpy(taps_of(IMAGE_SIZE, IMAGE_SIZE)), persistent=False)

    def forward(self, scored_pixel: Tensor, point_pixel: Tensor) -> Tensor:
        foreground = _ones_on(point_pixel)
        every = (self.taps @ foreground @ self.taps.T > 0).float()
        wanted, found = self.smooth(torch.cat([every, _ones_on(scored_pixel)])).split(1)
        return torch.where(found > 0, wanted / found.clamp_min(torch.finfo(torch.float32).tiny), 0.0)


def on_grid(rows: Tensor, pixel: Tensor) -> Tensor:
    """Scatter [n, R] to their pixels, zero elsewhere: [n, 224, 224]."""
    grid = rows.new_zeros(rows.shape[0], IMAGE_SIZE * IMAGE_SIZE)
    index = pixel.long().expand(rows.shape[0], -1)
    return grid.scatter(1, index, rows).reshape(-1, IMAGE_SIZE, IMAGE_SIZE)


def _ones_on(pixel: Tensor) -> Tensor:
    return on_grid(torch.ones_like(pixel, dtype=torch.float32)[None], pixel)
