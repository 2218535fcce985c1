"""WideResNet50-2 up to its third layer, parameters named as in torchvision's file.

References:
    Wide Residual Networks (Zagoruyko, Komodakis 2016); torchvision's wide_resnet50_2, stride in the 3x3 convolution
"""

import torch
from torch import Tensor, nn

from m3ad_export.nets.configs import WideResNetConfig


class Bottleneck(nn.Module):
    """relu(shortcut(x) + 1x1(3x3(1x1(x)))), BatchNorm behind each: [n, C, S, S] -> [n, O, S / stride, S / stride].

    Args:
        channels: C.
        inner: of the 3x3 convolution.
        out: O.
        stride: of the 3x3 convolution and of the shortcut.
        projects: whether the shortcut is a 1x1 convolution, or x itself.
    """

    def __init__(self, channels: int, inner: int, out: int, stride: int = 1, *, projects: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, out, 1, bias=False), nn.BatchNorm2d(out)
        self.downsample = (
            nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            if projects
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        shortcut = self.downsample(x) if self.downsample else x
        return (self.bn3(self.conv3(y)) + shortcut).relu()


def bottlenecks(channels: int, inner: int, out: int, count: int, stride: int) -> nn.Sequential:
    """A layer: the first block strides and projects, the others keep their size."""
    first = Bottleneck(channels, inner, out, stride, projects=True)
    return nn.Sequential(first, *(Bottleneck(out, inner, out, projects=False) for _ in range(count - 1)))


class WideResNet(nn.Module):
    """images [n, 3, 256, 256] -> three levels [n, 256, 64, 64], [n, 512, 32, 32], [n, 1024, 16, 16]."""

    def __init__(self, config: WideResNetConfig) -> None:
        super().__init__()
        self.config = config
        self.conv1 = nn.Conv2d(3, config.stem, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(config.stem)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        (c1, c2, c3), (n1, n2, n3), inner = config.channels, config.blocks, config.inner
        self.layer1 = bottlenecks(config.stem, inner, c1, n1, 1)
        self.layer2 = bottlenecks(c1, 2 * inner, c2, n2, 2)
        self.layer3 = bottlenecks(c2, 4 * inner, c3, n3, 2)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = self.layer1(self.maxpool(self.bn1(self.conv1(images)).relu()))
        second = self.layer2(first)
        return first, second, self.layer3(second)


class PairTeacher(nn.Module):
    """image and depth_image [1, 3, 256, 256] -> the levels of the one, then of the other, in one pass of two images."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor, depth_image: Tensor) -> tuple[Tensor, ...]:
        levels = self.network(torch.cat([image, depth_image]))
        return (*(level[:1] for level in levels), *(level[1:] for level in levels))
