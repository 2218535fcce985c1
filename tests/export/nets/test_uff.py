"""UFF against its golden figures, and the authors' file: its layout, and what is not of it."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from m3ad.errors import ArtifactError
from m3ad.methods.m3dm import token_of_cell
from m3ad_export.methods.m3dm import M3dmSettings
from m3ad_export.methods.m3dm_uff import load_official
from m3ad_export.nets.uff import Uff
from named_weights import assert_golden, fill, given
from torch.nn import functional as F


def write_file(folder: Path, network: Uff, name: str = "uff.pth") -> Path:
    """As the authors' trainer leaves it."""
    rest = {"optimizer": {"param_groups": [{"lr": 3e-3}]}, "epoch": 2, "args": Namespace(blr=3e-3)}
    torch.save({"model": network.state_dict(), **rest}, folder / name)
    return folder / name


def test_the_network_has_the_authors_tensors_and_figures() -> None:
    network = fill(Uff())
    state = network.state_dict()
    mlp = [f"fc{k}.{kind}" for k in (1, 2) for kind in ("weight", "bias")]
    names = {f"{side}_mlp.{each}" for side in ("rgb", "xyz") for each in mlp}
    names |= {
        f"{side}_{part}.{kind}"
        for side in ("rgb", "xyz")
        for part in ("norm", "head")
        for kind in ("weight", "bias")
    }
    assert state.keys() == names
    assert (len(state), sum(t.numel() for t in state.values())) == (16, 15_840_896)
    xyz, rgb = given(1, 1, 64, 1152), given(2, 1, 64, 768)
    rgb_half, xyz_half = network(rgb, xyz)
    row = torch.cat([xyz_half, rgb_half], dim=2)
    assert_golden(row, -0.007623, 0.700570, (0.951613, 0.403624, -0.187068))


def test_the_heads_are_of_the_loss_alone() -> None:
    network = fill(Uff(16, 24))
    inputs = given(1, 5, 16), given(2, 7, 24)
    before = network(*inputs)
    for head in (network.rgb_head, network.xyz_head):
        head.weight.fill_(float("nan"))
    for side, values in zip(("rgb", "xyz"), inputs, strict=True):
        assert torch.equal(network.part(side)(values), before[side == "xyz"])


@pytest.mark.parametrize("side", [8, 14, 28])
def test_a_cell_lies_on_the_token_that_adaptive_means_repeat(side: int) -> None:
    tokens = torch.randn(side * side, 3)
    image = tokens.T.reshape(1, 3, side, side)
    expected = F.adaptive_avg_pool2d(image, 56)[0].flatten(1).T
    torch.testing.assert_close(tokens[torch.from_numpy(token_of_cell(side)).long()], expected)


def test_tokens_that_do_not_repeat_to_the_cells_are_refused() -> None:
    with pytest.raises(ValueError, match="UFF repeats RGB tokens to 56 x 56 cells, got 16 x 16"):
        token_of_cell(16)


def test_the_authors_file_loads_at_full_size(tmp_path: Path) -> None:
    """With the golden fill for weights: theirs are not public on any index."""
    network = fill(Uff())
    path = write_file(tmp_path, network)
    fitted, infos = load_official(tmp_path, "any", M3dmSettings())
    loaded = fitted.networks["uff"].state_dict()
    assert all(np.array_equal(loaded[name], tensor) for name, tensor in network.state_dict().items())
    assert not fitted.networks["uff"].training
    assert (infos["uff"].name, infos["uff"].licence, infos["uff"].kind) == (path.name, "MIT", "pretrained")


def test_what_is_not_the_authors_file_is_refused(tmp_path: Path) -> None:
    def load() -> None:
        load_official(tmp_path, "any", M3dmSettings())

    with pytest.raises(ArtifactError, match=r"holds 0 files \*\.pth, expected one"):
        load()
    small = Uff(16, 24)
    state = dict(small.state_dict())
    torch.save(state, tmp_path / "uff.pth")
    with pytest.raises(ArtifactError, match="expected a checkpoint with UFF's state dict as its `model`"):
        load()
    torch.save({"model": {k: v for k, v in state.items() if k != "xyz_head.bias"}}, tmp_path / "uff.pth")
    with pytest.raises(
        ArtifactError, match=r"not a checkpoint of Uff with 16 tensors: it lacks 1 \(xyz_head\.bias"
    ):
        load()
    torch.save({"model": state | {"extra": torch.ones(1)}}, tmp_path / "uff.pth")
    with pytest.raises(ArtifactError, match=r"has unknown 1 \(extra\)"):
        load()
    torch.save({"model": state | {"xyz_norm.bias": torch.full((24,), torch.nan)}}, tmp_path / "uff.pth")
    with pytest.raises(ArtifactError, match=r"holds NaN or infinity in xyz_norm\.bias"):
        load()
    write_file(tmp_path, small, "second.pth")
    with pytest.raises(ArtifactError, match=r"holds 2 files \*\.pth, expected one"):
        load()
