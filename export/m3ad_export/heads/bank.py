"""Distances of features to banks of good parts' features, and the maps that are made of them (M3DM, PatchCore).

References:
    M3DM (Wang et al. 2023)  https://github.com/nomewang/M3DM (MIT)
    PatchCore (Roth et al. 2022), from which bank, coreset and weighing by neighbours come
Everything is of standard operations, so that a bank needs no plugin; a CPU takes the op NearestRow.
"""

from collections.abc import Callable
from functools import partial

import torch
from m3ad.contract import IMAGE_SIZE
from m3ad.methods.m3dm import CELL_SIDE, SIDES, UNIT
from torch import Tensor, nn
from torch.nn import functional as F

from m3ad_export.heads.axis_map import AxisMap, operator
from m3ad_export.heads.map_head import pil4, up

NEIGHBORS = 3
RGB_LAMBDA = 0.1  # of RGB's distance beside the others'
DISTANCE_EPS = 1e-8
CANDIDATES = 4  # looked at again after the product; 0 of 1560 queries needed a second one in TF32
CHUNK_ROWS = 8192  # of a bank in one product: below 100 MB of scores for 3136 queries


def cell_pooling(side: int = CELL_SIDE) -> Tensor:
    """AvgPool(3, stride 1, no padding) from 224 to 222, then AdaptiveAvgPool to the cells: [side, 224] float64."""

    def op(x: Tensor) -> Tensor:
        return F.adaptive_avg_pool1d(F.avg_pool1d(x[None], 3, stride=1), side)[0]

    return operator(op, IMAGE_SIZE)


