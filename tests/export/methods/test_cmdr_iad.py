from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from frames import all_rows, disc, frame_of
from golden import assert_golden, fill, given
from m3ad.errors import ArtifactError
from m3ad_export.heads.voting import cosine_scores
from m3ad_export.methods.cmdr_iad import CmdrConfig, CmdrNetworks, CmdrVote, Dec2d, Dec3d, load_official
from m3ad_export.methods.map_head import GatedReconstruction
from m3ad_export.methods.mappings import CrossMap
from torch import nn

SMALL = CmdrConfig(rgb_width=32, xyz_width=24, heads=2, rgb_convs=(12, 8), xyz_convs=(16, 12, 10, 8))


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_sizes_are_the_published_ones() -> None:
    with torch.device("meta"):
        networks = CmdrNetworks(CmdrConfig())
    parts = networks.parts()
    assert {name: parameters(net) for name, net in parts.items()} == {
        "map2Dto3D": 3_694_272,
        "map3Dto2D": 3_693_888,
        "Dec2D": 5_026_176,
        "Dec3D": 87_840_208,
    }
    assert [len(net.state_dict()) for net in parts.values()] == [12, 12, 47, 42]
    assert round(parameters(networks) / 1e6, 1) == 100.3


def test_keys_are_those_of_the_authors_files() -> None:
    with torch.device("meta"):
        states = {name: net.state_dict() for name, net in CmdrNetworks(CmdrConfig()).parts().items()}
    for name, key, shape in (
        ("map2Dto3D", "input.weight", (960, 768)),
        ("map2Dto3D", "projection.4.weight", (960, 960)),
        ("map3Dto2D", "projection.6.bias", (960,)),
        ("map3Dto2D", "output.weight", (768, 960)),
        ("Dec2D", "projection.0.weight", (384, 768)),
        ("Dec2D", "attn.norm1.weight", (384,)),
        ("Dec2D", "attn.attn.qkv.bias", (1152,)),
        ("Dec2D", "attn.attn.proj.weight", (384, 384)),
        ("Dec2D", "attn.mlp.3.weight", (384, 768)),
        ("Dec2D", "conv_decoder.0.weight", (384, 256, 3, 3)),
        ("Dec2D", "conv_decoder.4.running_var", (128,)),
        ("Dec2D", "conv_decoder.6.bias", (384,)),
        ("Dec2D", "reconstruct.0.weight", (1536, 384)),
        ("Dec2D", "reconstruct.4.weight", (768,)),
        ("Dec3D", "projection.0.weight", (1568, 50176)),
        ("Dec3D", "decoder.0.weight", (1152, 768, 4)),
        ("Dec3D", "decoder.10.num_batches_tracked", ()),
        ("Dec3D", "decoder.12.bias", (1152,)),
        ("Dec3D", "attention.1.weight", (144, 1152, 1)),
        ("Dec3D", "attention.3.bias", (1152,)),
    ):
        assert tuple(states[name][key].shape) == shape


@pytest.mark.parametrize(
    ("widths", "seed", "figures"),
    [
        ((768, 1152), 1, (0.011243, 1.045809, (-1.879464, 1.251114, -1.176600))),
        ((1152, 768), 2, (-0.003825, 1.047072, (0.730423, -0.218997, 0.011755))),
    ],
)
def test_golden_maps(
    widths: tuple[int, int], seed: int, figures: tuple[float, float, tuple[float, ...]]
) -> None:
    assert_golden(fill(CrossMap(*widths))(given(seed, 64, widths[0])), *figures)


@pytest.mark.slow
def test_golden_rgb_decoder() -> None:
    out = fill(Dec2d(CmdrConfig()))(given(3, 1, 50176, 768))
    assert_golden(out, -0.009430, 1.050845, (0.414777, 1.634323, -0.881305))


@pytest.mark.slow
def test_golden_xyz_decoder() -> None:
    out = fill(Dec3d(CmdrConfig()))(given(4, 1, 50176, 1152))
    assert_golden(out, -0.001443, 0.057268, (-0.018412, -0.005431, -0.003751))


def test_a_window_sees_nothing_of_the_next() -> None:
    decoder = fill(Dec2d(SMALL))
    hidden = given(1, 3, 128, 16)
    before = decoder.windows(hidden)
    hidden[1] += 1
    changed = (decoder.windows(hidden) != before).flatten(1).any(dim=1)
    assert changed.tolist() == [False, True, False]


