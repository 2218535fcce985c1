"""CRD: a student of each modality rebuilds its own teacher's levels, with the other modality's to lean on.

References:
    CRD  https://github.com/hito2448/CRD (no licence, its weights are unpublished); TRD by the same authors has the same
    networks on surface normals instead of the depth image
Parameter names are those of the authors' files. x are a modality's own levels, y the other's, each three maps.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3ad_export.heads.axis_map import AxisMap
from m3ad_export.heads.map_head import gauss4, up
from m3ad_export.nets.configs import WideResNetConfig
from m3ad_export.nets.wide_resnet import Bottleneck, bottlenecks

SIZE = 256  # of the images and of the map
SIDES = (64, 32, 16)  # of the levels
MAPS = ("rgb_error", "depth_error")  # a student reads both modalities, so neither is of one alone
Levels = tuple[Tensor, Tensor, Tensor]


class Rebuilt(NamedTuple):
    """What a student makes, each three levels like its teacher's; the map looks at `mixed` alone."""

    plain: Levels
    filtered: Levels
    amplified: Levels
    mixed: Levels


def _normed(conv: nn.Module, channels: int) -> tuple[nn.Module, nn.BatchNorm2d, nn.ReLU]:
    return conv, nn.BatchNorm2d(channels), nn.ReLU()


def _narrowed(channels: int, deepest: int) -> nn.Sequential:
    """2x2 convolutions of stride 2, each twice as wide, down to `deepest` channels, and back up."""
    widths = [channels]
    while widths[-1] < deepest:
        widths.append(2 * widths[-1])
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += _normed(nn.Conv2d(a, b, 2, 2, bias=False), b)
    for a, b in pairwise(reversed(widths)):
        layers += _normed(nn.ConvTranspose2d(a, b, 2, 2, bias=False), b)
    return nn.Sequential(*layers)


def _widened(channels: int) -> nn.Sequential:
    """3x3, 1x1 to twice the channels, 1x1 back."""
    return nn.Sequential(
        *_normed(nn.Conv2d(channels, channels, 3, padding=1, bias=False), channels),
        *_normed(nn.Conv2d(channels, 2 * channels, 1, bias=False), 2 * channels),
        *_normed(nn.Conv2d(2 * channels, channels, 1, bias=False), channels),
    )


class ByLevel(nn.Module):
    """One network a level: filter or amplifier; y -> like y."""

    def __init__(self, levels: list[nn.Sequential]) -> None:
        super().__init__()
        self.conv_a, self.conv_b, self.conv_c = levels

    def forward(self, y: Levels) -> Levels:
        return self.conv_a(y[0]), self.conv_b(y[1]), self.conv_c(y[2])


class Fusion(nn.Module):
    """x and the filtered f -> the bottleneck's code [n, 2048, 8, 8]."""

    def __init__(self, config: WideResNetConfig) -> None:
        super().__init__()
        c1, c2, c3 = config.channels
        self.conv1, self.bn1 = nn.Conv2d(2 * c1, c3, 3, 2, padding=1, bias=False), nn.BatchNorm2d(c3)
        self.conv2, self.bn2 = nn.Conv2d(c3, c3, 3, 2, padding=1, bias=False), nn.BatchNorm2d(c3)
        self.conv3, self.bn3 = nn.Conv2d(2 * c2, c3, 3, 2, padding=1, bias=False), nn.BatchNorm2d(c3)
        self.conv4, self.bn4 = nn.Conv2d(2 * c3, c3, 3, padding=1, bias=False), nn.BatchNorm2d(c3)
        self.bn_layer = bottlenecks(3 * c3, c3, 2 * c3, config.blocks[0], 2)

    def forward(self, x: Levels, f: Levels) -> Tensor:
        first, second, third = (torch.cat(pair, dim=1) for pair in zip(x, f, strict=True))
        first = self.bn2(self.conv2(self.bn1(self.conv1(first)).relu())).relu()
        second, third = self.bn3(self.conv3(second)).relu(), self.bn4(self.conv4(third)).relu()
        code: Tensor = self.bn_layer(torch.cat([first, second, third], dim=1))
        return code


