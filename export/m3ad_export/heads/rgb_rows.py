"""RGB tokens at the scored pixels, in PyTorch."""

import torch
from m3ad.contract import IMAGE_SIZE
from m3ad_runtime.stages import bilinear_taps
from torch import Tensor, nn


class RgbRows(nn.Module):
    """rgb_tokens [P, D], scored_pixel [R] int32 -> rgb_features [R, D].

    Bilinear, align_corners=False, from the P tokens' square grid to 224 x 224, at the scored pixels only.
    """

    taps: Tensor
    weights: Tensor

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side
        taps, weights = bilinear_taps(side)
        self.register_buffer("taps", torch.from_numpy(taps).long())  # [224, 2]
        self.register_buffer("weights", torch.from_numpy(weights))  # [224, 2]

    def forward(self, tokens: Tensor, scored_pixel: Tensor) -> Tensor:
        pixel = scored_pixel.long()
        y, x = pixel // IMAGE_SIZE, pixel % IMAGE_SIZE
        weights_y, weights_x = self.weights.index_select(0, y), self.weights.index_select(0, x)  # [R, 2]
        taps_y, taps_x = self.taps.index_select(0, y) * self.side, self.taps.index_select(0, x)  # [R, 2]
        corners = [
            (weights_y[:, i : i + 1] * weights_x[:, j : j + 1])
            * tokens.index_select(0, taps_y[:, i] + taps_x[:, j])
            for i in range(2)
            for j in range(2)
        ]
        return (corners[0] + corners[1]) + (corners[2] + corners[3])
