"""Patches of a cloud -> a code each, and the signed distance of any point to a patch's surface, given its code.

References:
    Shape-Guided (Chu et al., ICML 2023)  https://github.com/jayliu0313/Shape-Guided (no licence: written anew)
    Neural-Pull (Ma et al. 2021), whose way of learning a distance it takes
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m3ad_export.heads.fold import norm_line
from m3ad_export.nets.configs import SdfConfig

PATCHES_AT_ONCE = 48  # 48 x 500 points of 1024 channels are 98 MB


def normalised(neighborhood: Tensor) -> Tensor:
    """p / extent - mean: patches [G, S, 3] in any unit -> [G, S, 3] about their mean, the longest axis 1 long."""
    extent = (neighborhood.amax(dim=1) - neighborhood.amin(dim=1)).amax(dim=1)
    scaled = neighborhood / extent.clamp_min(torch.finfo(torch.float32).tiny)[:, None, None]
    return scaled - scaled.mean(dim=1, keepdim=True)


class PatchEncoder(nn.Module):
    """Layers on each point, the largest over the points, two layers: normalised patches [n, S, 3] -> [n, code] >= 0."""

    def __init__(self, config: SdfConfig) -> None:
        super().__init__()
        c1, c2, c3 = config.channels
        self.conv1, self.bn1 = nn.Conv1d(3, c1, 1), nn.BatchNorm1d(c1)
        self.conv2, self.bn2 = nn.Conv1d(c1, c2, 1), nn.BatchNorm1d(c2)
        self.conv3, self.bn3 = nn.Conv1d(c2, c3, 1), nn.BatchNorm1d(c3)
        self.fc1, self.bn4 = nn.Linear(c3, config.hidden), nn.BatchNorm1d(config.hidden)
        self.fc2, self.bn5 = nn.Linear(config.hidden, config.code), nn.BatchNorm1d(config.code)

    def forward(self, patches: Tensor) -> Tensor:
        x = patches.transpose(1, 2)
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = norm(conv(x)).relu()
        largest = x.amax(dim=2)
        return self.bn5(self.fc2(self.bn4(self.fc1(largest)).relu())).relu()


class NormedLinear(nn.Module):
    """y = (g v / |v|) x + b, |v| of each row (weight normalisation): [.., hidden] -> [.., hidden]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        start = nn.Linear(width, width)
        nn.init.normal_(start.weight, 0.0, (2 / width) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(width))
        self.weight_g = nn.Parameter(start.weight.detach().norm(dim=1, keepdim=True))
        self.weight_v = nn.Parameter(start.weight.detach().clone())

    @property
    def weight(self) -> Tensor:
        """The rows that a product is taken with: [hidden, hidden]."""
        return self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class ImplicitFunction(nn.Module):
    """codes [n, code], points [n, S, 3] of the normalised patches -> signed distance [n, S]."""

    def __init__(self, config: SdfConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.fc1, self.fc2, self.fc3 = (
            nn.Linear(config.code, hidden),
            nn.Linear(3, hidden),
            nn.Linear(2 * hidden, hidden),
        )
        nn.init.zeros_(self.fc3.bias)
        nn.init.normal_(self.fc3.weight, 0.0, (2 / hidden) ** 0.5)
        self.names = [f"fc4{k}" for k in range(config.layers)]
        for name in self.names:
            self.add_module(name, NormedLinear(hidden))
        self.fc5 = nn.Linear(hidden, 1)
        # A sphere's distance to begin with: roughly |p| - 0.5.
        nn.init.constant_(self.fc5.bias, -0.5)
        nn.init.normal_(self.fc5.weight, 2 * torch.pi**0.5 / hidden**0.5, 1e-6)

    def forward(self, codes: Tensor, points: Tensor) -> Tensor:
        of_code = self.fc1(codes).relu()[:, None].expand(-1, points.shape[1], -1)
        x = self.fc3(torch.cat([self.fc2(points).relu(), of_code], dim=2)).relu()
        for name in self.names:
            x = self.get_submodule(name)(x).relu()
        return self.fc5(x)[:, :, 0]


class SdfNetwork(nn.Module):
    """Both networks, their tensors named as in the authors' `sdf_model`: 64 of them, 3 170 433 parameters."""

    def __init__(self, config: SdfConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.NIF = PatchEncoder(config), ImplicitFunction(config)

    def forward(self, patches: Tensor, points: Tensor) -> Tensor:
        """Signed distances of points [n, S, 3] to normalised patches [n, T, 3]: [n, S]."""
        return self.NIF(self.encoder(patches), points)

    def pulled(self, patches: Tensor, queries: Tensor) -> Tensor:
        """q - sdf(q) grad / |grad| (Neural-Pull, Eq. 1): queries [n, S, 3] moved onto the surface, differentiable."""
        queries = queries.detach().requires_grad_()
        distance = self(patches, queries)
        (gradient,) = torch.autograd.grad(distance.sum(), queries, create_graph=True)
        length = (gradient.square().sum(dim=2, keepdim=True) + 1e-12).sqrt()
        return queries - distance[:, :, None] * gradient / length


def folded_line(layer: nn.Conv1d | nn.Linear, norm: nn.BatchNorm1d) -> nn.Linear:
    """A layer on rows with the BatchNorm behind it inside, folded in float64."""
    gain, shift = norm_line(norm)
    assert layer.bias is not None
    weight = layer.weight.detach().double().reshape(layer.weight.shape[0], -1) * gain[:, None]
    return line(weight, layer.bias.detach().double() * gain + shift)


def line(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A frozen layer of these float64 numbers."""
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight = nn.Parameter(weight.float(), requires_grad=False)
    layer.bias = nn.Parameter(bias.float(), requires_grad=False)
    return layer


def parts(count: int) -> Iterator[slice]:
    """The patches in runs of at most `PATCHES_AT_ONCE`: memory does not grow with their number."""
    for start in range(0, count, PATCHES_AT_ONCE):
        yield slice(start, min(start + PATCHES_AT_ONCE, count))


class FoldedEncoder(nn.Module):
    """The encoder, exactly, on patches as they are grouped: neighborhood [G, S, 3] -> codes [G, code].

    Norms are inside the layers, and the last layer on the points adds its bias behind the largest.
    """

    def __init__(self, encoder: PatchEncoder) -> None:
        super().__init__()
        self.first, self.second, self.third = (
            folded_line(conv, norm)
            for conv, norm in (
                (encoder.conv1, encoder.bn1),
                (encoder.conv2, encoder.bn2),
                (encoder.conv3, encoder.bn3),
            )
        )
        self.fourth, self.fifth = (
            folded_line(layer, norm)
            for layer, norm in ((encoder.fc1, encoder.bn4), (encoder.fc2, encoder.bn5))
        )

    def forward(self, neighborhood: Tensor) -> Tensor:
        groups, size, _ = neighborhood.shape
        patches = normalised(neighborhood)
        largest = []
        for part in parts(groups):
            rows = self.second(self.first(patches[part].reshape(-1, 3)).relu()).relu()
            wide = F.linear(rows, self.third.weight).reshape(part.stop - part.start, size, -1)
            largest.append(wide.amax(dim=1))
        x = (torch.cat(largest) + self.third.bias).relu()
        return self.fifth(self.fourth(x).relu()).relu()


class FoldedDistance(nn.Module):
    """|sdf| of each patch's own points: neighborhood [G, S, 3], codes [G, code] -> [G, S], exactly.

    What depends on the code alone, fc1 and its half of fc3, is computed once a patch instead of once a point, and the
    weight norms are inside the weights: 1.213 -> 1.050 GMAC a patch of 500 points.
    """

    def __init__(self, function: ImplicitFunction) -> None:
        super().__init__()
        hidden = function.fc2.out_features
        weight, bias = function.fc3.weight.detach(), function.fc3.bias.detach()
        self.of_code, self.of_point = function.fc1, function.fc2
        self.join_code = line(weight[:, hidden:].double(), bias.double())
        self.join_point = nn.Linear(hidden, hidden, bias=False)
        self.join_point.weight = nn.Parameter(weight[:, :hidden].clone(), requires_grad=False)
        self.layers = nn.ModuleList(folded_norm(function.get_submodule(name)) for name in function.names)
        self.last = function.fc5

    def forward(self, neighborhood: Tensor, codes: Tensor) -> Tensor:
        groups, size, _ = neighborhood.shape
        patches = normalised(neighborhood)
        of_code = self.join_code(self.of_code(codes).relu())
        found = []
        for part in parts(groups):
            count = part.stop - part.start
            rows = self.join_point(self.of_point(patches[part].reshape(-1, 3)).relu())
            x = (rows.reshape(count, size, -1) + of_code[part][:, None]).relu().reshape(count * size, -1)
            for layer in self.layers:
                x = layer(x).relu()
            found.append(self.last(x).reshape(count, size).abs())
        return torch.cat(found)


def folded_norm(layer: nn.Module) -> nn.Linear:
    """A layer with its weight norm inside its weights, folded in float64."""
    assert isinstance(layer, NormedLinear)
    v, g = layer.weight_v.detach().double(), layer.weight_g.detach().double()
    return line(v * (g / v.norm(dim=1, keepdim=True)), layer.bias.detach().double())