def lowest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The lowest values of each row and where they are, ascending, ties by index: [N, M] -> twice [N, count].

    torch's topk leaves ties open: points of a flat, regular grid have many.
    """
    left, found = values.clone(), []
    for _ in range(count):
        found.append(left.argmin(dim=1, keepdim=True))  # the first of several, as its documentation says
        left.scatter_(1, found[-1], torch.inf)
    indices = torch.cat(found, dim=1)
    return values.gather(1, indices), indices


class TokenCells(nn.Module):
    """xyz_tokens [G, D], centers [G, 3], points [N, 3], point_pixel [N] -> xyz_cells [3136, D].

    Each point takes its 3 nearest tokens by 1 / (d^2 + 1e-8), then 3 x 3 means and windows down to 56 x 56; pixels
    without a point are zero. Distances are direct fp32 differences, ties go to the lowest index. In a bundle the op
    TokenInterpolate does it; this form stands beside it, for training and parity.
    """

    pool: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("pool", cell_pooling().float(), persistent=False)

    def forward(self, xyz_tokens: Tensor, centers: Tensor, points: Tensor, point_pixel: Tensor) -> Tensor:
        x, y, z = (points[:, k : k + 1] - centers[:, k] for k in range(3))
        near, nearest = lowest((x * x + y * y) + z * z, NEIGHBORS)
        inverse = 1 / (near + DISTANCE_EPS)
        weights = inverse / inverse.sum(dim=1, keepdim=True)
        parts = [xyz_tokens[nearest[:, k]] * weights[:, k : k + 1] for k in range(NEIGHBORS)]
        rows = parts[0] + parts[1] + parts[2]
        width = xyz_tokens.shape[1]
        grid = xyz_tokens.new_zeros(IMAGE_SIZE * IMAGE_SIZE, width)
        grid = grid.index_put((point_pixel.long(),), rows)
        down = self.pool @ grid.reshape(IMAGE_SIZE, IMAGE_SIZE * width)
        cells = self.pool @ down.reshape(CELL_SIDE, IMAGE_SIZE, width)
        return cells.reshape(CELL_SIDE * CELL_SIDE, width)


class Bank(nn.Module):
    """delta_q = min_b |q - b|: [Q, D] -> distance [Q], index [Q], ties to the lowest index.

    Candidates come from u = q b^T - |b|^2 / 2, their distances are then taken directly, so that a product of lower
    precision changes none. Query and bank are centred on the bank's mean first, which changes no distance.

    Args:
        rows: [B, D] of the bank, at least 3.
    """

    mean: Tensor  # [D] of the bank
    rows: Tensor  # [B, D] less the mean
    half_norms: Tensor  # [B]
    neighbors: Tensor  # [B, 2] see find_neighbors

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        mean = rows.float().mean(dim=0)
        centred = rows.float() - mean
        self.register_buffer("mean", mean)
        self.register_buffer("rows", centred)
        self.register_buffer("half_norms", 0.5 * centred.square().sum(dim=1))
        self.register_buffer("neighbors", torch.zeros(len(rows), 2, dtype=torch.long))

    def find_neighbors(self, at_once: int = 256) -> None:
        """Set the 2nd and 3rd nearest rows of each row, itself being the nearest."""
        found = []
        for part in torch.split(self.rows, at_once):
            distance = torch.cdist(part, self.rows, compute_mode="donot_use_mm_for_euclid_dist")
            found.append(distance.topk(NEIGHBORS, dim=1, largest=False).indices[:, 1:])
        self.neighbors = torch.cat(found)

    def forward(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        centred = queries - self.mean

        def product(part: slice | None) -> Tensor:
            rows, norms = (
                (self.rows, self.half_norms) if part is None else (self.rows[part], self.half_norms[part])
            )
            return F.linear(centred, rows, -norms)

        def squared(index: Tensor) -> Tensor:
            return (centred - F.embedding(index, self.rows)).square().sum(dim=1)

        return nearest_of(len(self.rows), product, squared)

    def to_rows(self, queries: Tensor, at: Tensor, rows: Tensor) -> Tensor:
        """Distances of the query at [1] to these rows [K]: [K]."""
        query = F.embedding(at, queries) - self.mean
        return (query - F.embedding(rows, self.rows)).square().sum(dim=1).sqrt()


def nearest_of(
    count: int, product: Callable[[slice | None], Tensor], squared: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Distance [Q] and index [Q] of the nearest of `count` rows, ties to the lowest index.

    Args:
        count: of the rows.
        product: q b^T - |b|^2 / 2 of a part of the rows, None for all of them: [Q, part].
        squared: one row [Q] for each query -> their squared distance [Q], taken directly.
    """
    scores, indices = [], []
    for start in range(0, count, CHUNK_ROWS):
        part = slice(start, min(start + CHUNK_ROWS, count))
        # a slice would be written into the graph beside the bank
        best = product(part if count > CHUNK_ROWS else None).topk(min(CANDIDATES, part.stop - start), dim=1)
        scores.append(best.values)
        indices.append(best.indices + start)
    joined = torch.cat(indices, dim=1)
    picked = torch.cat(scores, dim=1).topk(min(CANDIDATES, joined.shape[1]), dim=1).indices
    candidates = joined.gather(1, picked)
    distance = torch.stack([squared(candidates[:, k]) for k in range(candidates.shape[1])], dim=1).sqrt()
    nearest = distance.amin(dim=1, keepdim=True)
    index = torch.where(distance == nearest, candidates, count).amin(dim=1)
    return nearest[:, 0], index


def weighed(
    neighbors: Tensor,
    to_rows: Callable[[Tensor, Tensor], Tensor],
    found: tuple[Tensor, Tensor],
    width: int,
    scale: Tensor,
) -> Tensor:
    """s of one bank, [1]: its largest distance weighed by the rows nearest to that one's row.

        s = w delta*,  w = 1 - e^(delta*/sqrt D) / (e^(|q* - b1|/sqrt D) + e^(|q* - b2|/sqrt D))

    delta* is the largest distance, of q* to b*; b1, b2 are the rows nearest to b* (PatchCore).

    Args:
        neighbors: the 2nd and 3rd nearest rows of each row, [B, 2].
        to_rows: which query [1], rows [K] -> distances [K].
        found: distance [Q] and index [Q].
        width: D.
        scale: [] of distances; they are divided by it.
    """
    distance, index = found
    worst = distance[None].argmax(dim=1)  # [1]: TensorRT takes no largest of one axis alone
    largest = distance.gather(0, worst) / scale
    near = F.embedding(index.gather(0, worst), neighbors)[0]
    others = to_rows(worst, near) / scale
    root = width**0.5
    return (1 - (largest / root).exp() / (others / root).exp().sum()) * largest


