"""Good frames -> a trained detector, in three stages; the encoders stay frozen.

    1. align  MFM: InfoNCE between its two branches (Eq. 2); then MFM is frozen
    2. guide  MGM: L_cos = (1 - cos(F_RGB, F~_RGB)) + (1 - cos(F_XYZ, F~_XYZ))   (Mentor3AD Eq. 4)
    3. vote   VM: what good frames score at each pixel, the one-class SVM on voted maps of training frames (Alg. 1),
              the threshold from the validation frames

Everything is seeded. A run that was interrupted goes on from its last checkpoint and ends with the identical result.
"""

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from m3ad.frames import Sample, read_sample
from m3ad.preprocess import Preprocessing, prepare
from m3ad.scale import extent
from m3ad.stages import Ops
from torch import Tensor, nn

from m3ad_export.checkpoints import read_checkpoint, save_checkpoint
from m3ad_export.detector import Detector, save_detector
from m3ad_export.heads.mentor import HeadConfig, Mfm, Mgm
from m3ad_export.heads.voting import Vm, VotingConfig
from m3ad_export.nets.point_mae import PointMaeEncoder
from m3ad_export.nets.vit import VisionTransformer
from m3ad_export.train.features import FeatureExtractor
from m3ad_export.train.fit_vote import Track, fit_vote, require_good, spread_over
from m3ad_export.train.losses import Fusion, align_loss, guide_loss
from m3ad_export.weights import WeightsInfo

MEASURED_FRAMES = 32  # of which the part's extent is taken; the others are held against it

