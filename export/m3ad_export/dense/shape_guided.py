"""Shape-Guided as published, in plain PyTorch: each patch and each cell by itself, dictionaries by least squares.

Distances are direct differences; the expanded form of the authors' `cdist` loses small ones and takes other neighbours.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from m3ad.contract import IMAGE_SIZE, Dims
from m3ad.methods.shape_guided import CELL_SIDE, CELLS
from torch import Tensor

from m3ad_export.dense.torch_ops import distances, farthest_points
from m3ad_export.heads.guided import (
    ATOMS,
    RGB_NEIGHBORS,
    SHAPE_NEIGHBORS,
    GuidedDictionary,
    cells_of,
)
from m3ad_export.heads.map_head import pil4

Form = Callable[[Tensor, Tensor, Tensor], Tensor]


def rebuilt(query: Tensor, atoms: Tensor) -> Tensor:
    """Orthogonal matching pursuit with three atoms, least squares in float64: [D], [K, D] -> f~ [D]."""
    wanted, rows = query.double(), atoms.double()
    chosen: list[int] = []
    found = torch.zeros_like(wanted)
    for _ in range(ATOMS):
        best = int((rows @ (wanted - found)).abs().argmax())
        if best in chosen:
            break
        chosen.append(best)
        basis = rows[chosen].T
        found = basis @ torch.linalg.lstsq(basis.cpu(), wanted.cpu()[:, None]).solution[:, 0].to(basis)
    return found.float()


def cells_beside(pixel: Tensor) -> Tensor:
    """Cells two rows or columns from those of pixels, indices as published: what is beyond the grid is replaced."""
    own = torch.tensor(sorted(set(cells_of(pixel).tolist())), device=pixel.device)
    moved = torch.cat([own + 2, own - 2, own + 2 * CELL_SIDE, own - 2 * CELL_SIDE])
    moved[moved < 0] = moved.max()
    moved[moved > CELLS - 1] = moved.min()
    return torch.tensor(sorted(set(moved.tolist())), device=pixel.device)


def dense_map(
    teacher: Callable[[Tensor], tuple[Tensor, ...]],
    encoder: Callable[[Tensor], Tensor],
    distance_of: Callable[[Tensor, Tensor], Tensor],
    guided: GuidedDictionary,
    line: Tensor,
    dims: Dims,
) -> Form:
    """image, points, point_pixel -> anomaly map.

    Args:
        teacher: images -> levels, of which two are taken.
        encoder: normalised patches -> codes.
        distance_of: codes and points -> signed distances.
        guided: holds the memory.
        line: (a, b) of the vote.
        dims: how many patches, of how many points.
    """
    blur = pil4().float()
    code_rows, rgb_bank = (memory.rows + memory.mean for memory in (guided.shape, guided.rgb))

    def run(image: Tensor, points: Tensor, point_pixel: Tensor) -> Tensor:
        levels = teacher(image)[:2]
        pooled = [F.adaptive_avg_pool2d(F.avg_pool2d(x, 3, stride=1), CELL_SIDE) for x in levels]
        rows = torch.cat(pooled, dim=1).flatten(2)[0].T
        centers = points[farthest_points(points, dims.groups)]
        members = distances(centers, points).topk(dims.group_size, dim=1, largest=False).indices
        distance = torch.full((len(points),), torch.inf, device=points.device)
        found, own = set[int](), set[int]()
        for group in members:
            patch = points[group]
            patch = patch / (patch.amax(dim=0) - patch.amin(dim=0)).max()
            patch = (patch - patch.mean(dim=0))[None]
            code = encoder(patch)
            nearest = distances(code, code_rows)[0].topk(SHAPE_NEIGHBORS, largest=False).indices
            found |= set(nearest.tolist())
            own |= set(cells_beside(point_pixel[group]).tolist())
            here = distance_of(rebuilt(code[0], code_rows[nearest])[None], patch)[0].abs()
            distance[group] = torch.minimum(distance[group], here)
        distance[distance.isinf()] = 0
        guides = torch.tensor(sorted(found), device=points.device)
        allowed = {
            int(guided.frame[g]) * CELLS + int(cell)
            for g in guides
            for cell in guided.marks[g].nonzero()[:, 0]
        }
        kept = torch.tensor(
            [k for k, place in enumerate(guided.place.tolist()) if place in allowed], device=rows.device
        )
        dictionary = rgb_bank[kept]
        left = torch.zeros(CELLS, device=rows.device)
        for cell in sorted(own):
            query = rows[cell]
            nearest = distances(query[None], dictionary)[0].topk(RGB_NEIGHBORS, largest=False).indices
            left[cell] = (query - rebuilt(query, dictionary[nearest])).norm()
        size = (IMAGE_SIZE, IMAGE_SIZE)
        rgb = F.interpolate(left.reshape(1, 1, CELL_SIDE, CELL_SIDE), size, mode="bilinear")[0, 0]
        grid = torch.zeros(IMAGE_SIZE**2, device=rows.device)
        grid[point_pixel.long()] = distance
        a, b = line
        joined = torch.maximum((a * rgb + b).clamp_min(0), grid.reshape(size))
        return blur.to(joined) @ joined @ blur.to(joined).T

    return run