class TwoBanks(nn.Module):
    """rgb_tokens [P, D], xyz_cells [3136, D'] -> rgb_distance [P], xyz_distance [3136], bank_scores [2] RGB, XYZ.

    Distances are divided by `scale`, the standard deviation of good parts' RGB features, for both (M3DM's code), and
    by 1000 before they are weighed, as M3DM does with two banks, so that w is nearly 1/2.
    """

    scale: Tensor  # []

    def __init__(self, rgb: Bank, xyz: Bank) -> None:
        super().__init__()
        self.rgb, self.xyz = rgb, xyz
        self.register_buffer("scale", torch.ones(()))

    def forward(self, rgb_tokens: Tensor, xyz_cells: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        distances, scores = [], []
        for bank, queries in ((self.rgb, rgb_tokens), (self.xyz, xyz_cells)):
            found = bank(queries)
            distances.append(found[0] / self.scale)
            to_rows = partial(bank.to_rows, queries)
            scores.append(weighed(bank.neighbors, to_rows, found, queries.shape[1], self.scale * UNIT))
        return distances[0], distances[1], torch.cat(scores)


class BankVote(nn.Module):
    """Distances to banks and their bank_scores -> map, score [1], score_maps [banks, 224, 224].

    Each distance is upsampled bilinearly and blurred as PIL does (sigma 4, no 8 bits): one constant per axis. The map
    is w . (lambda_k d_k), the score v . (lambda_k s_k); w and v are the weights of linear one-class SVMs without their
    offsets, and lambda is 0.1 for RGB and 1 for others.

    Args:
        rgb_side: tokens along one side of the image.
        sides: the banks, in the order of scores and maps.
    """

    lambdas: Tensor
    map_weights: Tensor  # one a bank
    score_weights: Tensor  # likewise

    def __init__(self, rgb_side: int, sides: tuple[str, ...]) -> None:
        super().__init__()
        self.rgb_side, self.sides = rgb_side, sides
        self.rgb_map = AxisMap(pil4() @ up(rgb_side, IMAGE_SIZE))
        self.xyz_map = AxisMap(pil4() @ up(CELL_SIDE, IMAGE_SIZE))
        lambdas = torch.tensor([RGB_LAMBDA if side == "rgb" else 1.0 for side in sides])
        self.register_buffer("lambdas", lambdas, persistent=False)
        for name in ("map_weights", "score_weights"):
            self.register_buffer(name, torch.full((len(sides),), 1 / len(sides)))

    def score_maps(self, *distances: Tensor) -> Tensor:
        """Each distance on the grid: [banks, 224, 224]."""
        maps = []
        for side, distance in zip(self.sides, distances, strict=True):
            fine, cells = (self.rgb_map, self.rgb_side) if side == "rgb" else (self.xyz_map, CELL_SIDE)
            maps.append(fine(distance.reshape(1, cells, cells)))
        return torch.cat(maps)

    def voted(self, bank_scores: Tensor, *distances: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map, score and score maps."""
        maps = self.score_maps(*distances)
        weights = self.map_weights * self.lambdas
        anomaly_map = (maps * weights.reshape(-1, 1, 1)).sum(dim=0)
        score = (bank_scores * self.score_weights * self.lambdas).sum(dim=0, keepdim=True)
        return anomaly_map, score, maps


class DistanceVote(BankVote):
    """rgb_distance [P], xyz_distance [3136], bank_scores [2] -> map, score [1], score_maps [2, 224, 224]."""

    def __init__(self, rgb_side: int) -> None:
        super().__init__(rgb_side, SIDES)

    def forward(
        self, rgb_distance: Tensor, xyz_distance: Tensor, bank_scores: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.voted(bank_scores, rgb_distance, xyz_distance)
