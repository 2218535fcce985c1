from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from m3ad.errors import ArtifactError
from m3ad_export.heads.cmdr import CmdrConfig, CmdrNetworks
from m3ad_export.heads.map_head import GatedReconstruction
from m3ad_export.heads.voting import cosine_scores
from m3ad_export.methods.cmdr_iad import CmdrVote, load_official
from named_weights import fill, given
from token_frames import all_rows, disc, frame_of

SMALL = CmdrConfig(rgb_width=32, xyz_width=24, heads=2, rgb_convs=(12, 8), xyz_convs=(16, 12, 10, 8))

# --- vote


def test_the_vote_scores_each_pair() -> None:
    frame = frame_of(disc(40), groups=16, rgb_width=32, xyz_width=24)
    rgb, xyz = all_rows(frame)
    pixel = torch.from_numpy(frame.scored_pixel)
    made = [rgb + 0.3 * given(1, *rgb.shape), xyz + 0.3 * given(2, *xyz.shape)]
    made += [rgb + 0.3 * given(3, *rgb.shape), xyz + 0.3 * given(4, *xyz.shape)]
    real = [rgb, xyz, rgb, xyz]
    anomaly_map, score, maps = CmdrVote()(rgb, made[0], xyz, made[1], made[2], made[3], pixel)
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
