from dataclasses import replace
from pathlib import Path

import pytest
import torch
from m3ad.methods.cmdr_iad import WINDOW
from m3ad_export.dense.torch_ops import upsampled
from m3ad_export.heads.cmdr import CmdrConfig, Dec2d
from m3ad_export.heads.cmdr_rewrites import rgb_rebuilt, rgb_taps
from m3ad_export.methods.cmdr_iad import random_networks
from m3ad_export.train.cmdr import CmdrSettings, train_cmdr
from m3ad_export.train.optimise import batch_of, one_minus_cosine
from m3ad_runtime.windows import whole_grid
from token_frames import Cache, all_rows, disc, frame_of
from torch import nn

SMALL = CmdrConfig(rgb_width=32, xyz_width=24, heads=2, rgb_convs=(12, 8), xyz_convs=(16, 12, 10, 8))
ROWS = CmdrSettings(recipe="rows", rows=200, steps=6, checkpoint_steps=1)


def cache_of(count: int) -> Cache:
    radii = (14, 12, 13)
    return Cache(
        [frame_of(disc(radii[i]), groups=16, rgb_width=32, xyz_width=24, seed=0) for i in range(count)]
    )


@pytest.mark.parametrize("recipe", ["official", "rows"])
def test_the_rgb_decoder_alone_resumes_to_the_same_weights(tmp_path: Path, recipe: str) -> None:
    cache, config = cache_of(2), replace(ROWS, recipe=recipe)
    whole_run, again = (random_networks(replace(SMALL, modality="rgb")) for _ in range(2))
    losses = train_cmdr(range(2), cache, whole_run, tmp_path / "whole", config)
    assert list(losses) == ["Dec2D"]
    assert len(losses["Dec2D"]) == 6
    assert losses["Dec2D"][-1] < losses["Dec2D"][0]
    assert not any(p.requires_grad for p in whole_run.parameters())

    stopped = random_networks(replace(SMALL, modality="rgb"))
    train_cmdr(range(2), cache, stopped, tmp_path / "again", config, lambda steps, _d, _t: list(steps)[:3])
    assert train_cmdr(range(2), cache, again, tmp_path / "again", config) == losses
    for (name, a), b in zip(whole_run.state_dict().items(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.slow
def test_all_four_networks_train_each_on_its_own(tmp_path: Path) -> None:
    config = replace(ROWS, steps=4, checkpoint_steps=4)
    networks = random_networks(SMALL)
    before = {name: net.state_dict() for name, net in random_networks(SMALL).parts().items()}
    losses = train_cmdr(range(2), cache_of(2), networks, tmp_path, config)
    assert list(losses) == ["map2Dto3D", "map3Dto2D", "Dec2D", "Dec3D"]
    for name, network in networks.parts().items():
        assert losses[name][-1] < losses[name][0]
        assert not network.training
        assert any((t != before[name][key]).any() for key, t in network.state_dict().items())


def test_steps_default_to_the_epochs_and_every_epoch_takes_each_frame(tmp_path: Path) -> None:
    config = CmdrSettings(recipe="rows", rows=50, epochs=3)
    losses = train_cmdr(
        range(2), cache_of(2), random_networks(replace(SMALL, modality="rgb")), tmp_path, config
    )
    assert len(losses["Dec2D"]) == 6
    for epoch in range(4):
        assert sorted(batch_of(5 * epoch + i, 5, 1, seed=115)[0] for i in range(5)) == list(range(5))
    assert [len(batch_of(i, 5, 2, seed=115)) for i in range(6)] == [2, 2, 1, 2, 2, 1]


def test_the_official_step_of_the_rgb_decoder_is_the_dense_one() -> None:
    """Same loss, gradients and BatchNorm statistics as the module on every pixel; dropout off."""
    frame = cache_of(1).frames[0]
    pixel, tokens = torch.from_numpy(frame.scored_pixel), torch.from_numpy(frame.rgb_tokens)
    real = all_rows(frame)[0]
    found = []
    for form in ("dense", "ours"):
        decoder = random_networks(SMALL).rgb_decoder
        assert isinstance(decoder, Dec2d)
        for module in decoder.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if form == "dense":
            rows = decoder(upsampled(tokens, 8)[None])[0][pixel.long()]
        else:
            region = map(torch.from_numpy, whole_grid(frame.scored_pixel, WINDOW))
            rows = rgb_rebuilt(decoder, rgb_taps(64), tokens, *region)
        loss = one_minus_cosine(rows, real) / len(real)
        loss.backward()
        found.append((loss.detach(), [p.grad for p in decoder.parameters()], list(decoder.buffers())))
    (loss, grads, statistics), (loss_again, grads_again, statistics_again) = found
    torch.testing.assert_close(loss_again, loss, atol=1e-6, rtol=0)
    for a, b in zip(grads_again, grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)
    for a, b in zip(statistics_again, statistics, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_an_unknown_recipe_is_refused() -> None:
    with pytest.raises(ValueError, match="recipe must be official or rows, got 'fast'"):
        CmdrSettings(recipe="fast")
