"""Mentor3AD in three stages; the encoders stay frozen.

    1. align  MFM: InfoNCE between its two branches (Eq. 2); then MFM is frozen
    2. guide  MGM: L_cos = (1 - cos(F_RGB, F~_RGB)) + (1 - cos(F_XYZ, F~_XYZ))   (Mentor3AD Eq. 4)
    3. vote   VM: what good frames score at each pixel, the one-class SVM on voted maps of training frames (Alg. 1)

Everything is seeded. A run that was interrupted goes on from its last checkpoint and ends with the identical result.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from m3ad.methods.mentor3ad import METHOD
from torch import Tensor, nn

from m3ad_export.checkpoints import read_checkpoint, save_checkpoint
from m3ad_export.dense.encoders import dense_features
from m3ad_export.dense.torch_ops import scored_pixels
from m3ad_export.detector import Detector
from m3ad_export.heads.fused import HeadRows, HeadTokens
from m3ad_export.heads.mentor import HeadConfig, Mfm, Mgm
from m3ad_export.heads.tiled import FusedHead
from m3ad_export.heads.voting import (
    HeadVote,
    OneClassSvm,
    SvmRows,
    Vm,
    VotingConfig,
    fit_baseline,
    fit_one_class_svm,
    map_names,
    score,
)
from m3ad_export.method import Fitted, Form, Implementation, Job, Networks
from m3ad_export.train.features import FrameFeatures, frame_scores
from m3ad_export.train.losses import Fusion, align_loss, guide_loss
from m3ad_export.train.samples import Pool, Track, draw_pool, sample_evenly
from m3ad_export.train.settings import require_ranges


@dataclass(frozen=True, slots=True, kw_only=True)
class MentorSettings:
    """How the heads are trained; all of it goes into the bundle.

    Args:
        mentor_width: of the mentor feature.
        pool_rows: feature rows drawn once from all training frames; the steps draw their batches from them.
        temperature: of InfoNCE.
        fusion: what becomes of MFM's outer MLP, which Eq. 2 does not reach. `frozen` keeps its seeded random weights;
            `aligned` adds InfoNCE of the mentor with both branches. An aligned mentor is the same whichever branch it
            comes from, and MGM rebuilds each modality from the other: it is blind where the two disagree.
        baseline_frames: training frames whose scores say what to expect at each pixel, for parts that lie alike as in a
            fixture; 0 leaves the scores as the paper has them.
        svm_frames: training frames whose whole maps fit the one-class SVM.
        svm_nu: share of their pixels below its boundary.
    """

    seed: int = 0
    mentor_width: int = 256
    pool_rows: int = 65536
    align_steps: int = 200
    align_rows: int = 768
    align_lr: float = 3e-3
    temperature: float = 0.1
    fusion: Fusion = "frozen"
    guide_steps: int = 250
    guide_rows: int = 512
    guide_lr: float = 1e-3
    baseline_frames: int = 0
    svm_frames: int = 4
    svm_nu: float = 0.5
    checkpoint_steps: int = 50

    def __post_init__(self) -> None:
        if self.fusion not in get_args(Fusion):
            raise ValueError(f"fusion must be frozen or aligned, got {self.fusion!r}")
        require_ranges(self, may_be_zero=("seed", "baseline_frames"))
        if not self.svm_nu < 1:
            raise ValueError(f"svm_nu must lie between 0 and 1, got {self.svm_nu}")


def fit(job: Job) -> Fitted:
    """Train MFM, then MGM, on rows of good frames, then fit VM to some of them."""
    config: MentorSettings = job.settings
    rgb_encoder, xyz_encoder = job.extract.rgb, job.extract.xyz
    assert rgb_encoder
    assert xyz_encoder
    heads = HeadConfig(
        rgb_width=rgb_encoder.config.token_width,
        xyz_width=xyz_encoder.config.token_width,
        mentor_width=config.mentor_width,
    )
    voting = VotingConfig()
    pool = draw_pool(job.samples, job.extract, config.pool_rows, config.seed, job.track)
    keys = [job.extract.key(s) for s in job.samples]
    run = _Run(job.folder, [asdict(heads), asdict(config), keys], config, job.track)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        mfm, mgm, vm = Mfm(heads), Mgm(heads), Vm(voting)
    align = run.optimise(
        "align", mfm, pool, lambda rgb, xyz: align_loss(mfm, rgb, xyz, config.temperature, config.fusion)
    )
    mfm.requires_grad_(False).eval()
    guide = run.optimise("guide", mgm, pool, lambda rgb, xyz: guide_loss(mfm, mgm, rgb, xyz))
    mgm.requires_grad_(False).eval()
    networks: Networks = {"mfm": mfm, "mgm": mgm, "vm": vm.eval()}
    fit_vote(networks, job)
    return Fitted(
        networks, {"heads": asdict(heads), "voting": asdict(voting)}, {"align": align, "guide": guide}
    )


def fit_vote(networks: Networks, job: Job) -> None:
    """Fit VM in place to good training frames (Alg. 1)."""
    config: MentorSettings = job.settings
    vm = vm_of(networks)
    head = fused_head(networks)
    good = sample_evenly(job.samples, max(config.baseline_frames, config.svm_frames))
    scored = [frame_scores(job.extract(s), head, METHOD.pairs) for s in job.track(good, "voting", len(good))]
    if config.baseline_frames:
        fit_baseline(vm, sample_evenly(scored, config.baseline_frames))
    x = torch.cat([vm.svm_rows(vm.score_maps(*s)) for s in sample_evenly(scored, config.svm_frames)])
    fit_one_class_svm(vm.svm, x, config.svm_nu)


def refit(detector: Detector, job: Job) -> Networks:
    """The same heads with a vote that is fitted anew."""
    networks = {**detector.networks, "vm": Vm(vm_of(detector.networks).config).eval()}
    fit_vote(networks, job)
    return networks


def build(record: Mapping[str, Any]) -> Networks:
    """Untrained networks of a record."""
    heads = HeadConfig(**record["heads"])
    return {"mfm": Mfm(heads), "mgm": Mgm(heads), "vm": Vm(VotingConfig(**record["voting"]))}


def vm_of(networks: Mapping[str, nn.Module]) -> Vm:
    """VM among the networks."""
    vm = networks["vm"]
    assert isinstance(vm, Vm)
    return vm


def fused_head(networks: Mapping[str, nn.Module]) -> FusedHead:
    """The fused head's modules, made of the trained ones."""
    mfm, mgm = networks["mfm"], networks["mgm"]
    assert isinstance(mfm, Mfm)
    assert isinstance(mgm, Mgm)
    tokens, rows = HeadTokens(mfm, mgm), HeadRows(mfm, mgm)
    return FusedHead(tokens, tokens.widths, rows, rows.INPUTS, rows.widths, HeadVote(vm_of(networks)))


