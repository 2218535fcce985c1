"""Vision transformers for the RGB branch: image -> patch tokens, and nothing of files, training or ONNX.

References:
    DINO (Caron et al. 2021, arXiv 2104.14294)    https://github.com/facebookresearch/dino
    DINOv2 (Oquab et al. 2023, arXiv 2304.07193)  https://github.com/facebookresearch/dinov2
Parameter names are those of the published checkpoints.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3ad_export.nets.configs import RgbEncoderConfig


class PatchEmbed(nn.Module):
    """Image to patch embedding: [1, 3, H, W] -> [1, P, D], row-major."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, image: Tensor) -> Tensor:
        grid: Tensor = self.proj(image)
        return grid.flatten(2).transpose(1, 2)  # [1, P, D]


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d)) v, written out so that the ONNX graph is the plain pattern: [1, T, D] -> [1, T, D]."""

    def __init__(self, width: int, heads: int, *, qkv_bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        _, T, D = x.shape
        q, k, v = self.qkv(x).reshape(1, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        weights = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)  # [1, heads, T, T]
        out: Tensor = self.proj((weights @ v).transpose(1, 2).reshape(1, T, D))
        return out


class Mlp(nn.Module):
    """fc2(GELU(fc1(x))): [1, T, D] -> [1, T, D]."""

    def __init__(self, width: int, ratio: int = 4) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, ratio * width)
        self.fc2 = nn.Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class LayerScale(nn.Module):
    """A learned gain per channel (DINOv2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block: x += ls1(attn(norm1(x))); x += ls2(mlp(norm2(x))). DropPath is left out."""

    def __init__(
        self, width: int, heads: int, *, norm_eps: float, qkv_bias: bool = True, layer_scale: bool = False
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = Attention(width, heads, qkv_bias=qkv_bias)
        self.ls1 = LayerScale(width) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = Mlp(width)
        self.ls2 = LayerScale(width) if layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        out: Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return out


class VisionTransformer(nn.Module):
    """image [1, 3, 224, 224] -> rgb_tokens [P, D]: the chosen blocks' patch tokens, side by side; CLS is dropped."""

    def __init__(self, config: RgbEncoderConfig) -> None:
        super().__init__()
        self.config = config
        D = config.width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.side**2, D))
        self.patch_embed = PatchEmbed(config.patch_size, D)
        self.blocks = nn.ModuleList(
            Block(D, config.heads, norm_eps=1e-6, layer_scale=config.layer_scale) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(D, eps=1e-6)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.cat([self.cls_token, self.patch_embed(image)], dim=1) + self.pos_embed  # [1, 1 + P, D]
        outputs = {}
        for i in range(max(self.config.blocks) + 1):  # what lies behind the last chosen block never runs
            x = self.blocks[i](x)
            outputs[i] = self.norm(x) if self.config.final_norm else x
        return torch.cat([outputs[i][0, 1:] for i in self.config.blocks], dim=1)  # [P, len(blocks) * D]


def fold_position_grid(pos_embed: Tensor, side: int) -> Tensor:
    """Resample a checkpoint's position grid once, bicubic, so that the graph holds a constant.

    Args:
        pos_embed: [1, 1 + n * n, D], CLS first.
        side: patches along one side of the 224 x 224 image.

    Returns:
        [1, 1 + side * side, D]; the same tensor when the grid already fits.
    """
    n = round((pos_embed.shape[1] - 1) ** 0.5)
    if n == side:
        return pos_embed
    grid = pos_embed[:, 1:].reshape(1, n, n, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