def test_a_config_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(
        ValueError, match="a window that divides 50176 and heads that divide 384, got 100 and 8"
    ):
        CmdrConfig(window=100)
    with pytest.raises(ValueError, match="modality must be both or rgb or xyz, got 'depth'"):
        CmdrConfig(modality="depth")


# --- vote


def test_the_vote_scores_each_pair() -> None:
    frame = frame_of(disc(40), groups=16, rgb_width=32, xyz_width=24)
    rgb, xyz = all_rows(frame)
    pixel = torch.from_numpy(frame.scored_pixel)
    made = [rgb + 0.3 * given(1, *rgb.shape), xyz + 0.3 * given(2, *xyz.shape)]
    made += [rgb + 0.3 * given(3, *rgb.shape), xyz + 0.3 * given(4, *xyz.shape)]
    real = [rgb, xyz, rgb, xyz]
    anomaly_map, score, maps = CmdrVote()(*(t for pair in zip(real, made, strict=True) for t in pair), pixel)
    assert (anomaly_map.shape, score.shape, maps.shape) == ((224, 224), (1,), (6, 224, 224))
    for k, (a, b) in enumerate(zip(real, made, strict=True)):
        if k == 2:
            continue  # smoothed
        chord = (F.normalize(a, dim=1) - F.normalize(b, dim=1)).norm(dim=1)
        torch.testing.assert_close(maps[k].flatten()[pixel.long()], chord, atol=1e-6, rtol=0)
    one = CmdrVote("xyz")(xyz, made[3], pixel)
    expected = GatedReconstruction("xyz")(cosine_scores((xyz, made[3])), pixel)
    torch.testing.assert_close(one[0], expected[0], atol=0, rtol=0)


# --- files


def write_files(folder: Path, networks: CmdrNetworks) -> None:
    (folder / "rope").mkdir()
    for name, network in networks.parts().items():
        torch.save(network.state_dict(), folder / "rope" / f"{name}_rope_independent_50ep_1bs.pth")


def test_official_files_load(tmp_path: Path) -> None:
    networks = CmdrNetworks(SMALL)
    for network in networks.parts().values():
        fill(network)
    write_files(tmp_path, networks)
    loaded, infos = load_official(tmp_path, "rope", SMALL)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, networks.state_dict()[name], atol=0, rtol=0)
    assert list(infos) == ["map2Dto3D", "map3Dto2D", "Dec2D", "Dec3D"]
    assert infos["Dec2D"].name == "Dec2D_rope_independent_50ep_1bs.pth"
    assert infos["Dec2D"].licence.startswith("none")


@pytest.mark.parametrize(("modality", "file"), [("rgb", "Dec2D"), ("xyz", "Dec3D")])
def test_one_modality_asks_for_its_decoder_only(tmp_path: Path, modality: str, file: str) -> None:
    config = CmdrConfig(
        rgb_width=32, xyz_width=24, heads=2, rgb_convs=(12, 8), xyz_convs=(16, 12, 10, 8), modality=modality
    )
    write_files(tmp_path, CmdrNetworks(config))
    assert list(load_official(tmp_path, "rope", config)[1]) == [file]


def test_files_that_are_not_cmdrs_are_refused(tmp_path: Path) -> None:
    write_files(tmp_path, CmdrNetworks(SMALL))
    path = tmp_path / "rope" / "Dec2D_rope_independent_50ep_1bs.pth"
    state = torch.load(path)
    kept = state.pop("attn.attn.qkv.bias")
    torch.save(state, path)
    with pytest.raises(ArtifactError, match=r"Dec2d with 47 tensors: it lacks 1 \(attn\.attn\.qkv\.bias\)"):
        load_official(tmp_path, "rope", SMALL)
    torch.save({**state, "attn.attn.qkv.bias": kept, "attn.attn.relative": kept}, path)
    with pytest.raises(ArtifactError, match=r"has unknown 1 \(attn\.attn\.relative\)"):
        load_official(tmp_path, "rope", SMALL)
    torch.save({**state, "attn.attn.qkv.bias": kept[:-1]}, path)
    with pytest.raises(
        ArtifactError, match=r"wrong shapes 1 \(attn\.attn\.qkv\.bias \[47\] instead of \[48\]"
    ):
        load_official(tmp_path, "rope", SMALL)
    path.unlink()
    with pytest.raises(ArtifactError, match=r"holds 0 files Dec2D_rope_independent_\*\.pth, expected one"):
        load_official(tmp_path, "rope", SMALL)