def svm_of(detector: Detector) -> tuple[SvmRows, OneClassSvm]:
    """The one-class SVM and what it sees."""
    vm = vm_of(detector.networks)
    return SvmRows(vm.config), vm.svm


def predictor(detector: Detector) -> Callable[[FrameFeatures], tuple[Tensor, Tensor]]:
    """Anomaly map and score of a frame by the fused head."""
    head, vm = fused_head(detector.networks), vm_of(detector.networks)

    @torch.inference_mode()
    def predict(frame: FrameFeatures) -> tuple[Tensor, Tensor]:
        return vm.voted(*frame_scores(frame, head, METHOD.pairs))[:2]

    return predict


def dense(detector: Detector) -> Form:
    """Mentor3AD on every pixel of the grid, no identity used; its map is the chain's."""
    mfm, mgm, vm = (detector.networks[name] for name in ("mfm", "mgm", "vm"))
    assert isinstance(vm, Vm)

    def run(image: Tensor, points: Tensor, point_pixel: Tensor) -> Tensor:
        rgb, xyz = dense_features(detector, image, points, point_pixel)
        mentor = mfm(rgb, xyz)
        rgb_again, xyz_again = mgm(rgb, xyz, mentor)
        mentor_again = mfm(rgb_again, xyz_again)
        pairs = ((rgb, rgb_again), (xyz, xyz_again), (mentor, mentor_again))
        pixel = scored_pixels(point_pixel)
        anomaly_map: Tensor = vm.voted(torch.stack([score(a, b)[pixel] for a, b in pairs]), pixel)[0]
        return anomaly_map

    return run


def score_maps(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Each single score, then each voting term."""
    return map_names(VotingConfig(**record["voting"]))


class _Run:
    """Optimises one network after the other, leaving checkpoints that only the same run picks up again."""

    def __init__(self, folder: Path, settings: list[Any], config: MentorSettings, track: Track) -> None:
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


IMPLEMENTATION = Implementation(
    settings=MentorSettings,
    fit=fit,
    build=build,
    graphs=lambda detector: detector.networks,
    predictor=predictor,
    score_maps=score_maps,
    dense=dense,
    fused=lambda detector: fused_head(detector.networks),
    svm=svm_of,
    refit=refit,
)
