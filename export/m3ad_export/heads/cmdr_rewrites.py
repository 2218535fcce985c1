"""CMDR-IAD's decoders with less to do, by identities that hold exactly.

    RGB   the first layer on the tokens, only windows near scored pixels, convolutions on a crop, last layers on rows
    XYZ   W X^T = (W A) G^T of X = A G: the first layer on the tokens, through the transposed sparse operator
    both  affines of LN in the layer behind, BatchNorm and deconvolution as one convolution

All of it runs in train mode too but for the last line; there the crop is what the RGB decoder's BatchNorm sees.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from m3ad.contract import IMAGE_SIZE
from m3ad_plugins.ops import SparseRows
from torch import Tensor, nn

from m3ad_export.heads.cmdr import PIXELS, Dec2d, Dec3d
from m3ad_export.heads.fold import fold_batch_norms, fold_norm
from m3ad_export.heads.map_head import AxisMap, up
from m3ad_export.heads.rgb_rows import RgbRows

REACH = 3  # pixels to each side that three 3x3 convolutions look at


@dataclass(frozen=True, slots=True)
class Region:
    """The part of the grid that the RGB decoder computes.

    Attributes:
        windows: [n] the windows before the convolutions.
        rows: of the grid, first and one behind the last, for the convolutions.
        columns: likewise.
    """

    windows: Tensor
    rows: tuple[int, int]
    columns: tuple[int, int]

    def local(self, pixel: Tensor) -> Tensor:
        """Row-major positions of pixels [R] within the crop."""
        y, x = pixel // IMAGE_SIZE - self.rows[0], pixel % IMAGE_SIZE - self.columns[0]
        return y * (self.columns[1] - self.columns[0]) + x


def whole(window: int) -> Region:
    """Every window, no crop."""
    return Region(torch.arange(PIXELS // window), (0, IMAGE_SIZE), (0, IMAGE_SIZE))


def needed(scored_pixel: Tensor, window: int) -> Region:
    """What the rows of these pixels depend on and no more: the rest of the crop stays zero."""
    mask = torch.zeros(PIXELS)
    mask[scored_pixel.long()] = 1
    near = F.max_pool2d(mask.reshape(1, IMAGE_SIZE, IMAGE_SIZE), 2 * REACH + 1, stride=1, padding=REACH)
    windows = near.reshape(-1, window).amax(dim=1).nonzero()[:, 0]
    return Region(windows, *_bounds(scored_pixel))


def rectangle(scored_pixel: Tensor, window: int) -> Region:
    """The same crop with all of it computed, for BatchNorm's statistics in training."""
    rows, columns = _bounds(scored_pixel)
    first, last = rows[0] * IMAGE_SIZE // window, (rows[1] * IMAGE_SIZE - 1) // window
    return Region(torch.arange(first, last + 1), rows, columns)


