"""Modules filled by the names of their tensors, so that figures of another implementation can be met exactly."""

import zlib

import numpy as np
import torch
from torch import Tensor, nn


def fill(module: nn.Module) -> nn.Module:
    """Seed each tensor by its name; in eval mode, without gradients."""
    for name, tensor in module.state_dict().items():
        shape, leaf = tuple(tensor.shape), name.rsplit(".", 1)[-1]
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if leaf == "num_batches_tracked":
            continue
        if leaf in ("running_mean", "bias"):
            values = 0.1 * rng.standard_normal(shape)
        elif leaf in ("running_var", "weight_g", "gamma") or (leaf == "weight" and len(shape) == 1):
            values = rng.uniform(0.5, 1.5, shape)
        else:
            values = rng.standard_normal(shape) * np.sqrt(shape[0] / np.prod(shape))
        tensor.copy_(torch.from_numpy(np.asarray(values, np.float32)))
    return module.eval().requires_grad_(False)


def given(seed: int, *shape: int) -> Tensor:
    """Standard normal input of a seed."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def assert_golden(out: Tensor, mean: float, std: float, elements: tuple[float, float, float]) -> None:
    """Mean, population std and elements 0, n // 3, n - 1, to 1e-5 of the largest value (figures have six decimals)."""
    flat = out.double().flatten()
    n = len(flat)
    found = [flat.mean(), flat.std(correction=0), flat[0], flat[n // 3], flat[n - 1]]
    atol = 5e-7 + 1e-5 * float(flat.abs().max())
    torch.testing.assert_close(
        torch.stack(found), torch.tensor([mean, std, *elements]).double(), atol=atol, rtol=0
    )
