"""M3DM on a CPU: cells by the op TokenInterpolate, the nearest rows of two banks by NearestRow."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from m3ad.contract import IMAGE_SIZE
from m3ad.errors import ArtifactError
from m3ad.methods.m3dm import UNIT
from m3ad.scored import scored_pixels
from m3ad_plugins import ops

QUERIES = {"rgb": "rgb_tokens", "xyz": "xyz_cells"}


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


class NearestBanks:
    """rgb_tokens [P, D], xyz_cells [3136, D'] -> rgb_distance [P], xyz_distance [3136], bank_scores [2] RGB, XYZ.

    What `m3ad_export.heads.bank.TwoBanks` computes; equal cells, as those without a point are, are asked once.

    Args:
        rows: files of both banks' rows less their mean, RGB first.
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
        self.rows = {
            side: np.memmap(path, np.float32, "r").reshape(-1, self.rest[f"{side}.mean"].size)
            for side, path in zip(QUERIES, rows, strict=True)
        }

    def __call__(self, arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Distances to both banks, and the largest of each weighed by its row's neighbours."""
        found: dict[str, npt.NDArray[Any]] = {}
        scores = []
        scale = self.rest["scale"]
        for side, name in QUERIES.items():
            rows, queries = self.rows[side], arrays[name] - self.rest[f"{side}.mean"]
            distance, idx = ops.nearest_row(queries, rows)
            found[f"{side}_distance"] = distance / scale
            worst = int(distance.argmax())
            near = rows[self.rest[f"{side}.neighbors"][idx[worst]]]
            others = np.linalg.norm(queries[worst] - near, axis=1) / scale / UNIT
            largest, root = distance[worst] / scale / UNIT, np.sqrt(np.float32(queries.shape[1]))
            scores.append((1 - np.exp(largest / root) / np.exp(others / root).sum()) * largest)
        return {**found, "bank_scores": np.asarray(scores, np.float32)}
