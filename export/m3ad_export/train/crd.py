"""CRD's training on images of good frames: each student alone, then the scale of its maps on frames it never saw."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from m3ad.frames import Sample
from torch import Tensor

from m3ad_export.checkpoints import state_sha256
from m3ad_export.heads.crd import Levels, Rebuilt, StandardisedSum, Student, raw_map
from m3ad_export.nets.wide_resnet import WideResNet
from m3ad_export.train.features import FeatureExtractor, FrameFeatures
from m3ad_export.train.optimise import SeededRun, batch_of
from m3ad_export.train.samples import Track
from m3ad_export.train.settings import require_ranges

BETAS = (0.5, 0.999)
LR_DECAY = 0.95  # an epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class CrdSettings:
    """How the students are trained; the defaults are the published schedule, which wants a GPU's speed.

    Args:
        steps: of each student, for a shorter training; 0 for `epochs` times through the frames.
        batch: frames a step; the last step of an epoch takes those that are left.
    """

    seed: int = 42
    lr: float = 5e-3
    epochs: int = 200
    steps: int = 0
    batch: int = 16
    checkpoint_steps: int = 50

    def __post_init__(self) -> None:
        require_ranges(self, may_be_zero=("seed", "steps"))


def train_students(
    samples: Sequence[Sample],
    extract: FeatureExtractor,
    teacher: WideResNet,
    students: dict[str, Student],
    folder: Path,
    config: CrdSettings,
    track: Track = lambda steps, _description, _total: steps,
) -> dict[str, list[float]]:
    """Train both students in place on good frames; they are frozen afterwards.

    Args:
        samples: good frames.
        extract: gives their images.
        teacher: frozen.
        students: untrained, the RGB one first.
        folder: of the checkpoints; a run that was interrupted goes on from them.
        config: training settings.
        track: shows progress.

    Returns:
        The loss of every step by student.

    Raises:
        FrameError: a frame cannot be read.
        M3adError: a loss is not finite.
    """
    an_epoch = math.ceil(len(samples) / config.batch)
    steps = config.steps or config.epochs * an_epoch
    keys = [extract.key(s) for s in samples]
    losses = {}
    for own, (stage, student) in enumerate(students.items()):
        settings = [asdict(config), keys, state_sha256(teacher), state_sha256(student)]
        run = SeededRun(
            folder, settings, seed=config.seed, checkpoint_steps=config.checkpoint_steps, track=track
        )

        def backward(step: int, student: Student = student, own: int = own) -> float:
            picked = batch_of(step, len(samples), config.batch, config.seed)
            x, y = levels_of(teacher, [extract(samples[i]) for i in picked], own)
            loss = rebuild_loss(x, student.rebuild(x, y))
            loss.backward()  # type: ignore[no-untyped-call]
            return float(loss.detach())

        def rate(step: int) -> float:
            return config.lr * LR_DECAY ** (step // an_epoch)

        losses[stage] = run.optimise(stage, student, steps, rate, backward, BETAS)
    return losses


@torch.no_grad()
def levels_of(teacher: WideResNet, frames: Sequence[FrameFeatures], own: int) -> tuple[Levels, Levels]:
    """A batch's levels of image `own` (0: RGB, 1: the cloud's), and of the other."""
    images = [frame.images for frame in frames]
    both = [torch.stack([torch.from_numpy(i[k]) for i in images if i is not None]) for k in (own, 1 - own)]
    return teacher(both[0]), teacher(both[1])


def rebuild_loss(x: Levels, made: Rebuilt) -> Tensor:
    """sum over levels and over all that a student makes of mean_n (1 - cos) of whole maps: -> []."""
    return torch.stack(
        [
            (1 - F.cosine_similarity(real.flatten(1), rebuilt.flatten(1), dim=1)).mean()
            for levels in made
            for real, rebuilt in zip(x, levels, strict=True)
        ]
    ).sum()


@torch.inference_mode()
def standardised(
    samples: Sequence[Sample],
    extract: FeatureExtractor,
    teacher: WideResNet,
    students: dict[str, Student],
    track: Track,
) -> StandardisedSum:
    """The vote with mean and population std of each modality's unsmoothed map, all pixels of all samples pooled."""
    maps: list[list[Tensor]] = [[], []]
    for sample in track(samples, "scale of the maps", len(samples)):
        frame = extract(sample)
        for own, student in enumerate(students.values()):
            x, y = levels_of(teacher, [frame], own)
            maps[own].append(raw_map(x, student(*x, *y)))
    vote = StandardisedSum()
    pooled = torch.stack([torch.cat(each).double().flatten() for each in maps])
    vote.mean, vote.std = pooled.mean(dim=1).float(), pooled.std(dim=1, correction=0).float()
    return vote.eval()
