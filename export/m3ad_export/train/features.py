"""Frozen encoders -> the tokens of a frame, kept on disk so that each frame is encoded once.

A cache entry is named by the sha256 of everything that decides its content: both encoders (settings and weights), the
preprocessing and the frame's two files. What changed is never found under its old name.
"""

import hashlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from m3ad.atomic import file_beside
from m3ad.bundle import sha256_of
from m3ad.frame_settings import Preprocessing
from m3ad.frames import Sample, read_sample
from m3ad.method import Pair
from m3ad.preprocess import prepare
from m3ad_plugins import ops
from m3ad_plugins.ops import SparseRows
from m3ad_runtime.stages import FloatArray, IntArray, bilinear_operator, modality_of
from torch import Tensor

from m3ad_export.checkpoints import state_sha256
from m3ad_export.detector import call
from m3ad_export.heads.tiled import FusedHead, spread_names, tile_scores
from m3ad_export.nets.efficientnet import EfficientNet
from m3ad_export.nets.point_mae import PointMaeEncoder
from m3ad_export.nets.vit import VisionTransformer

FORMAT = 3  # raise it when an entry's content changes its meaning
ROWS_AT_ONCE = 8192
OPERATOR = ("indptr", "indices", "weights", "scored_pixel")
Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class FrameFeatures:
    """The tokens of one frame, the two linear maps from tokens to feature rows, and its foreground [N].

    A modality without an encoder has one token of no columns, which no row reads. Of a method that sees an image of
    the cloud there are no tokens but `images` [2, 3, 256, 256], the RGB one first, or `grids`: the image's features
    [1, C, 24, 24], relief [1, 1, 192, 192] and relief_mask [1, 1, 24, 24]; or `images` [1, 3, 224, 224] and `fpfh`
    [784, 33]. `points` [N, 3] and `centers` [G, 3] are there where there are 3D tokens; of a method without
    tokens that groups the points, `images` [1, 3, 224, 224] and `points`.
    """

    rgb_tokens: FloatArray
    xyz_tokens: FloatArray
    rgb_operator: SparseRows
    xyz_operator: SparseRows
    point_pixel: IntArray
    images: FloatArray | None = None
    points: FloatArray | None = None
    centers: FloatArray | None = None
    grids: tuple[FloatArray, FloatArray, FloatArray] | None = None
    fpfh: FloatArray | None = None

    @property
    def scored_pixel(self) -> IntArray:
        """[R] row-major pixels of the rows."""
        return self.rgb_operator.scored_pixel

    def chunks(
        self,
        rgb_projected: Mapping[str, FloatArray] | None = None,
        xyz_projected: Mapping[str, FloatArray] | None = None,
    ) -> Iterator[dict[str, Tensor]]:
        """All rows in order, some thousand at a time: [r, D] by name; the next ones overwrite them.

        Args:
            rgb_projected: [P, D] by name, to spread over the pixels; the tokens as rgb_features when left out.
            xyz_projected: [G, D], likewise.
        """
        tiles = zip(
            self.rgb_operator.tiles(rgb_projected or {"rgb_features": self.rgb_tokens}, ROWS_AT_ONCE),
            self.xyz_operator.tiles(xyz_projected or {"xyz_features": self.xyz_tokens}, ROWS_AT_ONCE),
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
        rgb: in eval mode, or None to leave the modality out.
        xyz: likewise.
        preprocessing: the bundle's.
        cache: folder of the entries; made for the first one.
        efficientnet: in eval mode, of a method that takes grids.
    """

    def __init__(
        self,
        rgb: VisionTransformer | None,
        xyz: PointMaeEncoder | None,
        preprocessing: Preprocessing,
        cache: Path,
        efficientnet: EfficientNet | None = None,
    ) -> None:
        self.rgb, self.xyz, self.preprocessing, self.cache = rgb, xyz, preprocessing, cache
        self.efficientnet = efficientnet
        encoders = [encoder for encoder in (rgb, xyz, efficientnet) if encoder]
        settings = [FORMAT, *(asdict(encoder.config) for encoder in encoders), preprocessing.to_json()]
        self.identity = hashlib.sha256(json.dumps([*settings, state_sha256(*encoders)]).encode()).hexdigest()

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
            self.cache.mkdir(parents=True, exist_ok=True)
            with file_beside(path) as temporary, temporary.open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
        indptr, indices, weights, pixel = (arrays[n] for n in OPERATOR)
        xyz = SparseRows(indptr, indices, weights, pixel, len(arrays["xyz_tokens"]))
        rgb = bilinear_operator(self.rgb.config.side, pixel) if self.rgb else _no_rows(pixel)
        return FrameFeatures(
            arrays["rgb_tokens"],
            arrays["xyz_tokens"],
            rgb,
            xyz,
            arrays["point_pixel"],
            images=arrays.get("images"),
            points=arrays.get("points"),
            centers=arrays.get("centers"),
            grids=(arrays["grid"], arrays["relief"], arrays["relief_mask"]) if "grid" in arrays else None,
            fpfh=arrays.get("fpfh"),
        )

    def _encode(self, sample: Sample) -> Arrays:
        prepared = prepare(read_sample(sample, self.preprocessing.camera), self.preprocessing)
        nothing = np.zeros((1, 0), np.float32)
        entry: Arrays = {
            "rgb_tokens": nothing,
            "xyz_tokens": nothing,
            "point_pixel": prepared.point_pixel,
        }
        operator = _no_rows(prepared.scored_pixel)
        if not (self.rgb or self.xyz or self.efficientnet) and prepared.depth_image is None:
            entry |= {"images": prepared.image, "points": prepared.points}
        if prepared.depth_image is not None:
            entry["images"] = np.concatenate([prepared.image, prepared.depth_image])
        if prepared.fpfh is not None:
            entry |= {"images": prepared.image, "fpfh": prepared.fpfh}
        if self.efficientnet and prepared.relief is not None:
            (entry["grid"],) = call(self.efficientnet, prepared.image)
            entry["relief"], entry["relief_mask"] = prepared.cloud
        if self.rgb:
            (entry["rgb_tokens"],) = call(self.rgb, prepared.image)
        if self.xyz:
            config, points = self.xyz.config, prepared.points
            idx, neighborhood, _ = ops.point_group(
                points, config.groups, config.group_size, config.min_norm_sq, prepared.point_pixel
            )
            (entry["xyz_tokens"],) = call(self.xyz, neighborhood, points[idx])
            entry |= {"points": points, "centers": points[idx]}
            operator = ops.interpolation_operator(
                points, prepared.point_pixel, points[idx], prepared.scored_pixel
            )
        return {**entry, **{n: getattr(operator, n) for n in OPERATOR}}


def _no_rows(scored_pixel: IntArray) -> SparseRows:
    """The operator of a modality that is left out: one token, which no row takes."""
    nothing = np.zeros(0, np.int32)
    indptr = np.zeros(len(scored_pixel) + 1, np.int32)
    return SparseRows(indptr, nothing, nothing.astype(np.float32), scored_pixel, 1)


@torch.inference_mode()
def frame_scores(
    frame: FrameFeatures,
    head: FusedHead,
    pairs: tuple[Pair, ...],
    given: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One frame through a fused head, a few thousand rows at a time.

    Args:
        frame: its features.
        head: the modules.
        pairs: what is compared.
        given: rows [R, D] that the stage takes besides the tokens.

    Returns:
        scores [pairs, R], scored_pixel [R] and point_pixel [N].
    """
    own = {"rgb_tokens": frame.rgb_tokens, "xyz_tokens": frame.xyz_tokens}
    projected = head.tokens(*map(torch.from_numpy, own.values()))
    tokens = {**own, **{n: t.numpy() for n, t in zip(head.projected, projected, strict=True)}}
    names = spread_names(head, pairs)
    rgb, xyz = ({n: tokens[n] for n in names if modality_of(n) == side} for side in ("rgb", "xyz"))
    scores: list[Tensor] = []
    start = 0
    for tile in frame.chunks(rgb, xyz):
        stop = start + len(next(iter(tile.values())))
        rows = {name: each[start:stop] for name, each in (given or {}).items()}
        scores.append(tile_scores(head, pairs, {**tile, **rows}))
        start = stop
    pixels = (frame.scored_pixel, frame.point_pixel)
    return torch.cat(scores, dim=1), *map(torch.from_numpy, pixels)  # type: ignore[return-value]


def _read(path: Path) -> Arrays | None:
    """An entry, or None when there is none that can be read whole (zip members carry a checksum)."""
    try:
        with np.load(path, allow_pickle=False) as entry:
            return dict(entry)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
