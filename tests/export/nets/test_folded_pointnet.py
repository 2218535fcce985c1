import pytest
import torch
from conftest import randomise
from m3ad_export.nets.configs import BnMode, XyzEncoderConfig
from m3ad_export.nets.folded_pointnet import FoldedPointNet, Moments, folded_encoder
from m3ad_export.nets.point_mae import MiniPointNet, PointMaeEncoder


def make_net(mode: BnMode) -> MiniPointNet:
    net = MiniPointNet(24, mode)
    randomise(net, 3)
    generator = torch.Generator().manual_seed(4)
    for sequence in (net.first_conv, net.second_conv):
        norm = sequence[1]
        norm.running_mean = torch.randn(norm.running_mean.shape, generator=generator)
        norm.running_var = torch.rand(norm.running_var.shape, generator=generator) + 0.1
    return net.eval()


@pytest.mark.parametrize("mode", ["sample", "running"])
def test_the_folded_form_equals_the_plain_one_in_float64(mode: BnMode) -> None:
    net = make_net(mode)
    generator = torch.Generator().manual_seed(0)
    # millimetre offsets that are not centred, as on a slope
    offsets = 1e-3 * torch.randn(64, 16, 3, generator=generator)
    offsets += 3e-4 * torch.randn(64, 1, 3, generator=generator)
    with torch.inference_mode():
        found = FoldedPointNet(net)(offsets)
        expected = net.double()(offsets.double())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_moments_are_those_of_the_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(8 * 5, 128, generator=generator, dtype=torch.float64).relu()
    g = torch.randn(8, 256, generator=generator, dtype=torch.float64) + 2
    local = torch.randn(512, 128, generator=generator, dtype=torch.float64)
    globl = torch.randn(512, 256, generator=generator, dtype=torch.float64)
    mean, var = Moments(local, globl)(a, g)
    rows = a @ local.T + (g @ globl.T).repeat_interleave(5, dim=0)
    torch.testing.assert_close(mean, rows.mean(dim=0))
    torch.testing.assert_close(var, rows.var(dim=0, unbiased=False))


def test_the_original_encoder_is_left_alone() -> None:
    config = XyzEncoderConfig(
        name="tiny", width=24, depth=2, heads=2, blocks=(0, 1), groups=64, group_size=16
    )
    encoder = PointMaeEncoder(config)
    names = list(encoder.state_dict())
    folded = folded_encoder(encoder)
    assert list(encoder.state_dict()) == names
    assert isinstance(encoder.encoder, MiniPointNet)
    x, centers = 1e-3 * torch.randn(64, 16, 3), torch.randn(64, 3)
    with torch.inference_mode():
        torch.testing.assert_close(folded(x, centers), encoder(x, centers), rtol=0, atol=2e-5)
