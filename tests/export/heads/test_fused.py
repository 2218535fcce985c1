import numpy as np
import pytest
import torch
from conftest import make_input, randomise
from m3ad.methods.mentor3ad import METHOD
from m3ad_export.heads.fused import (
    PROJECTED,
    HeadRows,
    HeadTokens,
    RotatedOutput,
    linear,
    row_space_basis,
    split_columns,
)
from m3ad_export.heads.mentor import HeadConfig, Mfm, Mgm, heads_from_config
from m3ad_export.heads.tiled import FusedHead, tile_scores
from m3ad_export.heads.voting import score
from m3ad_plugins import ops
from m3ad_runtime.stages import bilinear_operator
from torch import Tensor

MENTOR, RGB, XYZ = 16, 24, 36


def random_heads(config: HeadConfig) -> tuple[Mfm, Mgm]:
    mfm, mgm = heads_from_config(config)
    randomise(mfm, 1)
    randomise(mgm, 2)
    return mfm.eval(), mgm.eval()


def plain_scores(mfm: Mfm, mgm: Mgm, rgb: Tensor, xyz: Tensor) -> Tensor:
    """The chain as the paper has it, in float64."""
    mfm, mgm, rgb, xyz = mfm.double(), mgm.double(), rgb.double(), xyz.double()
    mentor = mfm(rgb, xyz)
    rgb_rec, xyz_rec = mgm(rgb, xyz, mentor)
    cosines = [
        torch.cosine_similarity(a, b, dim=1)
        for a, b in ((rgb, rgb_rec), (xyz, xyz_rec), (mentor, mfm(rgb_rec, xyz_rec)))
    ]
    return 1 - torch.stack(cosines)


@pytest.mark.parametrize(("width", "outputs"), [(11, 5), (1152, 704), (6, 6)])
def test_row_space_basis_is_orthonormal_and_the_layer_reads_its_first_axes_only(
    width: int, outputs: int
) -> None:
    first = torch.nn.Linear(width, outputs)
    basis, read = row_space_basis(first)
    torch.testing.assert_close(basis.T @ basis, torch.eye(width).double(), atol=1e-12, rtol=0)
    x = torch.randn(13, width).double()
    turned = x @ basis
    torch.testing.assert_close(turned[:, :outputs] @ read.T, x @ first.weight.double().T)


def test_the_axes_that_a_layer_reads_are_alike_for_eight_bits() -> None:
    """A basis straight from the factorization has a largest weight of 27 standard deviations here, in a triangle."""
    basis, read = row_space_basis(torch.nn.Linear(1152, 704))
    for each in (read, basis[:, :704]):
        assert each.abs().max() < 7 * each.std()


def test_rotated_output_is_the_layer_in_the_basis_its_reader_wants() -> None:
    last, first = torch.nn.Linear(7, 11), torch.nn.Linear(11, 5)
    x = torch.randn(13, 7)
    columns = RotatedOutput(last, first)(x)
    assert [block.shape for block in columns] == [(13, 5), (13, 6)]
    basis, read = row_space_basis(first)
    torch.testing.assert_close(torch.cat(columns, dim=1) @ basis.float().T, last(x), atol=1e-6, rtol=1e-5)
    again = linear(read, first.bias)(columns[0])
    torch.testing.assert_close(again, first(last(x)), atol=1e-6, rtol=1e-5)


def test_split_columns_adds_up_to_the_layer() -> None:
    layer = torch.nn.Linear(9, 4)
    a, b = torch.randn(6, 3), torch.randn(6, 6)
    left, right = split_columns(layer, 3)
    torch.testing.assert_close(a @ left.T + b @ right.T + layer.bias, layer(torch.cat([a, b], dim=1)))


@pytest.mark.parametrize("join", ["concat", "sum"])
@pytest.mark.parametrize("unit_branches", [True, False])
def test_first_layers_on_tokens_commute_with_interpolation_and_pooling(
    join: str, unit_branches: bool
) -> None:
    """The geometric operator's rows do not sum to one at the foreground's border: a bias in the wrong place shows."""
    config = HeadConfig(
        rgb_width=RGB, xyz_width=XYZ, mentor_width=MENTOR, join=join, unit_branches=unit_branches
    )  # type: ignore[arg-type]
    mfm, mgm = random_heads(config)
    frame = make_input(2500)
    idx = ops.farthest_point_sample(frame.points, 64)
    operator = ops.interpolation_operator(
        frame.points, frame.point_pixel, frame.points[idx], frame.scored_pixel
    )
    assert operator.apply(np.ones((64, 1), np.float32)).min() < 0.5

    operators = {"xyz": operator, "rgb": bilinear_operator(8, operator.scored_pixel)}

    def project(name: str, tokens: Tensor) -> Tensor:
        return torch.from_numpy(operators[name[:3]].apply(tokens.detach().numpy()))

    tokens = {"rgb_features": torch.randn(64, RGB), "xyz_features": torch.randn(64, XYZ)}
    with torch.no_grad():
        first, rest = HeadTokens(mfm, mgm), HeadRows(mfm, mgm)
        head = FusedHead(first, first.widths, rest, rest.INPUTS, rest.widths, torch.nn.Identity())
        projected = dict(zip(PROJECTED, first(*tokens.values()), strict=True))
        assert first.widths == {name: each.shape[1] for name, each in projected.items()}
        rows = {name: project(name, each) for name, each in (tokens | projected).items()}
        found = tile_scores(head, METHOD.pairs, rows)
        expected = plain_scores(mfm, mgm, rows["rgb_features"], rows["xyz_features"])
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


def test_small_scores_keep_their_digits_in_fp32() -> None:
    a = torch.randn(5, 64)
    b = a + 1e-4 * torch.randn(5, 64)
    exact = 1 - torch.cosine_similarity(a.double(), b.double(), dim=1)
    torch.testing.assert_close(score(a, b).double(), exact, rtol=1e-2, atol=0)
