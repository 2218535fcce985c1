"""Training of Shape-Guided's signed distances on patches of good parts: points beside a surface are pulled onto it.

References:
    Neural-Pull (Ma et al. 2021), Eq. 2; Shape-Guided's code for what is drawn (no licence: written anew)
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from m3ad_export.checkpoints import state_sha256
from m3ad_export.nets.configs import SdfConfig
from m3ad_export.nets.sdf import SdfNetwork, normalised
from m3ad_export.train.optimise import SeededRun, generator_of
from m3ad_export.train.samples import Track
from m3ad_export.train.settings import require_ranges

SPACING_NEIGHBOR = (
    50  # a point's distance to this neighbour in its patch is how far off the surface it is drawn
)
NEAR, NEAR_SHARE = 0.5, 0.625  # this share of the patches is drawn half as far off
LEAST_PATCHES = 11  # a part of the memory leaves out itself among eleven nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeGuidedSettings:
    """How the signed distances are learned and the bank is filled; the defaults are the published schedule.

    Args:
        patches: of 500 points that each frame is cut into, fixed for the bundle; 0 for 10 points of a patch to each
            point of the training frames' median, as published for each frame.
        frames: training frames that fill the bank, evenly spread; 0 for all.
        align_frames: of those, frames that put the range of the RGB scores onto that of the distances.
        epochs: times through the patches of the training frames.
        steps: for a shorter training; 0 for `epochs`.
        batch: patches a step; a batch that is not full is left out.
    """

    seed: int = 0
    patches: int = 0
    frames: int = 0
    align_frames: int = 25
    lr: float = 1e-4
    epochs: int = 1000
    steps: int = 0
    batch: int = 32
    checkpoint_steps: int = 500

    def __post_init__(self) -> None:
        require_ranges(self, may_be_zero=("seed", "patches", "frames", "steps"))
        if self.patches and not LEAST_PATCHES <= self.patches <= 1024:
            raise ValueError(f"patches must be 0 or lie in {LEAST_PATCHES}..1024, got {self.patches}")
        if self.batch < 2:
            raise ValueError(f"batch must be at least 2, whose statistics the norms take, got {self.batch}")


def train_distances(
    network: SdfNetwork,
    patches: Tensor,
    keys: list[str],
    folder: Path,
    config: ShapeGuidedSettings,
    track: Track = lambda steps, _description, _total: steps,
) -> list[float]:
    """Train the networks in place; they are frozen afterwards.

        loss = mean |p - (q - sdf(q) grad / |grad|)|,  q = p + k s n,  n ~ N(0, 1), k 1/2 or 1

    s is a point's distance to its 50th neighbour in the patch. Points and what is pulled are paired by their order.

    Args:
        network: untrained.
        patches: normalised, [P, S, 3], at least 2.
        keys: of the frames that they are of.
        folder: of the checkpoints; a run that was interrupted goes on from them.
        config: training settings.
        track: shows progress.

    Returns:
        The loss of every step.

    Raises:
        M3adError: a loss is not finite.
    """
    batch = min(config.batch, len(patches))
    an_epoch = len(patches) // batch
    settings = [asdict(config), keys, list(patches.shape), state_sha256(network)]
    run = SeededRun(folder, settings, seed=config.seed, checkpoint_steps=config.checkpoint_steps, track=track)

    def backward(step: int) -> float:
        epoch, part = divmod(step, an_epoch)
        order = torch.randperm(len(patches), generator=generator_of(config.seed, epoch))
        surface = patches[order[part * batch : (part + 1) * batch]]
        loss = pull_loss(network, surface, beside(surface))
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    return run.optimise("sdf", network, config.steps or config.epochs * an_epoch, config.lr, backward)


def beside(surface: Tensor) -> Tensor:
    """A point drawn near each point of patches: [n, S, 3] -> [n, S, 3]."""
    nearest = min(SPACING_NEIGHBOR, surface.shape[1] - 1) + 1  # a point is its own nearest
    spacing = torch.cdist(surface, surface).kthvalue(nearest, dim=2, keepdim=True).values
    factor = torch.where(torch.rand(len(surface), 1, 1) < NEAR_SHARE, NEAR, 1.0)
    return surface + factor * spacing * torch.randn(surface.shape)


def pull_loss(network: SdfNetwork, surface: Tensor, queries: Tensor) -> Tensor:
    """mean |p - pulled q|: patches [n, S, 3] and queries [n, S, 3] -> []."""
    return (surface - network.pulled(surface, queries)).norm(dim=2).mean()


def new_network(config: SdfConfig, seed: int) -> SdfNetwork:
    """The networks with first weights under a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SdfNetwork(config)


def patches_for_training(neighborhoods: list[Tensor]) -> Tensor:
    """The first half of each frame's patches, which farthest point sampling spread over it, normalised: [P, S, 3]."""
    return torch.cat([normalised(each[: -(-len(each) // 2)]) for each in neighborhoods])