def _bounds(scored_pixel: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    axes = (scored_pixel.long() // IMAGE_SIZE, scored_pixel.long() % IMAGE_SIZE)
    ends = [(int(a.min()) - REACH, int(a.max()) + REACH + 1) for a in axes]
    rows, columns = ((max(low, 0), min(high, IMAGE_SIZE)) for low, high in ends)
    return rows, columns


def rgb_rebuilt(
    decoder: Dec2d, spread: RgbRows, tokens: Tensor, scored_pixel: Tensor, region: Region | None = None
) -> Tensor:
    """The RGB decoder's rows of the scored pixels, the dense module's: rgb_tokens [P, D], [R] -> [R, D].

    Args:
        decoder: as trained, or `folded_rgb`.
        spread: of the tokens' side.
        tokens: of a frame.
        scored_pixel: row-major.
        region: what is computed; `needed` if left out.
    """
    pixel = scored_pixel.long()
    region = region or needed(pixel, decoder.window)
    within = (region.windows[:, None] * decoder.window + torch.arange(decoder.window)).reshape(-1)
    hidden = spread(decoder.first(tokens), within)
    rows = decoder.windows(hidden.reshape(-1, decoder.window, decoder.width)).reshape(-1, decoder.width)
    grid = rows.new_zeros(PIXELS, decoder.width).index_copy(0, within, rows)
    grid = grid.T.reshape(1, decoder.width, IMAGE_SIZE, IMAGE_SIZE)
    grid = decoder.conv_decoder(grid[:, :, slice(*region.rows), slice(*region.columns)])
    return decoder.reconstruct(grid.flatten(2)[0].T.index_select(0, region.local(pixel)))


def folded_rgb(decoder: Dec2d) -> Dec2d:
    """The same function in eval mode: LN affines in the layers behind, plain convolutions for normed deconvolutions."""
    folded = copy.deepcopy(decoder).requires_grad_(False)
    folded.projection[2], folded.projection[4] = fold_norm(decoder.projection[2], decoder.projection[4])
    block, source = folded.attn, decoder.attn
    block.norm1, block.attn.qkv = fold_norm(source.norm1, source.attn.qkv)
    block.norm2, block.mlp[0] = fold_norm(source.norm2, source.mlp[0])
    folded.conv_decoder = fold_batch_norms(folded.conv_decoder)
    return folded.requires_grad_(False).eval()


def hidden_of_rows(decoder: Dec3d, xyz_features: Tensor, scored_pixel: Tensor) -> Tensor:
    """The XYZ decoder's first layer from the rows of the scored pixels: [R, D], [R] -> [D, 1568]."""
    weight = decoder.first.weight.index_select(1, scored_pixel.long())
    return xyz_features.T @ weight.T + decoder.first.bias


def hidden_of_tokens(decoder: Dec3d, xyz_tokens: Tensor, operator: SparseRows) -> Tensor:
    """The same from the tokens [G, D] and the operator that spreads them, without the rows -> [D, 1568]."""
    pixel = torch.from_numpy(operator.scored_pixel).long()
    weight = decoder.first.weight.index_select(1, pixel)  # [1568, R]
    folded = torch.sparse.mm(adjoint(operator), weight.T)
    return xyz_tokens.T @ folded + decoder.first.bias


def adjoint(operator: SparseRows) -> Tensor:
    """A^T as a sparse tensor [G, R]."""
    indptr = torch.from_numpy(operator.indptr).long()
    rows = torch.repeat_interleave(torch.arange(len(indptr) - 1), indptr.diff())
    index = torch.stack([torch.from_numpy(operator.indices).long(), rows])
    shape = (operator.groups, len(operator.scored_pixel))
    weights = torch.from_numpy(operator.weights)
    return torch.sparse_coo_tensor(index, weights, shape, check_invariants=True).coalesce()


def xyz_rebuilt(decoder: Dec3d, hidden: Tensor, scored_pixel: Tensor) -> Tensor:
    """The XYZ decoder's rows of the scored pixels from its first layer's output: [D, 1568], [R] -> [R, D]."""
    return decoder.behind_first(hidden).index_select(1, scored_pixel.long()).T


def folded_xyz(decoder: Dec3d) -> Dec3d:
    """The same function in eval mode: the first LN's affine in the layer behind, norms in the deconvolutions."""
    folded = copy.deepcopy(decoder).requires_grad_(False)
    folded.projection[2], folded.projection[4] = fold_norm(decoder.projection[2], decoder.projection[4])
    folded.decoder = fold_batch_norms(folded.decoder)
    return folded.requires_grad_(False).eval()


class RgbDecoder(nn.Module):
    """The stage on the whole grid: rgb_tokens [P, D], scored_pixel [R] -> rgb_rebuilt [R, D].

    No size depends on the frame: what an engine wants. The first layer's output is spread as U X U^T, U the bilinear
    taps of one axis.

    Args:
        decoder: trained; is folded.
        side: of the tokens' grid.
    """

    def __init__(self, decoder: Dec2d, side: int) -> None:
        super().__init__()
        self.decoder, self.side, self.spread = folded_rgb(decoder), side, AxisMap(up(side, IMAGE_SIZE))

    def forward(self, rgb_tokens: Tensor, scored_pixel: Tensor) -> Tensor:
        width = self.decoder.width
        hidden = self.decoder.first(rgb_tokens).T.reshape(width, self.side, self.side)
        pixels = self.spread(hidden).reshape(width, PIXELS).T.reshape(-1, self.decoder.window, width)
        rows = self.decoder.windows(pixels).reshape(PIXELS, width)
        grid = self.decoder.conv_decoder(rows.T.reshape(1, width, IMAGE_SIZE, IMAGE_SIZE))
        picked = grid.reshape(width, PIXELS).T.index_select(0, scored_pixel)
        return self.decoder.reconstruct(picked)


class XyzDecoderRest(nn.Module):
    """weights [K, H], features [K, D], scored_pixel [R] -> xyz_rebuilt [R, D]; the decoder is folded.

    The first layer is features^T weights: its weights of the scored pixels with their features (K = R), or those
    weights spread back to the groups with the groups' tokens (K = G), which is the same sum.
    """

    bias: Tensor

    def __init__(self, decoder: Dec3d) -> None:
        super().__init__()
        self.decoder = folded_xyz(decoder)
        self.register_buffer("bias", self.decoder.first.bias.detach())
        self.decoder.projection[0] = nn.Identity()

    def forward(self, weights: Tensor, features: Tensor, scored_pixel: Tensor) -> Tensor:
        return xyz_rebuilt(self.decoder, features.T @ weights + self.bias, scored_pixel)
