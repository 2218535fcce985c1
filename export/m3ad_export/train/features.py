"""Frozen encoders -> the tokens of a frame, kept on disk so that each frame is encoded once.

A cache entry is named by the sha256 of everything that decides its content: both encoders (settings and weights), the
preprocessing and the frame's two files. What changed is never found under its old name.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from m3ad.bundle import sha256_of
from m3ad.frames import Sample, read_sample
from m3ad.preprocess import Preprocessing, prepare
from m3ad.stages import FloatArray, IntArray, Operator, Ops, bilinear_operator
from torch import Tensor

from m3ad_export.checkpoints import state_sha256
from m3ad_export.detector import call
from m3ad_export.nets.point_mae import PointMaeEncoder
from m3ad_export.nets.vit import VisionTransformer

FORMAT = 1  # raise it when an entry's content changes its meaning
ROWS_AT_ONCE = 8192
OPERATOR = ("indptr", "indices", "weights", "scored_pixel")
Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class FrameFeatures:
    """The tokens of one frame and the two linear maps from tokens to feature rows."""

    rgb_tokens: FloatArray
    xyz_tokens: FloatArray
    rgb_operator: Operator
    xyz_operator: Operator

    @property
    def scored_pixel(self) -> IntArray:
        """[R] row-major pixels of the rows."""
        return self.xyz_operator.scored_pixel

    def chunks(
        self,
        rgb_tables: Mapping[str, FloatArray] | None = None,
        xyz_tables: Mapping[str, FloatArray] | None = None,
    ) -> Iterator[dict[str, Tensor]]:
        """All rows in order, some thousand at a time: [r, D] by name; the next ones overwrite them.

        Args:
            rgb_tables: [P, D] by name, to spread over the pixels; the tokens as rgb_features when left out.
            xyz_tables: [G, D], likewise.
        """
        tiles = zip(
            self.rgb_operator.tiles(rgb_tables or {"rgb_features": self.rgb_tokens}, ROWS_AT_ONCE),
            self.xyz_operator.tiles(xyz_tables or {"xyz_features": self.xyz_tokens}, ROWS_AT_ONCE),
            strict=True,
        )
        for rgb, xyz in tiles:
            yield {name: torch.from_numpy(rows) for name, rows in (*rgb.items(), *xyz.items())}

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of an ascending index [r]: rgb_features [r, D], xyz_features [r, D]."""
        picked = []
        for first, chunk in enumerate(self.chunks()):
            here = index[index // ROWS_AT_ONCE == first] - first * ROWS_AT_ONCE
            picked.append((chunk["rgb_features"][here], chunk["xyz_features"][here]))
        return torch.cat([rgb for rgb, _ in picked]), torch.cat([xyz for _, xyz in picked])


class FeatureExtractor:
    """Samples -> FrameFeatures, through the cache.

    Args:
        rgb: in eval mode.
        xyz: in eval mode.
        preprocessing: the bundle's.
        ops: the custom ops.
        cache: folder of the entries; made when missing.
    """

    def __init__(
        self,
        rgb: VisionTransformer,
        xyz: PointMaeEncoder,
        preprocessing: Preprocessing,
        ops: Ops,
        cache: Path,
    ) -> None:
        self.rgb, self.xyz, self.preprocessing, self.ops, self.cache = rgb, xyz, preprocessing, ops, cache
        settings = [FORMAT, asdict(rgb.config), asdict(xyz.config), preprocessing.to_json()]
        self.identity = hashlib.sha256(json.dumps([*settings, state_sha256(rgb, xyz)]).encode()).hexdigest()
        cache.mkdir(parents=True, exist_ok=True)

    def key(self, sample: Sample) -> str:
        """The name of the sample's entry."""
        files = [sha256_of(sample.rgb_path), sha256_of(sample.xyz_path)]
        return hashlib.sha256("".join([self.identity, *files]).encode()).hexdigest()

    def __call__(self, sample: Sample) -> FrameFeatures:
        """The features of a sample, from the cache when it holds them.

        Raises:
            FrameError: the frame cannot be read or has too few points.
        """
        path = self.cache / f"{self.key(sample)}.npz"
        arrays = _read(path)
        if arrays is None:
            arrays = self._encode(sample)
            temporary = path.with_name(f".{os.getpid()}.{path.name}")
            np.savez(temporary, **arrays)  # type: ignore[arg-type]
            os.replace(temporary, path)
        indptr, indices, weights, scored_pixel = (arrays[n] for n in OPERATOR)
        xyz = self.ops.SparseRows(indptr, indices, weights, scored_pixel, self.xyz.config.groups)
        rgb = bilinear_operator(self.rgb.config.side, xyz.scored_pixel, self.ops)
        return FrameFeatures(arrays["rgb_tokens"], arrays["xyz_tokens"], rgb, xyz)

    def _encode(self, sample: Sample) -> Arrays:
        prepared = prepare(read_sample(sample), self.preprocessing)
        config, points = self.xyz.config, prepared.points
        idx = self.ops.farthest_point_sample(points, config.groups, config.min_norm_sq)
        neighborhood, _ = self.ops.knn_group(points, idx, config.group_size)
        (rgb_tokens,) = call(self.rgb, prepared.image)
        (xyz_tokens,) = call(self.xyz, neighborhood, points[idx])
        operator = self.ops.interpolation_operator(
            points, prepared.point_pixel, points[idx], prepared.scored_pixel
        )
        parts = {n: getattr(operator, n) for n in OPERATOR}
        return {"rgb_tokens": rgb_tokens, "xyz_tokens": xyz_tokens, **parts}


def _read(path: Path) -> Arrays | None:
    """An entry, or None when there is none that can be read whole (zip members carry a checksum)."""
    try:
        with np.load(path, allow_pickle=False) as entry:
            return dict(entry)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
