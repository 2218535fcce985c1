"""Sizes of the encoders and the known ones by name; the command line offers them where there is no torch."""

import math
from dataclasses import dataclass
from typing import Literal

from m3ad.contract import IMAGE_SIZE

BnMode = Literal["sample", "running"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RgbEncoderConfig:
    """Sizes of a ViT and which of its block outputs are the features."""

    name: str
    patch_size: int
    width: int
    depth: int = 12
    heads: int
    layer_scale: bool = False
    blocks: tuple[int, ...]  # 0-based; their outputs are concatenated
    final_norm: bool  # the network's last LayerNorm on each of them

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))  # JSON brings a list
        if not self.blocks or not all(0 <= b < self.depth for b in self.blocks):
            raise ValueError(f"blocks must lie in 0..{self.depth - 1}, got {self.blocks}")

    @property
    def side(self) -> int:
        """Patches along one side of the image."""
        return IMAGE_SIZE // self.patch_size

    @property
    def token_width(self) -> int:
        """D of the tokens that come out."""
        return self.width * len(self.blocks)


@dataclass(frozen=True, slots=True, kw_only=True)
class XyzEncoderConfig:
    """Sizes of the encoder, how it groups, and whose statistics its two batch norms use.

    `bn_mode` "sample" standardises with the frame's own G x S points, as the published detectors do (they never leave
    train mode); "running" takes the checkpoint's statistics, which belong to clouds of unit size, not metres.
    """

    name: str = "point_mae"
    width: int = 384
    depth: int = 12
    heads: int = 6
    blocks: tuple[int, ...] = (3, 7, 11)
    groups: int = 1024
    group_size: int = 32
    min_norm_sq: float = 0.0
    bn_mode: BnMode = "sample"

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))  # JSON brings a list
        if not self.blocks or not all(0 <= b < self.depth for b in self.blocks):
            raise ValueError(f"blocks must lie in 0..{self.depth - 1}, got {self.blocks}")
        if self.bn_mode not in ("sample", "running"):
            raise ValueError(f"bn_mode must be sample or running, got {self.bn_mode!r}")

    @property
    def token_width(self) -> int:
        """D of the tokens that come out."""
        return self.width * len(self.blocks)


@dataclass(frozen=True, slots=True, kw_only=True)
class WideResNetConfig:
    """Sizes of a wide residual network's first three layers; the defaults are WideResNet50-2's."""

    name: str = "wide_resnet50_2"
    stem: int = 64
    inner: int = 128  # channels inside the first layer's bottlenecks; it doubles from layer to layer
    blocks: tuple[int, int, int] = (3, 4, 6)

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))  # JSON brings a list
        if len(self.blocks) != 3 or min(self.stem, self.inner, *self.blocks) < 1:
            raise ValueError(f"expected three layers of at least one block, got {self}")

    @property
    def channels(self) -> tuple[int, int, int]:
        """Channels of the three levels that come out."""
        return 2 * self.inner, 4 * self.inner, 8 * self.inner


# DINO as CFM and Mentor3AD use it; of the DINOv2 file at hand the middle blocks are the good ones.
RGB_ENCODERS: dict[str, RgbEncoderConfig] = {
    c.name: c
    for c in (
        RgbEncoderConfig(name="dino_vitb8", patch_size=8, width=768, heads=12, blocks=(11,), final_norm=True),
        RgbEncoderConfig(name="dino_vits8", patch_size=8, width=384, heads=6, blocks=(11,), final_norm=True),
        RgbEncoderConfig(
            name="dinov2_vits14",
            patch_size=14,
            width=384,
            heads=6,
            layer_scale=True,
            blocks=(4, 6),
            final_norm=False,
        ),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EfficientNetConfig:
    """Sizes of an EfficientNet's stem and blocks; the defaults are EfficientNet-B5's up to block 35.

    A row of `rows` is consecutive blocks alike: how many, kernel, stride of the first, expansion, channels out.
    `padded_for` is the side of the image that the pads are made for, whatever image comes: the published network keeps
    those of its design at 456 pixels, which shifts two convolutions by one pixel against pads for the actual 768.
    """

    name: str = "efficientnet-b5"
    stem: int = 48
    rows: tuple[tuple[int, int, int, int, int], ...] = (
        (3, 3, 1, 1, 24),
        (5, 3, 2, 6, 40),
        (5, 5, 2, 6, 64),
        (7, 3, 2, 6, 128),
        (7, 5, 1, 6, 176),
        (9, 5, 2, 6, 304),
    )
    padded_for: int = 456

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(tuple(row) for row in self.rows))  # JSON brings lists
        if not self.rows or any(len(row) != 5 or min(row) < 1 for row in self.rows) or self.stem < 1:
            raise ValueError(
                f"expected rows of five positive numbers, got {self.rows} behind a stem of {self.stem}"
            )
        if self.padded_for < self.stride:
            raise ValueError(f"padded_for must be at least {self.stride} pixels, got {self.padded_for}")

    @property
    def stride(self) -> int:
        """Pixels of the image between neighbours of what comes out."""
        return 2 * math.prod(stride for _, _, stride, _, _ in self.rows)

    @property
    def channels(self) -> int:
        """Of what comes out."""
        return self.rows[-1][4]


@dataclass(frozen=True, slots=True, kw_only=True)
class SdfConfig:
    """Sizes of the networks that learn a patch's signed distance; the defaults are Shape-Guided's.

    `channels` are of the layers on each point, whose last is the width of a patch before two layers make `code` of it;
    `hidden` is the width of the signed distance's layers, `layers` how many of them there are between first and last.
    """

    channels: tuple[int, int, int] = (64, 128, 1024)
    code: int = 128
    hidden: int = 512
    layers: int = 7

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))  # JSON brings a list
        if len(self.channels) != 3 or min(*self.channels, self.code, self.hidden, self.layers) < 1:
            raise ValueError(f"expected three channels and sizes of at least 1, got {self}")
