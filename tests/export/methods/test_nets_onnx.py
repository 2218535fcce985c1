"""The stages of CFM and CMDR-IAD through torch's exporter and ONNX Runtime; rows are a dynamic axis."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from m3ad_export.heads.cmdr import CmdrConfig, Dec3d
from m3ad_export.heads.cmdr_rewrites import XyzDecoderRest, adjoint
from m3ad_export.heads.mappings import CrossMap, Mappings, folded_map
from m3ad_export.methods.cfm import CfmVote
from m3ad_export.methods.cmdr_iad import CmdrVote
from named_weights import fill
from token_frames import all_rows, disc, frame_of
from torch import Tensor, nn

SMALL = CmdrConfig(rgb_width=32, xyz_width=24, heads=2, rgb_convs=(12, 8), xyz_convs=(16, 12, 10, 8))


def inputs_of(radius: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rgb_tokens, rgb_features, xyz_features, scored_pixel."""
    frame = frame_of(disc(radius), groups=16, rgb_width=32, xyz_width=24)
    return torch.from_numpy(frame.rgb_tokens), *all_rows(frame), torch.from_numpy(frame.scored_pixel)


def assert_runs_alike(module: nn.Module, path: Path, rows: str, *cases: tuple[Tensor, ...]) -> None:
    """Export with the first case, run all of them; `rows` has each input's axis, or - where it has none."""
    module = module.eval().requires_grad_(False)
    axes = {letter: torch.export.Dim(letter, min=2, max=50176) for letter in rows if letter != "-"}
    shapes = tuple({0: axes[letter]} if letter in axes else None for letter in rows)
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
    assert_runs_alike(CfmVote("cfm"), tmp_path / "vote.onnx", "RRRRR", *cases)


@pytest.mark.parametrize("modality", ["both", "rgb", "xyz"])
def test_cmdrs_vote(tmp_path: Path, modality: str) -> None:
    cases = []
    for radius in (30, 21):
        _, rgb, xyz, pixel = inputs_of(radius)
        pairs = {"rgb": (rgb, made(rgb, 1)), "xyz": (xyz, made(xyz, 2))}
        both = (*pairs["rgb"], *pairs["xyz"], made(rgb, 3), made(xyz, 4))
        cases.append((*(both if modality == "both" else pairs[modality]), pixel))
    vote = CmdrVote(modality, image_norm="cfm")
    assert_runs_alike(vote, tmp_path / "vote.onnx", "R" * len(cases[0]), *cases)


def test_cmdrs_maps(tmp_path: Path) -> None:
    maps = Mappings(folded_map(fill(CrossMap(32, 24))), folded_map(fill(CrossMap(24, 32))))
    cases = [inputs_of(radius)[1:3] for radius in (30, 21)]
    assert_runs_alike(maps, tmp_path / "map.onnx", "RR", *cases)


@pytest.mark.slow
def test_cmdrs_xyz_decoder_behind_its_first_layer(tmp_path: Path) -> None:
    """The same graph behind the rows of the scored pixels and behind the groups."""
    decoder, cases = fill(Dec3d(SMALL)), []
    for radius in (30, 21):
        frame = frame_of(disc(radius), groups=16, rgb_width=32, xyz_width=24)
        pixel = torch.from_numpy(frame.scored_pixel)
        weights = decoder.first.weight.T[pixel.long()].contiguous()
        by_groups = torch.sparse.mm(adjoint(frame.xyz_operator), weights)
        cases.append((weights, all_rows(frame)[1], pixel))
        cases.append((by_groups, torch.from_numpy(frame.xyz_tokens), pixel))
    assert_runs_alike(XyzDecoderRest(decoder), tmp_path / "xyz_decoder.onnx", "KKR", *cases)