class Grown(nn.Module):
    """A bottleneck block that doubles the side: [n, C, S, S] -> [n, O, 2 S, 2 S]."""

    def __init__(self, channels: int, inner: int, out: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.ConvTranspose2d(inner, inner, 2, 2, bias=False), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, out, 1, bias=False), nn.BatchNorm2d(out)
        grow = nn.ConvTranspose2d(channels, out, 2, 2, bias=False)
        self.upsample = nn.Sequential(grow, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        out: Tensor = (self.bn3(self.conv3(y)) + self.upsample(x)).relu()
        return out


class Decoder(nn.Module):
    """The code and the amplified a -> plain and mixed levels: g_l = p_0 layer(g_{l+1}) + p_1 a_l, p = softmax(w)."""

    def __init__(self, config: WideResNetConfig) -> None:
        super().__init__()
        c1, c2, c3 = config.channels

        def layer(channels: int, out: int, count: int) -> nn.Sequential:
            blocks = (Bottleneck(out, out // 2, out, projects=False) for _ in range(count - 1))
            return nn.Sequential(Grown(channels, out // 2, out), *blocks)

        self.layer1 = layer(2 * c3, c3, config.blocks[0])
        self.layer2 = layer(c3, c2, config.blocks[1])
        self.layer3 = layer(c2, c1, config.blocks[2])
        self.w_a, self.w_b, self.w_c = (nn.Parameter(torch.ones(2)) for _ in range(3))

    def forward(self, code: Tensor, a: Levels) -> tuple[Levels, Levels]:
        plain3 = self.layer1(code)
        mixed3 = _mix(self.w_a, plain3, a[2])
        plain2 = self.layer2(mixed3)
        mixed2 = _mix(self.w_b, plain2, a[1])
        plain1 = self.layer3(mixed2)
        return (plain1, plain2, plain3), (_mix(self.w_c, plain1, a[0]), mixed2, mixed3)


def _mix(w: Tensor, plain: Tensor, amplified: Tensor) -> Tensor:
    p = w.softmax(dim=0)
    return p[0] * plain + p[1] * amplified


class Student(nn.Module):
    """Own levels x and the other modality's y -> `mixed`, which is like x where a part is good."""

    def __init__(self, config: WideResNetConfig) -> None:
        super().__init__()
        deepest = 2 * config.channels[-1]
        self.projector_filter = ByLevel([_narrowed(c, deepest) for c in config.channels])
        self.projector_amply = ByLevel([_widened(c) for c in config.channels])
        self.bn = Fusion(config)
        self.decoder = Decoder(config)

    def rebuild(self, x: Levels, y: Levels) -> Rebuilt:
        """All that the training looks at."""
        f, a = self.projector_filter(y), self.projector_amply(y)
        plain, mixed = self.decoder(self.bn(x, f), a)
        return Rebuilt(plain, f, a, mixed)

    def forward(self, x1: Tensor, x2: Tensor, x3: Tensor, y1: Tensor, y2: Tensor, y3: Tensor) -> Levels:
        return self.rebuild((x1, x2, x3), (y1, y2, y3)).mixed


def new_student(config: WideResNetConfig, seed: int) -> Student:
    """As the authors start: convolutions Kaiming normal by fan out, norms 1 and 0, the rest PyTorch's default."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = Student(config)
        for module in student.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return student


def raw_map(x: Levels, mixed: Levels) -> Tensor:
    """sum_l up_l(1 - cos over channels), corners aligned: three levels [n, C, S, S] -> [n, 256, 256] float32."""
    return sum(
        (
            F.interpolate(d[:, None], (SIZE, SIZE), mode="bilinear", align_corners=True)[:, 0]
            for d in distances(x, mixed)
        ),
        torch.zeros(()),
    )


def distances(x: Levels, mixed: Levels) -> list[Tensor]:
    """1 - cos over the channels of each level: [n, S, S]."""
    return [1 - F.cosine_similarity(a, b, dim=1) for a, b in zip(x, mixed, strict=True)]


class StandardisedSum(nn.Module):
    """Levels and rebuilt levels of both modalities -> anomaly_map [256, 256], score [1], score_maps [2, 256, 256].

        m = sum_k f((M_k - mean_k) / std_k),  M_k = sum_l up_l(1 - cos_l),  f the Gaussian of sigma 4

    mean and std are of the unsmoothed maps M_k of good frames. f and up are linear and f keeps a constant, so each
    level takes one product on both sides with L_f L_up. The score maps are the two terms.
    """

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        smooth = gauss4(SIZE)
        self.levels = nn.ModuleList(AxisMap(smooth @ up(side, SIZE, "align_corners")) for side in SIDES)
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("std", torch.ones(2))

    def forward(self, *levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, mixed = levels[:6], levels[6:]
        maps = []
        for k in range(2):
            own, rebuilt = x[3 * k : 3 * k + 3], mixed[3 * k : 3 * k + 3]
            d = distances((own[0], own[1], own[2]), (rebuilt[0], rebuilt[1], rebuilt[2]))
            smoothed = [level(each) for level, each in zip(self.levels, d, strict=True)]
            maps.append((smoothed[0] + smoothed[1] + smoothed[2] - self.mean[k]) / self.std[k])
        score_maps = torch.cat(maps)
        anomaly_map = score_maps.sum(dim=0)
        return anomaly_map, anomaly_map.reshape(-1).amax(dim=0, keepdim=True), score_maps
