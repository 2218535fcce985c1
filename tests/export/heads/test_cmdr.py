import pytest
import torch
from m3ad_export.heads.cmdr import CmdrConfig, CmdrNetworks, Dec2d, Dec3d
from m3ad_export.heads.mappings import CrossMap
from named_weights import assert_golden, fill, given
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
    with pytest.raises(ValueError, match="expected heads that divide 384, got 7"):
        CmdrConfig(heads=7)
    with pytest.raises(ValueError, match="modality must be both or rgb or xyz, got 'depth'"):
        CmdrConfig(modality="depth")
