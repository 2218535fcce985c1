"""M3DM on a CPU: cells by the op TokenInterpolate, fused rows, the nearest rows of its banks by NearestRow."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from m3ad.contract import IMAGE_SIZE
from m3ad.errors import ArtifactError
from m3ad.methods.m3dm import SIDES, UFF_SIDES, UNIT, token_of_cell
from m3ad.scored import scored_pixels
from m3ad_plugins import ops

from m3ad_runtime.onnx_graph import OnnxGraph

QUERIES = ("rgb_tokens", "xyz_cells")  # of SIDES
HALVES = ("rgb_half", "xyz_half")


class Cells:
    """xyz_tokens [G, D], centers [G, 3], points [N, 3], point_pixel [N] -> xyz_cells [S * S, D].

    Only cells with a point under their taps are formed; the others stay zero.

    Args:
        side: S, of the cells' grid.
    """

    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Interpolate the tokens at the points and average them over the cells."""
        pixel, tokens = arrays["point_pixel"], arrays["xyz_tokens"]
        reached = scored_pixels(pixel, IMAGE_SIZE, self.side)
        spread = ops.interpolation_operator(
            arrays["points"], pixel, arrays["centers"], reached, IMAGE_SIZE, self.side
        )
        cells = np.zeros((self.side * self.side, tokens.shape[1]), np.float32)
        cells[reached] = spread.apply(tokens)
        return {"xyz_cells": cells}


class Halves:
    """rgb_tokens [P, D], xyz_cells [Q, D'] -> rgb_half [P, D], xyz_half [Q, D'] of fused rows (UFF).

    A cell without a point is zero, and one row stands for all of them.

    Args:
        rgb, xyz: the network's parts, the latter of any number of rows.
    """

    def __init__(self, rgb: OnnxGraph, xyz: OnnxGraph) -> None:
        self.rgb, self.xyz = rgb, xyz

    def __call__(self, arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Run both parts, the 3D one on the cells that are not empty."""
        cells = arrays["xyz_cells"]
        filled = cells.any(axis=1)
        asked = np.concatenate([np.zeros((1, cells.shape[1]), np.float32), cells[filled]])
        found = self.xyz({"xyz_cells": asked})["xyz_half"]
        xyz_half = np.empty_like(cells)
        xyz_half[~filled], xyz_half[filled] = found[0], found[1:]
        return {**self.rgb({"rgb_tokens": arrays["rgb_tokens"]}), "xyz_half": xyz_half}


class NearestBanks:
    """What the stage `bank` reads -> a distance for each bank's queries, and bank_scores, in the banks' order.

    What `bank.TwoBanks` and `three_banks.ThreeBanks` of `m3ad_export.heads` compute; equal queries, as cells without a
    point are, are asked once.

    Args:
        rows: files of the banks' rows less their mean; those of fused rows lie in two.
        rest: file of the means, the neighbours of each row, and the scale of distances.

    Raises:
        ArtifactError: a file is missing.
    """

    def __init__(self, rows: Sequence[Path], rest: Path) -> None:
        for path in (*rows, rest):
            if not path.is_file():
                raise ArtifactError(f"{path} is missing; export the bundle again: m3ad-export bundle")
        with np.load(rest, allow_pickle=False) as small:
            self.rest = {name: small[name] for name in small.files}
        has_fusion = len(rows) > len(SIDES)
        self.sides: tuple[str, ...] = UFF_SIDES if has_fusion else SIDES
        self.unit = 1.0 if has_fusion else UNIT
        self.rows: dict[str, npt.NDArray[np.float32]] = {
            side: _rows(path, self.rest[f"{side}.mean"]) for side, path in zip(SIDES, rows, strict=False)
        }
        if has_fusion:
            means = [self.rest[f"fusion.{name}_mean"] for name in ("xyz", "rgb")]
            parts = [_rows(path, mean) for path, mean in zip(rows[len(SIDES) :], means, strict=True)]
            self.rows["fusion"], self.rest["fusion.mean"] = np.concatenate(parts, 1), np.concatenate(means)
        self.reads = QUERIES + HALVES * has_fusion

    def __call__(self, arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Distances to the banks, and the largest of each weighed by its row's neighbours."""
        found: dict[str, npt.NDArray[Any]] = {}
        scores = []
        scale = self.rest["scale"]
        for side in self.sides:
            rows, queries = self.rows[side], queries_of(side, arrays) - self.rest[f"{side}.mean"]
            distance, idx = ops.nearest_row(queries, rows)
            found[f"{side}_distance"] = distance / scale
            worst = int(distance.argmax())
            near = rows[self.rest[f"{side}.neighbors"][idx[worst]]]
            others = np.linalg.norm(queries[worst] - near, axis=1) / scale / self.unit
            largest, root = distance[worst] / scale / self.unit, np.sqrt(np.float32(queries.shape[1]))
            scores.append((1 - np.exp(largest / root) / np.exp(others / root).sum()) * largest)
        return {**found, "bank_scores": np.asarray(scores, np.float32)}


def queries_of(side: str, arrays: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
    """What a bank is asked of a frame: [Q, D]; of fused rows the 3D half stands first, beside that of its token."""
    if side != "fusion":
        plain: npt.NDArray[np.float32] = arrays[QUERIES[SIDES.index(side)]]
        return plain
    rgb_half, xyz_half = (arrays[name] for name in HALVES)
    return np.concatenate([xyz_half, rgb_half[token_of_cell(math.isqrt(len(rgb_half)))]], axis=1)


def _rows(path: Path, mean: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.memmap(path, np.float32, "r").reshape(-1, mean.size)
