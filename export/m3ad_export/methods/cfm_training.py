"""CFM's training on the cached tokens of good frames: (1 - mean cos) of both mappings, one Adam over both."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from m3ad.frames import Sample
from torch import Tensor

from m3ad_export.checkpoints import state_sha256
from m3ad_export.methods.map_head import checked_choice
from m3ad_export.methods.mappings import Mappings
from m3ad_export.methods.optimise import SeededRun, batch_of, generator_of, one_minus_cosine
from m3ad_export.train.features import FeatureExtractor
from m3ad_export.train.fit import TrainConfig, draw_pool
from m3ad_export.train.fit_vote import Track

Recipe = Literal["official", "rows"]
Pairs = Iterable[tuple[Tensor, Tensor]]  # rgb_features [r, D], xyz_features [r, D']


@dataclass(frozen=True, slots=True, kw_only=True)
class CfmTrainConfig:
    """How both mappings are trained.

    Args:
        recipe: `official` takes all scored rows of `batch` frames a step, `epochs` times through the frames; `rows`
            takes `rows` of a pool of `pool_rows` that is drawn once, `steps` times, which needs no GPU.
        epochs: 50 in the authors' script, 250 in their published weights.
    """

    recipe: Recipe = "official"
    seed: int = 115
    lr: float = 1e-3
    epochs: int = 50
    batch: int = 4
    pool_rows: int = 65536
    rows: int = 512
    steps: int = 250
    checkpoint_steps: int = 50

    def __post_init__(self) -> None:
        checked_choice("recipe", self.recipe, Recipe)


def train_cfm(
    samples: Sequence[Sample],
    extract: FeatureExtractor,
    networks: Mappings,
    folder: Path,
    config: CfmTrainConfig,
    track: Track = lambda steps, _description, _total: steps,
) -> list[float]:
    """Train both mappings in place on good frames; they are frozen afterwards.

    Args:
        samples: good frames.
        extract: gives their features.
        networks: untrained.
        folder: of the checkpoint; a run that was interrupted goes on from it.
        config: training settings.
        track: shows progress.

    Returns:
        The loss of every step, the sum of both directions.

    Raises:
        FrameError: a frame cannot be read.
        M3adError: a loss is not finite.
    """
    settings = [asdict(config), [extract.key(s) for s in samples], state_sha256(networks)]
    run = SeededRun(folder, settings, seed=config.seed, checkpoint_steps=config.checkpoint_steps, track=track)
    if config.recipe == "rows":
        pool_config = TrainConfig(seed=config.seed, pool_rows=config.pool_rows)
        rgb, xyz = draw_pool(samples, extract, pool_config, track)

        def backward(step: int) -> float:
            generator = generator_of(config.seed, step)
            picked = torch.randint(len(rgb), (config.rows,), generator=generator)
            return backward_both(networks, [(rgb[picked], xyz[picked])], config.rows)

        steps = config.steps
    else:

        def backward(step: int) -> float:
            frames = [extract(samples[i]) for i in batch_of(step, len(samples), config.batch, config.seed)]
            chunks = (
                (chunk["rgb_features"], chunk["xyz_features"]) for frame in frames for chunk in frame.chunks()
            )
            return backward_both(networks, chunks, sum(len(frame.scored_pixel) for frame in frames))

        steps = config.epochs * -(-len(samples) // config.batch)
    return run.optimise("cfm", networks, steps, config.lr, backward)


def backward_both(networks: Mappings, pairs: Pairs, rows: int) -> float:
    """Gradients of (1 - mean cos) of both directions, added up chunk by chunk: the mean runs over all `rows`."""
    total = 0.0
    for rgb, xyz in pairs:
        rgb_again, xyz_again = networks(rgb, xyz)
        loss = (one_minus_cosine(rgb_again, rgb) + one_minus_cosine(xyz_again, xyz)) / rows
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return total
