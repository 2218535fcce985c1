import pytest
import torch
from conftest import TINY_XYZ, randomise
from m3ad_export.nets.configs import BnMode, XyzEncoderConfig
from m3ad_export.nets.point_mae import MiniPointNet, PointMaeEncoder
from test_vit import torch_layer
from torch import Tensor, nn


def published_mini_pointnet(network: MiniPointNet) -> tuple[nn.Sequential, nn.Sequential]:
    """The two halves as Point-MAE builds them: Conv1d, BatchNorm1d, ReLU, Conv1d."""
    halves = []
    for ours, widths in (
        (network.first_conv, (3, 128, 256)),
        (network.second_conv, (512, 512, network.second_conv[3].weight.shape[0])),
    ):
        theirs = nn.Sequential(
            nn.Conv1d(widths[0], widths[1], 1),
            nn.BatchNorm1d(widths[1]),
            nn.ReLU(),
            nn.Conv1d(widths[1], widths[2], 1),
        )
        theirs.load_state_dict(ours.state_dict())
        halves.append(theirs)
    return halves[0], halves[1]


def dense(first: nn.Sequential, second: nn.Sequential, neighborhood: Tensor) -> Tensor:
    """The published forward: the group's maximum repeated beside every point."""
    local = first(neighborhood.transpose(1, 2))  # [G, 256, S]
    globl = local.max(dim=2, keepdim=True).values.expand_as(local)
    return second(torch.cat([globl, local], dim=1)).max(dim=2).values


@pytest.mark.parametrize("bn_mode", ["sample", "running"])
@pytest.mark.parametrize("scale_m", [1e-3, 1.0])
def test_mini_pointnet_equals_the_published_form(bn_mode: BnMode, scale_m: float) -> None:
    network = MiniPointNet(48, bn_mode)
    randomise(network, 0)
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(generator=torch.Generator().manual_seed(2))
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(3))
    neighborhood = scale_m * torch.randn(64, 16, 3, generator=torch.Generator().manual_seed(1))
    halves = published_mini_pointnet(network)
    for half in halves:
        half.double().train(bn_mode == "sample")
    with torch.inference_mode():
        expected = dense(*halves, neighborhood.double()).float()
        found = network(neighborhood)
        assert torch.equal(network(neighborhood), found)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_the_order_of_neighbours_does_not_matter() -> None:
    network = MiniPointNet(48, "sample")
    randomise(network, 0)
    neighborhood = torch.randn(8, 16, 3, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(network(neighborhood[:, torch.randperm(16)]), network(neighborhood))


def test_tokens_are_chosen_blocks_through_one_norm_with_the_position_added_before_each() -> None:
    network = PointMaeEncoder(TINY_XYZ)
    randomise(network, 0)
    generator = torch.Generator().manual_seed(1)
    neighborhood, centers = (
        1e-3 * torch.randn(64, 16, 3, generator=generator),
        torch.randn(64, 3, generator=generator),
    )
    with torch.inference_mode():
        x = network.encoder(neighborhood)[None]
        position = network.pos_embed(centers)[None]
        expected = []
        for block in network.blocks.blocks:
            x = torch_layer(block, 1e-5)(x + position)
            expected.append(network.norm(x)[0])
        tokens = network(neighborhood, centers)
    torch.testing.assert_close(tokens, torch.cat(expected, dim=1), rtol=1e-3, atol=1e-3)


def test_published_sizes() -> None:
    network = PointMaeEncoder(XyzEncoderConfig())
    assert sum(p.numel() for p in network.parameters()) == 21_825_024
    assert len(network.state_dict()) == 156
    assert network.config.token_width == 1152


def test_an_unknown_bn_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="bn_mode must be sample or running, got 'batch'"):
        XyzEncoderConfig(bn_mode="batch")  # type: ignore[arg-type]