Pool = tuple[Tensor, Tensor]  # rgb_features [r, D], xyz_features [r, D]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How the heads are trained; all of it goes into the bundle.

    Args:
        pool_rows: feature rows drawn once from all training frames; the steps draw their batches from them.
        temperature: of InfoNCE.
        fusion: what becomes of MFM's outer MLP, which Eq. 2 does not reach. `frozen` keeps its seeded random weights;
            `aligned` adds InfoNCE of the mentor with both branches. An aligned mentor is the same whichever branch it
            comes from, and MGM rebuilds each modality from the other: it is blind where the two disagree.
        expected_frames: training frames whose scores say what to expect at each pixel, for parts that lie alike as in a
            fixture; 0 leaves the scores as the paper has them.
        svm_frames: training frames whose whole maps fit the one-class SVM.
        svm_nu: share of their pixels below its boundary.
    """

    seed: int = 0
    pool_rows: int = 65536
    align_steps: int = 200
    align_rows: int = 768
    align_lr: float = 3e-3
    temperature: float = 0.1
    fusion: Fusion = "frozen"
    guide_steps: int = 250
    guide_rows: int = 512
    guide_lr: float = 1e-3
    expected_frames: int = 0
    svm_frames: int = 4
    svm_nu: float = 0.5
    checkpoint_steps: int = 50

    def __post_init__(self) -> None:
        if self.fusion not in get_args(Fusion):
            raise ValueError(f"fusion must be frozen or aligned, got {self.fusion!r}")


@dataclass(frozen=True, slots=True)
class Encoders:
    """The frozen encoders, in eval mode, and what their weights are."""

    rgb: VisionTransformer
    rgb_weights: WeightsInfo
    xyz: PointMaeEncoder
    xyz_weights: WeightsInfo


def train(
    train_samples: Sequence[Sample],
    validation_samples: Sequence[Sample],
    encoders: Encoders,
    folder: Path,
    ops: Ops,
    *,
    category: str,
    preprocessing: Preprocessing,
    heads: HeadConfig | None = None,
    voting: VotingConfig | None = None,
    config: TrainConfig | None = None,
    track: Track = lambda steps, _description, _total: steps,
) -> Detector:
    """Train the heads of one category on good frames.

    Args:
        train_samples: good frames.
        validation_samples: good frames; they set the verdict threshold only.
        encoders: frozen.
        folder: gets `features/`, `checkpoints/`, `losses.png` and the detector (`save_detector`).
        ops: the custom ops.
        category: name of the category.
        preprocessing: of every frame, now and later; `extent_m` is measured on the training frames.
        heads: their widths and readings; the default fits the encoders.
        voting: Eq. 6's table.
        config: training settings.
        track: shows progress.

    Raises:
        FrameError: a split is empty or holds a defect, or a frame cannot be read.
    """
    voting, config = voting or VotingConfig(), config or TrainConfig()
    require_good("training", train_samples)
    require_good("validation", validation_samples)
    heads = heads or HeadConfig(
        rgb_width=encoders.rgb.config.token_width, xyz_width=encoders.xyz.config.token_width
    )
    preprocessing = with_extent(train_samples, preprocessing)
    extract = FeatureExtractor(encoders.rgb, encoders.xyz, preprocessing, ops, folder / "features")
    pool = draw_pool(train_samples, extract, config, track)
    keys = [extract.key(s) for s in train_samples]
    run = _Run(folder / "checkpoints", [asdict(heads), asdict(config), keys], config, track)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        mfm, mgm, vm = Mfm(heads), Mgm(heads), Vm(voting)
    align = run.optimise(
        "align", mfm, pool, lambda rgb, xyz: align_loss(mfm, rgb, xyz, config.temperature, config.fusion)
    )
    mfm.requires_grad_(False).eval()
    guide = run.optimise("guide", mgm, pool, lambda rgb, xyz: guide_loss(mfm, mgm, rgb, xyz))
    mgm.requires_grad_(False).eval()
    save_loss_plot({"align": align, "guide": guide}, folder / "losses.png")

    threshold = fit_vote(
        vm,
        mfm,
        mgm,
        train_samples,
        validation_samples,
        extract,
        expected_frames=config.expected_frames,
        svm_frames=config.svm_frames,
        svm_nu=config.svm_nu,
        track=track,
    )

    record = {
        "category": category,
        "encoders": {
            "rgb": {**asdict(encoders.rgb.config), "weights": encoders.rgb_weights.to_json()},
            "xyz": {**asdict(encoders.xyz.config), "weights": encoders.xyz_weights.to_json()},
        },
        "heads": asdict(heads),
        "voting": asdict(voting),
        "preprocessing": preprocessing.to_json(),
        "threshold": threshold,
        "training": {
            **asdict(config),
            "train_frames": len(train_samples),
            "validation_frames": len(validation_samples),
            "align_loss": align[-1],
            "guide_loss": guide[-1],
        },
    }
    detector = Detector(encoders.rgb, encoders.xyz, mfm, mgm, vm.eval(), record)
    save_detector(detector, folder)
    return detector


def with_extent(samples: Sequence[Sample], preprocessing: Preprocessing) -> Preprocessing:
    """The settings with the median extent of the samples' foreground, in metres.

    Raises:
        FrameError: a frame cannot be read or prepared.
    """
    settings = replace(preprocessing, extent_m=None)
    clouds = (prepare(read_sample(s), settings).points for s in spread_over(samples, MEASURED_FRAMES))
    return replace(preprocessing, extent_m=statistics.median(extent(points) for points in clouds))


def draw_pool(
    samples: Sequence[Sample], extract: FeatureExtractor, config: TrainConfig, track: Track
) -> Pool:
    """The same number of random rows from each frame, paired by pixel."""
    generator = torch.Generator().manual_seed(config.seed)
    rows: list[Pool] = []
    for sample in track(samples, "features", len(samples)):
        frame = extract(sample)
        count = len(frame.scored_pixel)
        order = torch.randperm(count, generator=generator)
        rows.append(frame.rows(order[: math.ceil(config.pool_rows / len(samples))].sort().values))
    return torch.cat([rgb for rgb, _ in rows]), torch.cat([xyz for _, xyz in rows])


class _Run:
    """Optimises one network after the other, leaving checkpoints that only the same run picks up again."""

    def __init__(self, folder: Path, settings: list[Any], config: TrainConfig, track: Track) -> None:
        self.folder, self.config, self.track = folder, config, track
        self.identity = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
        folder.mkdir(parents=True, exist_ok=True)

    def optimise(
        self, stage: str, network: nn.Module, pool: Pool, loss_of: Callable[[Tensor, Tensor], Tensor]
    ) -> list[float]:
        """AdamW with warm-up and cosine decay; returns the loss of every step."""
        steps, rows, peak_lr = (getattr(self.config, f"{stage}_{n}") for n in ("steps", "rows", "lr"))
        optimiser = torch.optim.AdamW(network.parameters(), lr=peak_lr)
        generator = torch.Generator().manual_seed(self.config.seed)
        losses: list[float] = []
        path = self.folder / f"{stage}.pt"
        saved = read_checkpoint(path) if path.is_file() else {}
        if saved.get("identity") == self.identity:
            network.load_state_dict(saved["network"])
            optimiser.load_state_dict(saved["optimiser"])
            generator.set_state(saved["generator"])
            losses = saved["losses"]
        for step in self.track(range(len(losses), steps), stage, steps - len(losses)):
            warm_up = min(1.0, (step + 1) / (steps / 5))
            for group in optimiser.param_groups:
                group["lr"] = peak_lr * warm_up * (1 + math.cos(math.pi * step / steps)) / 2
            picked = torch.randint(len(pool[0]), (rows,), generator=generator)
            loss = loss_of(pool[0][picked], pool[1][picked])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            losses.append(float(loss.detach()))
            if (step + 1) % self.config.checkpoint_steps == 0 or step + 1 == steps:
                state = {"network": network.state_dict(), "optimiser": optimiser.state_dict()}
                progress = {"generator": generator.get_state(), "losses": losses}
                save_checkpoint({"identity": self.identity, **state, **progress}, path)
        return losses


def save_loss_plot(losses: dict[str, list[float]], path: Path) -> None:
    """One panel per stage, loss against step, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(losses), 3), layout="constrained")
    for axes, (stage, values) in zip(figure.subplots(1, len(losses)), losses.items(), strict=True):
        axes.plot(range(1, len(values) + 1), values, linewidth=0.8)
        axes.set(title=stage, xlabel="step", ylabel="loss")
    figure.savefig(path, dpi=120)
