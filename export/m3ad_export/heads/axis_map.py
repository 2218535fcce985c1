"""A linear map of both axes, Y = L X L^T: L is the operation on the identity in float64, kept as an fp32 constant.

References:
    CFM (Costanzino et al. 2024): the box means that CFM, CMDR-IAD and Mentor3AD smooth with
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from m3ad.contract import IMAGE_SIZE
from torch import Tensor, nn


def operator(op: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """L [out, size] float64 of a linear map of one axis: op [n, size] -> [n, out] on the identity, transposed."""
    return op(torch.eye(size, dtype=torch.float64)).T.contiguous()


def means(widths: tuple[int, ...], size: int = IMAGE_SIZE) -> Tensor:
    """Means over so many neighbours, one after the other, zeros beyond the border: [size, size] float64."""

    def op(x: Tensor) -> Tensor:
        for width in widths:
            x = F.avg_pool1d(x[None], width, stride=1, padding=width // 2)[0]
        return x

    return operator(op, size)


def box(size: int = IMAGE_SIZE) -> Tensor:
    """Five means of 5 and three of 7, radius 19: the smoothing of CFM, CMDR-IAD and Mentor3AD; [size, size] float64."""
    return means((5,) * 5 + (7,) * 3, size)


class AxisMap(nn.Module):
    """Y = L X L^T of each map: [n, in, in] -> [n, out, out] float32."""

    matrix: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix.float(), persistent=False)

    def forward(self, maps: Tensor) -> Tensor:
        return self.matrix @ maps @ self.matrix.T
