from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import randomise
from m3ad.errors import ArtifactError, M3adError
from m3ad_export.heads.map_head import ChordProduct, chords
from m3ad_export.heads.mappings import BigMapping, Mappings, MapRows, MapTokens
from m3ad_export.heads.mentor import Mapping
from m3ad_export.heads.voting import score
from m3ad_export.methods.cfm import (
    CfmSettings,
    CfmVote,
    backward_both,
    load_official,
    random_networks,
    train_cfm,
)
from named_weights import assert_golden, fill, given
from token_frames import Cache, all_rows, disc, frame_of
from torch import Tensor, nn

RGB, XYZ = 24, 36


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_sizes_are_the_published_ones() -> None:
    with torch.device("meta"):
        assert parameters(Mapping(768, 1152)) == 2_767_872
        assert parameters(Mapping(1152, 768)) == 2_767_488
        big = BigMapping(768, 1152)
    assert parameters(big) == 2_767_872 + 4 * 922_560
    assert sorted({name.split(".")[0] for name in big.state_dict()}) == [
        "input",
        "output",
        *(f"projection_{letter}" for letter in "abcde"),
    ]


def test_golden_mapping() -> None:
    out = fill(Mapping(768, 1152))(given(1, 64, 768))
    assert_golden(out, 0.003346, 0.425015, (-0.059322, 0.280321, -0.355949))


def test_the_big_mapping_is_seven_linears_with_gelu_between() -> None:
    mapping = BigMapping(RGB, XYZ)
    randomise(mapping, 3)
    layers = [getattr(mapping, n) for n in ("input", *(f"projection_{c}" for c in "abcde"), "output")]
    plain = nn.Sequential(*(part for layer in layers for part in (layer, nn.GELU())))[:-1]
    x = given(1, 50, RGB)
    torch.testing.assert_close(mapping(x), plain(x), atol=0, rtol=0)


def test_a_chord_is_exactly_the_root_of_twice_the_score() -> None:
    a, b = given(1, 500, 768), given(2, 500, 768)
    published = (F.normalize(b, dim=1) - F.normalize(a, dim=1)).pow(2).sum(1).sqrt()
    torch.testing.assert_close(chords(score(a, b)[None])[0], published, atol=0, rtol=0)


