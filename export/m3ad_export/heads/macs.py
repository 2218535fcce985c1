"""Multiplications of the heads of CFM and CMDR-IAD for one frame, as published and as rewritten."""

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

from m3ad.methods.cmdr_iad import REACH, WINDOW
from m3ad_plugins.ops import SparseRows
from m3ad_runtime.windows import needed

from m3ad_export.heads.cmdr import PIXELS, SHRINK, CmdrConfig

GIGA = 1e9


class Cost(NamedTuple):
    """GMAC of a part: every pixel through the modules as they are, and the exact rewrite."""

    part: str
    dense: float
    exact: float


def cfm_costs(
    rgb_width: int, xyz_width: int, operator: SparseRows, rgb_tokens: int, hidden_layers: int = 1
) -> list[Cost]:
    """Both mappings.

    Args:
        rgb_width: D of RGB features.
        xyz_width: of XYZ features.
        operator: from the groups to the scored pixels of the frame.
        rgb_tokens: P.
        hidden_layers: between first and last; 1 for CFM, 5 for its `_big`, 2 for CMDR-IAD.
    """
    hidden = (rgb_width + xyz_width) // 2
    rest = 2 * hidden_layers * hidden**2 + hidden * (rgb_width + xyz_width)
    tokens = rgb_tokens * rgb_width + operator.groups * xyz_width
    return [
        _cost("maps, first layers", PIXELS * hidden * (rgb_width + xyz_width), hidden * tokens),
        _cost("maps, the rest", PIXELS * rest, len(operator.scored_pixel) * rest),
    ]


def cmdr_costs(config: CmdrConfig, operator: SparseRows, rgb_tokens: int) -> list[Cost]:
    """The networks of the configuration's modality; arguments as of `cfm_costs`."""
    costs = []
    if config.modality == "both":
        costs += cfm_costs(config.rgb_width, config.xyz_width, operator, rgb_tokens, hidden_layers=2)
    if config.modality != "xyz":
        costs += _rgb_decoder(config, operator, rgb_tokens)
    if config.modality != "rgb":
        costs += _xyz_decoder(config, operator)
    return costs


def _rgb_decoder(config: CmdrConfig, operator: SparseRows, rgb_tokens: int) -> list[Cost]:
    width, wide = config.rgb_width // 2, config.rgb_width
    region = needed(operator.scored_pixel, WINDOW, REACH)
    block = width * (9 * width + 2 * WINDOW)  # second layer, qkv, attention twice, proj, MLP
    convs = 9 * sum(a * b for a, b in pairwise((width, *config.rgb_convs, width)))
    last = 4 * width * (width + wide)
    return [
        _cost("RGB decoder, first layer", PIXELS * wide * width, rgb_tokens * wide * width),
        _cost("RGB decoder, windows", PIXELS * block, region.window_pixel.size * block),
        _cost("RGB decoder, convolutions", PIXELS * convs, region.crop_row.size * convs),
        _cost("RGB decoder, last layers", PIXELS * last, len(operator.scored_pixel) * last),
    ]


def _xyz_decoder(config: CmdrConfig, operator: SparseRows) -> list[Cost]:
    width, length = config.xyz_width, PIXELS // SHRINK
    rest, at = width * length**2, length
    for a, b in pairwise((width, *config.xyz_convs, width)):
        rest += 4 * at * a * b
        at *= 2
    exact = length * (len(operator.indices) + width * operator.groups)
    return [
        _cost("XYZ decoder, first layer", width * PIXELS * length, exact),
        _cost("XYZ decoder, the rest", rest, rest),
    ]


def mac_table(costs: Iterable[Cost]) -> str:
    """The costs and their sum, one line each."""
    rows = list(costs)
    rows.append(Cost("together", sum(c.dense for c in rows), sum(c.exact for c in rows)))
    head = f"{'GMAC':28}{'dense':>8}{'exact':>8}"
    return "\n".join([head, *(f"{c.part:28}{c.dense:8.1f}{c.exact:8.1f}" for c in rows)])


def _cost(part: str, dense: int, exact: int) -> Cost:
    return Cost(part, dense / GIGA, exact / GIGA)
