"""Greedy coreset: the rows of a bank that leave no row of the good parts far from all of them (PatchCore).

Each next row is the one farthest from those chosen, in a sparse random projection of the features.
"""

import torch
from sklearn.random_projection import SparseRandomProjection, johnson_lindenstrauss_min_dim
from torch import Tensor

from m3ad_export.train.samples import Track

EPS = 0.9  # of the Johnson-Lindenstrauss bound, as M3DM and BTF have it


def coreset(
    rows: Tensor, count: int, seed: int, track: Track = lambda steps, _description, _total: steps
) -> Tensor:
    """Greedy farthest points from row 0 on, in fp32; ties go to the lowest index.

    Args:
        rows: [B, D] float32.
        count: of the rows to choose, 1..B.
        seed: of the projection. Features narrower than its bound are not projected.
        track: shows progress.

    Returns:
        Index [count] int64 in the order of choice.

    Raises:
        ValueError: `count` is not 1..B.
    """
    if not 1 <= count <= len(rows):
        raise ValueError(f"count must lie in 1..{len(rows)}, got {count}")
    projected = projection(rows, seed)
    projected = projected - projected.mean(dim=0)
    norms = projected.square().sum(dim=1)
    chosen = torch.zeros(count, dtype=torch.long)
    closest = torch.full((len(rows),), torch.inf)
    for k in track(range(1, count), "coreset", count - 1):
        last = chosen[k - 1]
        # The expanded form reads the rows once; what it loses decides between rows that are nearly as far.
        closest = torch.minimum(closest, norms - 2 * (projected @ projected[last]) + norms[last])
        closest[last] = -torch.inf  # not chosen again where all are equal
        chosen[k] = closest.argmax()
    return chosen


def projection(rows: Tensor, seed: int) -> Tensor:
    """The rows in the dimensions that keep distances within EPS: [B, D] -> [B, D'] float32."""
    width = int(johnson_lindenstrauss_min_dim(len(rows), eps=EPS))
    if width >= rows.shape[1]:
        return rows
    fitted = SparseRandomProjection(n_components=width, random_state=seed).fit(rows[:1].numpy())
    found: Tensor = rows @ torch.from_numpy(fitted.components_.toarray().T).float()
    return found
