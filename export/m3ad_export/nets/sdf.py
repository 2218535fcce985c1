"""Patches of a cloud -> a code each, and the signed distance of any point to a patch's surface, given its code.

References:
    Shape-Guided (Chu et al., ICML 2023)  https://github.com/jayliu0313/Shape-Guided (no licence: written anew)
    Neural-Pull (Ma et al. 2021), whose way of learning a distance it takes
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m3ad_export.nets.configs import SdfConfig


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
