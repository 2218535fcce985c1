"""CMDR-IAD's training on the cached tokens of good frames: four networks, each alone, 1 - mean cos over scored rows."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from m3ad.frames import Sample
from m3ad.methods.cmdr_iad import WINDOW
from m3ad_runtime.windows import whole_grid
from torch import Tensor, nn

from m3ad_export.checkpoints import state_sha256
from m3ad_export.heads.cmdr import CmdrNetworks, Dec2d, Dec3d
from m3ad_export.heads.cmdr_rewrites import hidden_of_tokens, rectangle, rgb_rebuilt, rgb_taps, xyz_rebuilt
from m3ad_export.heads.map_head import ImageNorm, Smoothing, checked_choice
from m3ad_export.train.features import FeatureExtractor, FrameFeatures
from m3ad_export.train.optimise import SeededRun, batch_of, derived_seed, generator_of, one_minus_cosine
from m3ad_export.train.samples import Track
from m3ad_export.train.settings import require_ranges

Recipe = Literal["official", "rows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CmdrSettings:
    """How the networks are trained, one frame a step, and how their scores are fused.

    Args:
        recipe: `official` takes every scored row, and the RGB decoder's BatchNorm sees the whole grid: 750 GMAC forward
            a step. `rows` takes `rows` of them through the mappings and the RGB decoder's last layers, and that
            BatchNorm sees the part's bounding box. The XYZ decoder is trained the same in both.
        steps: of each network; 0 for `epochs` times through the frames.
        fusion_smoothing: as the authors' code, or as their figure; see `GatedReconstruction`.
        image_norm: `cfm` divides the image score as CFM's tables do.
    """

    recipe: Recipe = "rows"
    seed: int = 115
    lr: float = 1e-3
    epochs: int = 50
    steps: int = 0
    rows: int = 2048
    checkpoint_steps: int = 50
    fusion_smoothing: Smoothing = "code"
    image_norm: ImageNorm = "none"

    def __post_init__(self) -> None:
        require_ranges(self, may_be_zero=("seed", "steps"))
        checked_choice("recipe", self.recipe, Recipe)
        checked_choice("fusion_smoothing", self.fusion_smoothing, Smoothing)
        checked_choice("image_norm", self.image_norm, ImageNorm)


def train_cmdr(
    samples: Sequence[Sample],
    extract: FeatureExtractor,
    networks: CmdrNetworks,
    folder: Path,
    config: CmdrSettings,
    track: Track = lambda steps, _description, _total: steps,
) -> dict[str, list[float]]:
    """Train the networks in place on good frames; they are frozen afterwards.

    Args:
        samples: good frames.
        extract: gives their features.
        networks: untrained, those of one modality or all four.
        folder: of the checkpoints; a run that was interrupted goes on from them.
        config: training settings.
        track: shows progress.

    Returns:
        The loss of every step by network, named as in the authors' files.

    Raises:
        FrameError: a frame cannot be read.
        M3adError: a loss is not finite.
    """
    steps = config.steps or config.epochs * len(samples)
    keys = [extract.key(s) for s in samples]
    losses = {}
    for stage, network in networks.parts().items():
        settings = [asdict(config), keys, state_sha256(network)]
        run = SeededRun(
            folder, settings, seed=config.seed, checkpoint_steps=config.checkpoint_steps, track=track
        )
        loss_of = _LOSSES[stage]

        def backward(step: int, network: nn.Module = network, loss_of: _Loss = loss_of) -> float:
            frame = extract(samples[batch_of(step, len(samples), 1, config.seed)[0]])
            loss = loss_of(network, frame, config, step)
            loss.backward()  # type: ignore[no-untyped-call]
            return float(loss.detach())

        losses[stage] = run.optimise(stage, network, steps, config.lr, backward)
    networks.eval()
    return losses


_Loss = Callable[[nn.Module, FrameFeatures, CmdrSettings, int], Tensor]


def _picked(frame: FrameFeatures, config: CmdrSettings, step: int) -> Tensor:
    """Ascending rows of a step: all of them, or some drawn at random."""
    count = len(frame.scored_pixel)
    if config.recipe == "official" or count <= config.rows:
        return torch.arange(count)
    order = torch.randperm(count, generator=generator_of(config.seed, derived_seed(step), count))
    return order[: config.rows].sort().values


def _to_xyz(network: nn.Module, frame: FrameFeatures, config: CmdrSettings, step: int) -> Tensor:
    rgb, xyz = frame.rows(_picked(frame, config, step))
    return one_minus_cosine(network(rgb), xyz) / len(rgb)


def _to_rgb(network: nn.Module, frame: FrameFeatures, config: CmdrSettings, step: int) -> Tensor:
    rgb, xyz = frame.rows(_picked(frame, config, step))
    return one_minus_cosine(network(xyz), rgb) / len(rgb)


def _rgb_decoder(network: nn.Module, frame: FrameFeatures, config: CmdrSettings, step: int) -> Tensor:
    assert isinstance(network, Dec2d)
    picked = _picked(frame, config, step)
    pixel = frame.scored_pixel
    region = whole_grid(pixel, WINDOW) if config.recipe == "official" else rectangle(pixel)
    window_pixel, crop_row, places = map(torch.from_numpy, region)
    tokens = torch.from_numpy(frame.rgb_tokens)
    rebuilt = rgb_rebuilt(network, rgb_taps(len(tokens)), tokens, window_pixel, crop_row, places[picked])
    return one_minus_cosine(rebuilt, frame.rows(picked)[0]) / len(picked)


def _xyz_decoder(network: nn.Module, frame: FrameFeatures, config: CmdrSettings, step: int) -> Tensor:
    assert isinstance(network, Dec3d)
    pixel = torch.from_numpy(frame.scored_pixel)
    hidden = hidden_of_tokens(network, torch.from_numpy(frame.xyz_tokens), frame.xyz_operator)
    real = frame.rows(torch.arange(len(pixel)))[1]
    return one_minus_cosine(xyz_rebuilt(network, hidden, pixel), real) / len(pixel)


_LOSSES: dict[str, _Loss] = {
    "map2Dto3D": _to_xyz,
    "map3Dto2D": _to_rgb,
    "Dec2D": _rgb_decoder,
    "Dec3D": _xyz_decoder,
}
