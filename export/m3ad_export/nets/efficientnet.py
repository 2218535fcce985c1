"""EfficientNet up to one of its blocks, parameters named as in lukemelas/EfficientNet-PyTorch's files.

References:
    EfficientNet (Tan, Le 2019)
    https://github.com/lukemelas/EfficientNet-PyTorch (Apache-2.0): pads are fixed when a network is made, for the image
    size that it was designed for
"""

import torch.nn.functional as F
from torch import Tensor, nn

from m3ad_export.nets.configs import EfficientNetConfig

NORM_EPS = 1e-3


class PaddedConv(nn.Conv2d):
    """A convolution without bias, `pads` zeros left and right, above and below alike."""

    def __init__(
        self, channels: int, out: int, kernel: int, stride: int, pads: tuple[int, int], groups: int = 1
    ) -> None:
        even = pads[0] == pads[1]
        own = pads[0] if even else 0
        super().__init__(channels, out, kernel, stride, padding=own, groups=groups, bias=False)
        self.pads = (0, 0) if even else pads

    def forward(self, x: Tensor) -> Tensor:
        # PyTorch's own padding is even; torch's exporter makes this one the Conv node's again.
        return super().forward(F.pad(x, self.pads * 2) if any(self.pads) else x)


def same_pads(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME for a line of `size` pixels: what is odd goes to the end."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class MbConv(nn.Module):
    """Expand, depthwise, squeeze and excite, project, + x where the shapes allow: [n, C, S, S] -> [n, O, S/s, S/s]."""

    def __init__(
        self, channels: int, out: int, kernel: int, stride: int, expand: int, pads: tuple[int, int]
    ) -> None:
        super().__init__()
        wide = channels * expand
        self.expands, self.adds = expand > 1, stride == 1 and channels == out
        if self.expands:
            self._expand_conv = nn.Conv2d(channels, wide, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(wide, NORM_EPS)
        self._depthwise_conv = PaddedConv(wide, wide, kernel, stride, pads, groups=wide)
        self._bn1 = nn.BatchNorm2d(wide, NORM_EPS)
        squeezed = max(1, channels // 4)
        self._se_reduce, self._se_expand = nn.Conv2d(wide, squeezed, 1), nn.Conv2d(squeezed, wide, 1)
        self._project_conv = nn.Conv2d(wide, out, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(out, NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.silu(self._bn1(self._depthwise_conv(y)))
        gate = self._se_expand(F.silu(self._se_reduce(y.mean(dim=(2, 3), keepdim=True)))).sigmoid()
        y = self._bn2(self._project_conv(y * gate))
        return y + x if self.adds else y


class EfficientNet(nn.Module):
    """images [n, 3, 768, 768] -> the last block's output [n, 304, 24, 24]."""

    def __init__(self, config: EfficientNetConfig) -> None:
        super().__init__()
        self.config = config
        size = config.padded_for
        self._conv_stem = PaddedConv(3, config.stem, 3, 2, same_pads(size, 3, 2))
        self._bn0 = nn.BatchNorm2d(config.stem, NORM_EPS)
        size, channels, blocks = -(-size // 2), config.stem, list[nn.Module]()
        for count, kernel, first, expand, out in config.rows:
            for stride in (first, *(1,) * (count - 1)):
                blocks.append(MbConv(channels, out, kernel, stride, expand, same_pads(size, kernel, stride)))
                size, channels = -(-size // stride), out
        self._blocks = nn.ModuleList(blocks)

    def forward(self, images: Tensor) -> Tensor:
        x = F.silu(self._bn0(self._conv_stem(images)))
        for block in self._blocks:
            x = block(x)
        return x
