"""Norms moved into the layer beside them, in float64: the same function in eval mode with less to do."""

import copy
from itertools import pairwise

import torch
from torch import Tensor, nn

from m3ad_export.heads.fused import linear


def fold_norm(norm: nn.Module, layer: nn.Module) -> tuple[nn.LayerNorm, nn.Linear]:
    """W (g n(x) + h) + b = (W g) n(x) + (b + W h): the LayerNorm without its affine, the Linear behind it with it."""
    assert isinstance(norm, nn.LayerNorm)
    assert isinstance(layer, nn.Linear)
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    gain, shift = norm.weight.detach().double(), norm.bias.detach().double()
    bare = nn.LayerNorm(norm.normalized_shape, eps=norm.eps, elementwise_affine=False)
    return bare, linear(weight * gain, bias + weight @ shift)


def fold_batch_norms(layers: nn.Sequential) -> nn.Sequential:
    """Each BatchNorm in the deconvolution before it."""
    folded: list[nn.Module] = []
    for layer in layers:
        if isinstance(layer, nn.BatchNorm2d):
            folded.append(conv_of_deconv(folded.pop(), layer))
        elif isinstance(layer, nn.BatchNorm1d):
            folded.append(normed_deconv(folded.pop(), layer))
        else:
            folded.append(layer)
    return nn.Sequential(*folded)


def conv_of_deconv(layer: nn.Module, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """A transposed convolution 3x3 of stride 1 and the norm behind it as the convolution that it is.

    The kernel transposed and flipped; what a transposed convolution crops with padding 1 is zero padding of 1.
    """
    assert isinstance(layer, nn.ConvTranspose2d)
    gain, shift = norm_line(norm)
    kernel = layer.weight.detach().double().transpose(0, 1).flip(2, 3)
    conv = nn.Conv2d(layer.in_channels, layer.out_channels, 3, padding=1)
    put(conv, kernel * gain[:, None, None, None], layer.bias, gain, shift)
    return conv


def normed_deconv(layer: nn.Module, norm: nn.BatchNorm1d) -> nn.ConvTranspose1d:
    """A transposed convolution along a line with the norm behind it in its weights."""
    assert isinstance(layer, nn.ConvTranspose1d)
    gain, shift = norm_line(norm)
    deconv = nn.ConvTranspose1d(layer.in_channels, layer.out_channels, 4, stride=2, padding=1)
    put(deconv, layer.weight.detach().double() * gain[:, None], layer.bias, gain, shift)
    return deconv


def norm_line(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """A BatchNorm in eval mode as gain and shift of each channel, float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    gain = norm.weight.detach().double() / torch.sqrt(norm.running_var.double() + norm.eps)
    return gain, norm.bias.detach().double() - gain * norm.running_mean.double()


def put(
    target: nn.Conv2d | nn.ConvTranspose1d, weight: Tensor, bias: Tensor | None, gain: Tensor, shift: Tensor
) -> None:
    """Write float64 weights and the bias behind a norm's line into a layer."""
    assert bias is not None
    assert target.bias is not None
    with torch.no_grad():
        target.weight.copy_(weight)
        target.bias.copy_(bias.double() * gain + shift)


def fold_convolutions(network: nn.Module) -> nn.Module:
    """A copy in eval mode whose convolutions hold the BatchNorms behind them.

    A norm belongs to the convolution before it among the same module's children, as networks are written that run
    their children in order or name `bnK` right after `convK`.
    """
    folded = copy.deepcopy(network).eval()
    for module in folded.modules():
        children = list(module.named_children())
        for (name, layer), (norm_name, norm) in pairwise(children):
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) and isinstance(norm, nn.BatchNorm2d):
                _put_norm(layer, norm)
                setattr(module, name, layer)
                setattr(module, norm_name, nn.Identity())
    return folded.requires_grad_(False)


def _put_norm(layer: nn.Conv2d | nn.ConvTranspose2d, norm: nn.BatchNorm2d) -> None:
    """W <- g W over the output channels, b <- g b + h, in place and in float64."""
    gain, shift = norm_line(norm)
    channels = gain[:, None, None, None] if isinstance(layer, nn.Conv2d) else gain[:, None, None]
    bias = torch.zeros_like(gain) if layer.bias is None else layer.bias.detach().double()
    layer.weight = nn.Parameter((layer.weight.detach().double() * channels).float(), requires_grad=False)
    layer.bias = nn.Parameter((bias * gain + shift).float(), requires_grad=False)
