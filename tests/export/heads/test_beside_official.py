"""Our networks beside the authors' own. Set M3AD_CFM_CHECKOUT or M3AD_CMDR_IAD_CHECKOUT to a checkout of theirs."""

import ast
import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from m3ad_export.heads.cmdr import CmdrConfig, Dec2d, Dec3d
from m3ad_export.heads.map_head import GatedReconstruction
from m3ad_export.heads.mappings import BigMapping, CrossMap
from m3ad_export.heads.mentor import Mapping
from named_weights import fill, given
from torch import Tensor, nn


def checkout(variable: str) -> Path:
    if variable not in os.environ:
        pytest.skip(f"{variable} names no checkout")
    return Path(os.environ[variable])


def module_of(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"official_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_same_function(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    """Ours takes the state of theirs strictly and makes the same of an input, to 1e-5 of the largest value."""
    ours.load_state_dict(fill(theirs).state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    with torch.no_grad():
        expected, found = theirs(x), ours.eval()(x)
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("widths", [(768, 1152), (1152, 768)])
def test_cfms_mappings(widths: tuple[int, int]) -> None:
    official = module_of(checkout("M3AD_CFM_CHECKOUT") / "models" / "feature_transfer_nets.py")
    x = given(1, 64, widths[0])
    assert_same_function(Mapping(*widths), official.FeatureProjectionMLP(*widths), x)
    assert_same_function(BigMapping(*widths), official.FeatureProjectionMLP_big(*widths), x)


@pytest.mark.parametrize("widths", [(768, 1152), (1152, 768)])
def test_cmdrs_mappings(widths: tuple[int, int]) -> None:
    official = module_of(checkout("M3AD_CMDR_IAD_CHECKOUT") / "networks" / "Map.py")
    assert_same_function(CrossMap(*widths), official.FeatureMappigMLP(*widths), given(1, 64, widths[0]))


@pytest.mark.slow
def test_cmdrs_rgb_decoder() -> None:
    official = module_of(checkout("M3AD_CMDR_IAD_CHECKOUT") / "networks" / "Dec2d.py")
    assert_same_function(Dec2d(CmdrConfig()), official.Decoder2D(dim=768), given(3, 1, 50176, 768))


@pytest.mark.slow
def test_cmdrs_xyz_decoder() -> None:
    official = module_of(checkout("M3AD_CMDR_IAD_CHECKOUT") / "networks" / "Dec3d.py")
    assert_same_function(Dec3d(CmdrConfig()), official.Decoder3D(), given(4, 1, 50176, 1152))


def functions_of(path: Path) -> dict[str, Any]:
    """The functions of a script that does not parse as published: a name with a hyphen is mended first."""
    tree = ast.parse(path.read_text().replace("CMDR-IAD_inference", "inference"))
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    found: dict[str, Any] = {"torch": torch, "F": F}
    exec(compile(tree, str(path), "exec"), found)
    return found


def test_cmdrs_fusion() -> None:
    official = functions_of(checkout("M3AD_CMDR_IAD_CHECKOUT") / "inference.py")
    pixel = torch.arange(40 * 224, 50176)
    scores = given(1, 4, len(pixel)).abs().clamp(max=2)
    d = torch.zeros(4, 50176)
    d[:, pixel] = (2 * scores).sqrt()
    d_map2d, d_map3d, d_rec2d, d_rec3d = d.reshape(4, 224, 224)

    def smoothed(x: Tensor, fives: int, sevens: int) -> Tensor:
        x = x[None, None]
        for width, times in ((5, fives), (7, sevens)):
            weight = torch.ones(1, 1, width, width) / width**2
            x = official["smooth_with_box_filters"](x, weight, width // 2, lower_iters=times)
        return x[0, 0]

    a_map = official["reliability_gated_mapping_anomaly"](d_map2d, d_map3d)
    a_rec = official["confidence_weighted_reconstruction_anomaly"](smoothed(d_rec2d, 3, 2), d_rec3d)
    expected = smoothed(a_map * a_rec, 5, 3)
    anomaly_map, score, maps = GatedReconstruction(image_norm="cfm")(scores, pixel)
    for ours, theirs in ((maps[4], a_map), (maps[5], a_rec), (anomaly_map, expected)):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.max()), rtol=0)
    published = (expected / torch.sqrt(expected[expected != 0].mean())).max()
    torch.testing.assert_close(score[0], published, atol=0, rtol=1e-5)
