"""Seeded Adam over the frames of a cache; a run that was interrupted goes on and ends with the identical result.

What a step draws (frames, rows, dropout) depends on the seed and the step's number alone, so that no generator's state
has to be kept.
"""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from m3ad.errors import M3adError
from torch import Tensor, nn

from m3ad_export.checkpoints import read_checkpoint, save_checkpoint
from m3ad_export.train.samples import Track

COSINE_EPS = 1e-6  # of both official losses


def derived_seed(*parts: int) -> int:
    """One 32-bit seed of several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def generator_of(*parts: int) -> torch.Generator:
    """A generator under the derived seed."""
    return torch.Generator().manual_seed(derived_seed(*parts))


def batch_of(step: int, frames: int, size: int, seed: int) -> list[int]:
    """The frames of a step: every epoch takes each frame once, in an order of its own."""
    epoch, part = divmod(step, math.ceil(frames / size))
    order = torch.randperm(frames, generator=generator_of(seed, epoch)).tolist()
    return order[part * size : (part + 1) * size]


def one_minus_cosine(rebuilt: Tensor, real: Tensor) -> Tensor:
    """Sum over the rows of 1 - cos: [R, D], [R, D] -> []."""
    return (1 - F.cosine_similarity(rebuilt, real, dim=1, eps=COSINE_EPS)).sum()


class SeededRun:
    """Optimises networks, leaving checkpoints that only the same run picks up again.

    Args:
        folder: of the checkpoints; made when missing.
        settings: what decides the run besides the networks' first weights: configuration, frames. JSON.
        seed: of dropout, with the step's number.
        checkpoint_steps: steps between checkpoints.
        track: shows progress.
    """

    def __init__(
        self, folder: Path, settings: list[Any], *, seed: int, checkpoint_steps: int, track: Track
    ) -> None:
        self.folder, self.seed, self.checkpoint_steps, self.track = folder, seed, checkpoint_steps, track
        self.identity = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
        folder.mkdir(parents=True, exist_ok=True)

    def optimise(
        self,
        stage: str,
        network: nn.Module,
        steps: int,
        lr: float | Callable[[int], float],
        backward: Callable[[int], float],
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ) -> list[float]:
        """Adam in train mode; afterwards the network is frozen.

        Args:
            stage: names the checkpoint.
            network: all its parameters are trained in place.
            steps: in all.
            lr: learning rate, or what it is at a step.
            backward: step number -> its loss, whose gradients it leaves in the network.
            betas: Adam's.
            weight_decay: likewise, part of the gradient.

        Returns:
            The loss of every step.

        Raises:
            M3adError: a loss is not finite.
        """
        rate = lr if callable(lr) else lambda _step: lr
        optimiser = torch.optim.Adam(network.parameters(), lr=rate(0), betas=betas, weight_decay=weight_decay)
        path, losses = self.folder / f"{stage}.pt", []
        saved = read_checkpoint(path) if path.is_file() else {}
        if saved.get("identity") == self.identity:
            network.load_state_dict(saved["network"])
            optimiser.load_state_dict(saved["optimiser"])
            losses = list(saved["losses"])
        network.train()
        for step in self.track(range(len(losses), steps), stage, steps - len(losses)):
            optimiser.zero_grad()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derived_seed(self.seed, step))
                loss = backward(step)
            if not math.isfinite(loss):
                raise M3adError(
                    f"the loss of {stage} is {loss} at step {step + 1}, expected a finite one; look for broken "
                    "frames, or lower the learning rate"
                )
            optimiser.param_groups[0]["lr"] = rate(step)
            optimiser.step()
            losses.append(loss)
            if (step + 1) % self.checkpoint_steps == 0 or step + 1 == steps:
                state = {"network": network.state_dict(), "optimiser": optimiser.state_dict()}
                save_checkpoint({"identity": self.identity, "losses": losses, **state}, path)
        network.eval().requires_grad_(False)
        return losses
