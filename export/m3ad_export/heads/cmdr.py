"""CMDR-IAD: each modality mapped to the other's features and rebuilt from its own.

References:
    CMDR-IAD  https://github.com/ECGAI-Research/CMDR-IAD (no licence; its weights are unpublished)
Parameter names are those of the authors' files. The RGB decoder is made of four parts (first layer, windows,
convolutions, last layers) and the XYZ one of two, so that they can run on tokens, on a crop and on rows: see
`cmdr_rewrites`.
"""

from dataclasses import dataclass
from itertools import pairwise

from m3ad.contract import IMAGE_SIZE
from m3ad.methods.cmdr_iad import WINDOW
from torch import Tensor, nn

from m3ad_export.heads.map_head import Modality, checked_choice
from m3ad_export.heads.mappings import DROPOUT, CrossMap, Mappings, two_normed_layers

PIXELS = IMAGE_SIZE * IMAGE_SIZE
SHRINK = 32  # the XYZ decoder's five doublings lead back to the pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class CmdrConfig:
    """Widths, and whose networks there are; the defaults are the published ones."""

    rgb_width: int = 768
    xyz_width: int = 1152
    heads: int = 8
    rgb_convs: tuple[int, int] = (256, 128)
    xyz_convs: tuple[int, int, int, int] = (768, 512, 256, 128)
    modality: Modality = "both"

    def __post_init__(self) -> None:
        checked_choice("modality", self.modality, Modality)
        if self.rgb_width // 2 % self.heads:
            raise ValueError(f"expected heads that divide {self.rgb_width // 2}, got {self.heads}")


class Attention(nn.Module):
    """Self-attention within each window: [n, W, H] -> [n, W, H]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.attn_drop, self.proj_drop = nn.Dropout(DROPOUT), nn.Dropout(DROPOUT)

    def forward(self, x: Tensor) -> Tensor:
        n, window, width = x.shape
        q, k, v = self.qkv(x).reshape(n, window, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        weights = self.attn_drop(((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1))
        out: Tensor = self.proj_drop(self.proj((weights @ v).transpose(1, 2).reshape(n, window, width)))
        return out


class Block(nn.Module):
    """x += attn(norm1(x)); x += mlp(norm2(x)): [n, W, H] -> [n, W, H]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        inner = (nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(DROPOUT))
        self.mlp = nn.Sequential(*inner, nn.Linear(2 * width, width), nn.Dropout(DROPOUT))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Dec2d(nn.Module):
    """RGB features of every pixel, rebuilt: [1, 50176, D] -> [1, 50176, D]."""

    def __init__(self, config: CmdrConfig) -> None:
        super().__init__()
        width = config.rgb_width // 2
        self.width = width
        self.projection = two_normed_layers(config.rgb_width, width)
        self.attn = Block(width, config.heads)
        channels = (width, *config.rgb_convs, width)
        layers: list[nn.Module] = []
        for a, b in pairwise(channels):
            layers += [nn.ConvTranspose2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.GELU()]
        self.conv_decoder = nn.Sequential(*layers)
        inner = (nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(DROPOUT))
        last = nn.Linear(4 * width, config.rgb_width)
        self.reconstruct = nn.Sequential(*inner, last, nn.LayerNorm(config.rgb_width))

    @property
    def first(self) -> nn.Linear:
        """What reads the features, linear in them: [P, D] -> [P, H]."""
        layer = self.projection[0]
        assert isinstance(layer, nn.Linear)
        return layer

    def windows(self, hidden: Tensor) -> Tensor:
        """Some windows behind the first layer, bias included: [n, W, H] -> [n, W, H]."""
        return self.attn(self.projection[1:](hidden))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.windows(self.first(x[0]).reshape(-1, WINDOW, self.width))
        grid = rows.reshape(-1, self.width).T.reshape(1, self.width, IMAGE_SIZE, IMAGE_SIZE)
        return self.reconstruct(self.conv_decoder(grid).flatten(2).transpose(1, 2))


class Dec3d(nn.Module):
    """XYZ features of every pixel, zero off the part, rebuilt: [1, 50176, D] -> [1, 50176, D].

    Its first layer has a weight for each pixel: it learns where the part lies.
    """

    def __init__(self, config: CmdrConfig) -> None:
        super().__init__()
        width = config.xyz_width
        self.projection = two_normed_layers(PIXELS, PIXELS // SHRINK)
        channels = (width, *config.xyz_convs)
        layers: list[nn.Module] = []
        for a, b in pairwise(channels):
            layers += [nn.ConvTranspose1d(a, b, 4, stride=2, padding=1), nn.BatchNorm1d(b), nn.GELU()]
        last = nn.ConvTranspose1d(channels[-1], width, 4, stride=2, padding=1)
        self.decoder = nn.Sequential(*layers, last, nn.Tanh())
        squeeze = (nn.AdaptiveAvgPool1d(1), nn.Conv1d(width, width // 8, 1), nn.ReLU())
        self.attention = nn.Sequential(*squeeze, nn.Conv1d(width // 8, width, 1), nn.Sigmoid())

    @property
    def first(self) -> nn.Linear:
        """What reads the pixels, linear in the features: [D, 50176] -> [D, 1568]."""
        layer = self.projection[0]
        assert isinstance(layer, nn.Linear)
        return layer

    def behind_first(self, hidden: Tensor) -> Tensor:
        """From the first layer's output on, bias included: [D, 1568] -> [D, 50176].

        The gate needs the mean over all pixels, so no pixel can be left out.
        """
        out = self.decoder(self.projection[1:](hidden)[None])
        gated: Tensor = (out * self.attention(out))[0]
        return gated

    def forward(self, x: Tensor) -> Tensor:
        return self.behind_first(self.first(x[0].T)).T[None]


class CmdrNetworks(nn.Module):
    """The networks of a modality: `both` has all four, `rgb` or `xyz` that decoder alone."""

    def __init__(self, config: CmdrConfig) -> None:
        super().__init__()
        self.config = config
        rgb, xyz = config.rgb_width, config.xyz_width
        both = config.modality == "both"
        self.maps = Mappings(CrossMap(rgb, xyz), CrossMap(xyz, rgb)) if both else None
        self.rgb_decoder = Dec2d(config) if config.modality != "xyz" else None
        self.xyz_decoder = Dec3d(config) if config.modality != "rgb" else None

    def parts(self) -> dict[str, nn.Module]:
        """The networks there are, by the names of the authors' files."""
        maps = (self.maps.to_xyz, self.maps.to_rgb) if self.maps else (None, None)
        every = dict(zip(FILES, (*maps, self.rgb_decoder, self.xyz_decoder), strict=True))
        return {name: network for name, network in every.items() if network is not None}


FILES = ("map2Dto3D", "map3Dto2D", "Dec2D", "Dec3D")
