"""AST's training on grids of good frames: the flow by likelihood, then the student towards the flow's latents."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path

import numpy as np
import torch
from m3ad.frames import Sample
from torch import Tensor

from m3ad_export.checkpoints import state_sha256
from m3ad_export.heads.ast import STUDENT_HIDDEN, Student, Teacher
from m3ad_export.train.features import FeatureExtractor, FrameFeatures
from m3ad_export.train.optimise import SeededRun, batch_of
from m3ad_export.train.samples import Track
from m3ad_export.train.settings import require_ranges


@dataclass(frozen=True, slots=True, kw_only=True)
class AstSettings:
    """How both networks are trained; the defaults are the published schedule, which wants a GPU's speed.

    Args:
        epochs: of each network, published as 3 times 24.
        steps: of each network, for a shorter training; 0 for `epochs` times through the frames.
        batch: frames a step; those that are left at the end of an epoch are dropped, as published.
        student_width: channels inside the student.
    """

    seed: int = 0
    lr: float = 2e-4
    weight_decay: float = 1e-5
    epochs: int = 72
    steps: int = 0
    batch: int = 8
    student_width: int = STUDENT_HIDDEN
    checkpoint_steps: int = 50

    def __post_init__(self) -> None:
        require_ranges(self, may_be_zero=("seed", "steps"))


def train_pair(
    samples: Sequence[Sample],
    extract: FeatureExtractor,
    teacher: Teacher,
    student: Student,
    folder: Path,
    config: AstSettings,
    track: Track = lambda steps, _description, _total: steps,
) -> dict[str, list[float]]:
    """Train the teacher, then the student, in place on good frames; both are frozen afterwards.

    Args:
        samples: good frames.
        extract: gives their grids; each frame is encoded once, as its encoder stays in eval mode.
        teacher: untrained.
        student: untrained.
        folder: of the checkpoints; a run that was interrupted goes on from them.
        config: training settings.
        track: shows progress.

    Returns:
        The loss of every step by network.

    Raises:
        FrameError: a frame cannot be read.
        M3adError: a loss is not finite.
    """
    size = min(config.batch, len(samples))  # fewer frames than a batch are one
    an_epoch = len(samples) // size
    steps = config.steps or config.epochs * an_epoch
    keys = [extract.key(s) for s in samples]

    def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
        epoch, part = divmod(step, an_epoch)
        picked = batch_of(epoch * ceil(len(samples) / size) + part, len(samples), size, config.seed)
        return grids_of([extract(samples[i]) for i in picked])

    def run(*networks: Teacher | Student) -> SeededRun:
        settings = [asdict(config), keys, *map(state_sha256, networks)]
        return SeededRun(
            folder, settings, seed=config.seed, checkpoint_steps=config.checkpoint_steps, track=track
        )

    def teacher_step(step: int) -> float:
        features, depth, mask = batch(step)
        z, log_det = teacher(features, depth)
        loss = likelihood_loss(z, log_det, mask)
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def student_step(step: int) -> float:
        features, depth, mask = batch(step)
        with torch.no_grad():
            target, _ = teacher(features, depth)
        loss = latent_loss(target, student(features, depth), mask)
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    decay = config.weight_decay
    losses = {
        "teacher": run(teacher).optimise(
            "teacher", teacher, steps, config.lr, teacher_step, weight_decay=decay
        )
    }
    losses["student"] = run(teacher, student).optimise(
        "student", student, steps, config.lr, student_step, weight_decay=decay
    )
    return losses


def grids_of(frames: Sequence[FrameFeatures]) -> tuple[Tensor, Tensor, Tensor]:
    """A batch: features [n, C, 24, 24], depth [n, 1, 192, 192], depth_mask [n, 1, 24, 24]."""
    grids = [frame.grids for frame in frames if frame.grids is not None]
    features, depth, mask = (torch.from_numpy(np.concatenate(each)) for each in zip(*grids, strict=True))
    return features, depth, mask


def likelihood_loss(z: Tensor, log_det: Tensor, mask: Tensor) -> Tensor:
    """mean over pixels of (1/2 sum_c m z^2 - m log det), z [n, C, 24, 24], log det [n, 24, 24] -> []."""
    return (0.5 * (mask * z.square()).sum(dim=1) - mask[:, 0] * log_det).mean()


def latent_loss(teacher: Tensor, student: Tensor, mask: Tensor) -> Tensor:
    """mean of m (z_t - z_s)^2 -> []."""
    return (mask * (teacher - student).square()).mean()
