"""The fused head of any method in PyTorch: tokens -> projected tokens -> rows, tile by tile -> scores -> vote."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from m3ad.method import Pair
from torch import Tensor, nn

from m3ad_export.heads.voting import cosine_scores


@dataclass(frozen=True, slots=True)
class FusedHead:
    """The modules of a `head` stage.

    Attributes:
        tokens: rgb_tokens [P, D], xyz_tokens [G, D'] -> projected tokens, what the first layers make of them.
        projected: names and widths of what `tokens` returns; names begin with their modality's.
        rows: rows [T, ...] of some projected tokens -> outputs [T, ...].
        inputs: names of those that `rows` takes.
        outputs: names and widths of what it returns.
        vote: scores [pairs, R], scored_pixel [R] -> anomaly_map, score, score_maps.
    """

    tokens: nn.Module
    projected: Mapping[str, int]
    rows: nn.Module
    inputs: tuple[str, ...]
    outputs: Mapping[str, int]
    vote: nn.Module


def spread_names(head: FusedHead, pairs: tuple[Pair, ...]) -> list[str]:
    """What is spread over the pixels: the projected tokens, and the tokens that a pair compares as they are."""
    tokens = [p.feature for p in pairs if p.feature in ("rgb_tokens", "xyz_tokens")]
    return list(dict.fromkeys([*head.projected, *tokens]))


def tile_scores(head: FusedHead, pairs: tuple[Pair, ...], tile: Mapping[str, Tensor]) -> Tensor:
    """Scores [pairs, T] of a tile: rows of `spread_names` and those that the stage is given, by name, [T, ...]."""
    outputs = head.rows(*(tile[name] for name in head.inputs))
    values = {**tile, **dict(zip(head.outputs, outputs, strict=True))}
    return PairScores(pairs)(*(values[name] for name in pair_names(pairs)))


def pair_names(pairs: tuple[Pair, ...]) -> list[str]:
    """Every tensor that the pairs compare, each once."""
    return list(dict.fromkeys(name for p in pairs for name in (p.feature, *p.reconstructed)))


class PairScores(nn.Module):
    """Rows of `pair_names` [T, ...] -> scores [pairs, T], 1 - cos (Mentor3AD Eq. 5)."""

    def __init__(self, pairs: tuple[Pair, ...]) -> None:
        super().__init__()
        self.pairs, self.names = pairs, pair_names(pairs)

    def forward(self, *rows: Tensor) -> Tensor:
        named = dict(zip(self.names, rows, strict=True))

        def joined(names: tuple[str, ...]) -> Tensor:
            blocks = [named[name] for name in names]
            return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)

        return cosine_scores(*((named[p.feature], joined(p.reconstructed)) for p in self.pairs))
