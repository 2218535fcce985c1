from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import randomise
from m3ad_export.heads.mentor import HeadConfig, Mapping, Mfm, Mgm, heads_from_config
from scipy.special import erf
from torch import Tensor, nn

CONFIG = HeadConfig(rgb_width=24, xyz_width=36, mentor_width=8)
Array = npt.NDArray[np.float64]


def gelu(x: Array) -> Array:
    return x * 0.5 * (1 + erf(x / np.sqrt(2)))


def layer(x: Array, linear: nn.Linear) -> Array:
    return x @ linear.weight.detach().double().numpy().T + linear.bias.detach().double().numpy()


def mlp(x: Array, *linears: nn.Linear) -> Array:
    for linear in linears[:-1]:
        x = gelu(layer(x, linear))
    return layer(x, linears[-1])


def rows(width: int, seed: int) -> Tensor:
    return torch.randn(50, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("join", ["concat", "sum"])
@pytest.mark.parametrize("unit_branches", [False, True])
def test_mentor_is_the_outer_mlp_of_both_branches(join: str, unit_branches: bool) -> None:
    mfm = Mfm(replace(CONFIG, join=join, unit_branches=unit_branches))
    randomise(mfm, 0)
    rgb, xyz = rows(24, 1), rows(36, 2)
    branches = [
        mlp(x.double().numpy(), branch.first, branch.last)
        for x, branch in ((rgb, mfm.rgb_branch), (xyz, mfm.xyz_branch))
    ]
    if unit_branches:
        branches = [b / np.linalg.norm(b, axis=1, keepdims=True) for b in branches]
    joined = np.concatenate(branches, axis=1) if join == "concat" else branches[0] + branches[1]
    with torch.inference_mode():
        np.testing.assert_allclose(mfm(rgb, xyz), mlp(joined, mfm.fusion.first, mfm.fusion.last), atol=1e-5)


def test_each_modality_is_rebuilt_from_the_other_and_the_mentor() -> None:
    mgm = Mgm(CONFIG)
    randomise(mgm, 0)
    rgb, xyz, mentor = rows(24, 1), rows(36, 2), rows(8, 3)
    arrays = [x.double().numpy() for x in (rgb, xyz, mentor)]
    with torch.inference_mode():
        rgb_reconstructed, xyz_reconstructed = mgm(rgb, xyz, mentor)
    for found, mapping, gate, other in (
        (rgb_reconstructed, mgm.to_rgb, mgm.mentor_to_rgb, arrays[1]),
        (xyz_reconstructed, mgm.to_xyz, mgm.mentor_to_xyz, arrays[0]),
    ):
        guided = np.concatenate([gelu(layer(arrays[2], gate)), other], axis=1)
        expected = mlp(guided, mapping.input, mapping.projection, mapping.output)
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_published_sizes() -> None:
    assert sum(p.numel() for p in Mapping(768, 1152).parameters()) == 2_767_872
    assert sum(p.numel() for p in Mapping(1152, 768).parameters()) == 2_767_488
    heads = heads_from_config(HeadConfig())
    assert sum(p.numel() for h in heads for p in h.parameters()) == pytest.approx(9.04e6, rel=0.02)


def test_an_unknown_join_is_refused() -> None:
    with pytest.raises(ValueError, match="join must be concat or sum, got 'mean'"):
        replace(CONFIG, join="mean")


@pytest.mark.parametrize("width", [0, 24, 30])
def test_a_mentor_as_wide_as_the_features_is_refused(width: int) -> None:
    message = f"mentor_width must be narrower than the features, 24 and 36, got {width}"
    with pytest.raises(ValueError, match=message):
        HeadConfig(rgb_width=24, xyz_width=36, mentor_width=width)