def published_map(networks: Mappings, rgb: Tensor, xyz: Tensor, pixel: Tensor) -> Tensor:
    """CFM as published: dense features, zero rows masked, chords, product, eight box filters."""
    dense_rgb, dense_xyz = torch.zeros(50176, rgb.shape[1]), torch.zeros(50176, xyz.shape[1])
    dense_rgb[pixel], dense_xyz[pixel] = rgb, xyz
    mask = (dense_xyz != 0).any(dim=1)
    rgb_again, xyz_again = networks.to_rgb(dense_xyz), networks.to_xyz(dense_rgb)
    product = torch.ones(50176)
    for real, again in ((dense_rgb, rgb_again), (dense_xyz, xyz_again)):
        product = product * mask * (F.normalize(again, dim=1) - F.normalize(real, dim=1)).pow(2).sum(1).sqrt()
    m = product.reshape(1, 1, 224, 224)
    for width in (5, 5, 5, 5, 5, 7, 7, 7):
        m = F.conv2d(m, torch.full((1, 1, width, width), 1 / width**2), padding=width // 2)
    return m[0, 0]


@pytest.mark.parametrize("big", [False, True])
def test_the_chain_is_the_published_graph(big: bool) -> None:
    networks = random_networks(RGB, XYZ, big=big)
    randomise(networks, 5)
    networks.requires_grad_(False)
    frame = frame_of(disc(50), groups=64, rgb_width=RGB, xyz_width=XYZ)
    rgb, xyz = all_rows(frame)
    pixel = torch.from_numpy(frame.scored_pixel)
    rgb_again, xyz_again = networks(rgb, xyz)
    anomaly_map, image, maps = CfmVote("cfm")(rgb, rgb_again, xyz, xyz_again, pixel)
    expected = published_map(networks, rgb, xyz, pixel.long())
    torch.testing.assert_close(anomaly_map, expected, atol=1e-6 * float(expected.max()), rtol=0)
    published = (expected / torch.sqrt(expected[expected != 0].mean())).max()
    torch.testing.assert_close(image[0], published, atol=0, rtol=1e-5)
    assert maps.shape == (3, 224, 224)


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_fused_form_is_the_chain(full: bool) -> None:
    """First layers on tokens: 2.7e-6 and 2.9e-6 off on the authors' modules, scores 2.4e-7 and 3.6e-7."""
    rgb_width, xyz_width, groups, side = (768, 1152, 1024, 28) if full else (RGB, XYZ, 64, 8)
    networks = random_networks(rgb_width, xyz_width)
    fill(networks) if full else randomise(networks, 6)
    networks.requires_grad_(False)
    frame = frame_of(
        disc(40 if full else 60), groups=groups, rgb_width=rgb_width, xyz_width=xyz_width, side=side
    )
    rgb, xyz = all_rows(frame)
    chain = networks(rgb, xyz)

    tokens = MapTokens(networks).requires_grad_(False)
    tables = tokens(torch.from_numpy(frame.rgb_tokens), torch.from_numpy(frame.xyz_tokens))
    assert [tuple(t.shape) for t in tables] == [
        (side**2, (rgb_width + xyz_width) // 2),
        (groups, (rgb_width + xyz_width) // 2),
    ]
    spread = [
        torch.from_numpy(operator.apply(table.numpy()))
        for operator, table in zip((frame.rgb_operator, frame.xyz_operator), tables, strict=True)
    ]
    fused = MapRows(networks)(*spread)
    for ours, theirs, real in zip(fused, chain, (rgb, xyz), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)
        torch.testing.assert_close(score(real, ours), score(real, theirs), atol=2e-6, rtol=0)
    pixel = torch.from_numpy(frame.scored_pixel)
    scores = torch.stack([score(rgb, fused[0]), score(xyz, fused[1])])
    expected = CfmVote()(rgb, chain[0], xyz, chain[1], pixel)
    torch.testing.assert_close(ChordProduct()(scores, pixel)[0], expected[0], atol=1e-5, rtol=0)


def test_the_bias_of_the_projected_xyz_tokens_may_not_come_before_the_spread() -> None:
    """Rows at the foreground's border sum to less than one."""
    networks = random_networks(RGB, XYZ)
    randomise(networks, 6)
    frame = frame_of(disc(60), groups=64, rgb_width=RGB, xyz_width=XYZ)
    layer = networks.to_rgb.input
    before = frame.xyz_operator.apply(layer(torch.from_numpy(frame.xyz_tokens)).detach().numpy())
    after = layer(all_rows(frame)[1]).detach().numpy()
    assert np.abs(before - after).max() > 1e-2


# --- files


def write_pair(
    folder: Path, kind: type[nn.Module], tag: str = "rope_250ep_4bs"
) -> dict[str, dict[str, Tensor]]:
    folder.mkdir(exist_ok=True)
    widths = {"2Dto3D": (768, 1152), "3Dto2D": (1152, 768)}
    states = {direction: dict(kind(*each).state_dict()) for direction, each in widths.items()}
    for direction, state in states.items():
        torch.save(state, folder / f"CFM_{direction}_{tag}.pth")
    return states


@pytest.mark.parametrize("kind", [Mapping, BigMapping])
def test_the_official_pair_loads_with_its_licence(tmp_path: Path, kind: type[nn.Module]) -> None:
    states = write_pair(tmp_path / "rope", kind)
    networks, infos = load_official(tmp_path, "rope")
    for network, state in ((networks.to_xyz, states["2Dto3D"]), (networks.to_rgb, states["3Dto2D"])):
        assert isinstance(network, kind)
        assert not network.training
        for name, tensor in network.state_dict().items():
            torch.testing.assert_close(tensor, state[name], atol=0, rtol=0)
    assert {info.licence for info in infos.values()} == {"non-commercial"}
    assert infos["to_rgb"].name == "CFM_3Dto2D_rope_250ep_4bs.pth"


def test_files_that_are_not_cfms_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"holds 0 files CFM_2Dto3D_rope_\*\.pth, expected one"):
        load_official(tmp_path, "rope")
    states = write_pair(tmp_path / "rope", Mapping)
    torch.save(states["3Dto2D"], tmp_path / "rope" / "CFM_2Dto3D_rope_250ep_4bs.pth")
    with pytest.raises(ArtifactError, match="has wrong shapes"):
        load_official(tmp_path, "rope")
    renamed = {f"module.{k}": v for k, v in states["2Dto3D"].items()}
    torch.save(renamed, tmp_path / "rope" / "CFM_2Dto3D_rope_250ep_4bs.pth")
    with pytest.raises(ArtifactError, match=r"lacks 6 \(input\.bias.*has unknown 6 \(module\.input\.bias"):
        load_official(tmp_path, "rope")
    write_pair(tmp_path / "rope", Mapping, "rope_50ep_4bs")
    with pytest.raises(ArtifactError, match="holds 2 files"):
        load_official(tmp_path, "rope")


# --- training


def cache_of(frames: int) -> Cache:
    radii = (9, 12, 7, 10, 8)
    made = [frame_of(disc(radii[i]), groups=16, rgb_width=RGB, xyz_width=XYZ, seed=0) for i in range(frames)]
    return Cache(made)


def test_the_step_is_the_published_loss_over_all_rows_of_the_batch_together() -> None:
    """One backward call of the mean over the concatenated rows gives the gradients that chunks add up to."""
    networks = random_networks(RGB, XYZ)
    frames = cache_of(3).frames
    pairs = [all_rows(frame) for frame in frames]
    total = backward_both(networks, pairs, sum(len(rgb) for rgb, _ in pairs))
    found = [p.grad.clone() for p in networks.parameters()]
    networks.zero_grad()
    rgb, xyz = (torch.cat([pair[i] for pair in pairs]) for i in range(2))
    cos = nn.CosineSimilarity(dim=-1, eps=1e-6)
    loss = (1 - cos(networks.to_xyz(rgb), xyz).mean()) + (1 - cos(networks.to_rgb(xyz), rgb).mean())
    loss.backward()
    assert total == pytest.approx(loss.item(), rel=1e-5)
    for grad, parameter in zip(found, networks.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, atol=1e-6, rtol=1e-4)


OFFICIAL = CfmSettings(recipe="official", epochs=3, batch=2, checkpoint_steps=1)
ROWS = CfmSettings(recipe="rows", pool_rows=300, rows=64, steps=8, checkpoint_steps=1)


@pytest.mark.parametrize(("config", "steps"), [(OFFICIAL, 9), (ROWS, 8)], ids=["official", "rows"])
def test_training_lowers_the_loss_and_resumes_to_the_same_weights(
    tmp_path: Path, config: CfmSettings, steps: int
) -> None:
    cache = cache_of(5)
    whole, again = random_networks(RGB, XYZ), random_networks(RGB, XYZ)
    losses = train_cfm(range(5), cache, whole, tmp_path / "whole", config)
    assert len(losses) == steps
    assert losses[-1] < losses[0]
    assert not whole.training
    assert not any(p.requires_grad for p in whole.parameters())

    def stopping(steps: range, _description: str, _total: int) -> list[int]:
        return list(steps)[:4] if _description == "cfm" else list(steps)

    stopped = train_cfm(range(5), cache, random_networks(RGB, XYZ), tmp_path / "again", config, stopping)
    assert len(stopped) == 4
    assert train_cfm(range(5), cache, again, tmp_path / "again", config) == losses
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_another_runs_checkpoint_is_not_taken_up(tmp_path: Path) -> None:
    cache = cache_of(2)
    first = train_cfm(range(2), cache, random_networks(RGB, XYZ), tmp_path, ROWS)
    other = train_cfm(range(2), cache, random_networks(RGB, XYZ), tmp_path, replace(ROWS, seed=1))
    assert first != other


def test_a_loss_that_is_not_finite_stops_training(tmp_path: Path) -> None:
    cache = cache_of(1)
    networks = random_networks(RGB, XYZ)
    with torch.no_grad():
        networks.to_rgb.output.weight[0, 0] = torch.nan
    with pytest.raises(M3adError, match=r"the loss of cfm is nan at step 1, expected a finite one"):
        train_cfm(range(1), cache, networks, tmp_path, ROWS)
    with pytest.raises(ValueError, match="recipe must be official or rows, got 'fast'"):
        CfmSettings(recipe="fast")
