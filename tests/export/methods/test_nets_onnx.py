"""The stages that the house will export, through the exporter and ONNX Runtime; rows are a dynamic axis."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from frames import all_rows, disc, frame_of
from golden import fill
from m3ad_export.methods.cfm import CfmVote
from m3ad_export.methods.cmdr_iad import CmdrConfig, CmdrVote, Dec2d, Dec3d
from m3ad_export.methods.cmdr_rewrites import RgbDecoder, XyzDecoder
from m3ad_export.methods.mappings import CrossMap, Mappings, folded_map
from torch import Tensor, nn

SMALL = CmdrConfig(rgb_width=32, xyz_width=24, heads=2, rgb_convs=(12, 8), xyz_convs=(16, 12, 10, 8))


def inputs_of(radius: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rgb_tokens, rgb_features, xyz_features, scored_pixel."""
    frame = frame_of(disc(radius), groups=16, rgb_width=32, xyz_width=24)
    return torch.from_numpy(frame.rgb_tokens), *all_rows(frame), torch.from_numpy(frame.scored_pixel)


def assert_runs_alike(module: nn.Module, path: Path, rows: list[bool], *cases: tuple[Tensor, ...]) -> None:
    """Export with the first case, run all of them; `rows` tells which inputs have R rows."""
    module = module.eval().requires_grad_(False)
    axis = torch.export.Dim("R", min=2, max=50176)
    shapes = tuple({0: axis} if dynamic else None for dynamic in rows)
    if isinstance(module, CmdrVote):
        shapes = (shapes,)
    names = [f"in{i}" for i in range(len(rows))]
    torch.onnx.export(
        module, cases[0], path, dynamo=True, dynamic_shapes=shapes, input_names=names, verbose=False
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for case in cases:
        expected = module(*case)
        found = session.run(None, {n: t.numpy() for n, t in zip(names, case, strict=True)})
        for ours, real in zip(found, expected if isinstance(expected, tuple) else (expected,), strict=True):
            np.testing.assert_allclose(ours, real.numpy(), atol=1e-5 * float(real.abs().max()), rtol=0)


def made(real: Tensor, seed: int) -> Tensor:
    return real + 0.3 * torch.randn(real.shape, generator=torch.Generator().manual_seed(seed))


def test_cfms_vote(tmp_path: Path) -> None:
    cases = []
    for radius in (30, 21):
        _, rgb, xyz, pixel = inputs_of(radius)
        cases.append((rgb, made(rgb, 1), xyz, made(xyz, 2), pixel))
    assert_runs_alike(CfmVote("cfm"), tmp_path / "vote.onnx", [True] * 5, *cases)


@pytest.mark.parametrize("modality", ["both", "rgb", "xyz"])
def test_cmdrs_vote(tmp_path: Path, modality: str) -> None:
    cases = []
    for radius in (30, 21):
        _, rgb, xyz, pixel = inputs_of(radius)
        pairs = {"rgb": (rgb, made(rgb, 1)), "xyz": (xyz, made(xyz, 2))}
        both = (*pairs["rgb"], *pairs["xyz"], rgb, made(rgb, 3), xyz, made(xyz, 4))
        cases.append((*(both if modality == "both" else pairs[modality]), pixel))
    vote = CmdrVote(modality, image_norm="cfm")
    assert_runs_alike(vote, tmp_path / "vote.onnx", [True] * len(cases[0]), *cases)


def test_cmdrs_maps(tmp_path: Path) -> None:
    maps = Mappings(folded_map(fill(CrossMap(32, 24))), folded_map(fill(CrossMap(24, 32))))
    cases = [inputs_of(radius)[1:3] for radius in (30, 21)]
    assert_runs_alike(maps, tmp_path / "map.onnx", [True, True], *cases)


def test_cmdrs_rgb_decoder_on_the_whole_grid(tmp_path: Path) -> None:
    cases = [(tokens, pixel) for tokens, _, _, pixel in map(inputs_of, (30, 21))]
    stage = RgbDecoder(fill(Dec2d(SMALL)), 8, crop=False)
    assert_runs_alike(stage, tmp_path / "rgb_decoder.onnx", [False, True], *cases)


@pytest.mark.slow
def test_cmdrs_xyz_decoder(tmp_path: Path) -> None:
    cases = [(xyz, pixel) for _, _, xyz, pixel in map(inputs_of, (30, 21))]
    assert_runs_alike(XyzDecoder(fill(Dec3d(SMALL))), tmp_path / "xyz_decoder.onnx", [True, True], *cases)
