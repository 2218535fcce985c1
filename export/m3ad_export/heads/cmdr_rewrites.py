"""CMDR-IAD's decoders with less to do, by identities that hold exactly.

    RGB   the first layer on the tokens, only windows near scored pixels, convolutions on a crop, last layers on rows
    XYZ   W X^T = (W A) G^T of X = A G: the first layer on the tokens, through the transposed sparse operator
    both  affines of LN in the layer behind, BatchNorm and deconvolution as one convolution

All of it runs in train mode too but for the last line; there the crop is what the RGB decoder's BatchNorm sees.
"""

import copy
import math

import numpy as np
import numpy.typing as npt
import torch
from m3ad.contract import IMAGE_SIZE
from m3ad.methods.cmdr_iad import REACH, WINDOW
from m3ad_plugins.ops import SparseRows
from m3ad_runtime.windows import Region, region
from torch import Tensor, nn

from m3ad_export.heads.cmdr import PIXELS, Dec2d, Dec3d
from m3ad_export.heads.fold import fold_batch_norms, fold_norm
from m3ad_export.heads.map_head import up


def rectangle(scored_pixel: npt.NDArray[np.int32]) -> Region:
    """The crop of these pixels, ascending, with all of it computed: for BatchNorm's statistics in training."""
    first, last = scored_pixel[[0, -1]] // IMAGE_SIZE
    computed = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.bool_)
    computed[max(first - REACH, 0) : last + REACH + 1] = True
    return region(scored_pixel, computed, WINDOW, REACH)


def rgb_rebuilt(
    decoder: Dec2d, taps: Tensor, tokens: Tensor, window_pixel: Tensor, crop_row: Tensor, scored_pixel: Tensor
) -> Tensor:
    """The RGB decoder's rows of the scored pixels, the dense module's: rgb_tokens [P, D] -> [R, D].

    Args:
        decoder: as trained, or `folded_rgb`.
        taps: [224, side] bilinear ones of one axis, `rgb_taps`.
        tokens: of a frame, P = side * side.
        window_pixel: [K, W] of the `Region` that is computed.
        crop_row: [h, w] likewise.
        scored_pixel: [R] likewise, in the crop.
    """
    side, width = taps.shape[1], decoder.width
    by_row = (taps @ decoder.first(tokens).reshape(side, -1)).reshape(IMAGE_SIZE, side, width)
    grid = (taps @ by_row).reshape(PIXELS, width)
    windows = grid.index_select(0, window_pixel.reshape(-1)).reshape(*window_pixel.shape, width)
    rows = decoder.windows(windows).reshape(-1, width)
    crop = rows.index_select(0, crop_row.reshape(-1)).T.reshape(1, width, *crop_row.shape)
    convolved = decoder.conv_decoder(crop).flatten(2)[0].T
    return decoder.reconstruct(convolved.index_select(0, scored_pixel))


def rgb_taps(tokens: int) -> Tensor:
    """Bilinear taps of one axis from a square grid of so many tokens: [224, side]."""
    return up(math.isqrt(tokens), IMAGE_SIZE).float()


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
    """`rgb_rebuilt` of a decoder, folded: what the graph of the stage is traced from.

    Args:
        decoder: trained.
        tokens: of a frame.
    """

    taps: Tensor

    def __init__(self, decoder: Dec2d, tokens: int) -> None:
        super().__init__()
        self.decoder = folded_rgb(decoder)
        self.register_buffer("taps", rgb_taps(tokens))

    def forward(
        self, rgb_tokens: Tensor, window_pixel: Tensor, crop_row: Tensor, scored_pixel: Tensor
    ) -> Tensor:
        return rgb_rebuilt(self.decoder, self.taps, rgb_tokens, window_pixel, crop_row, scored_pixel)


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
