"""M3DM without its fusion: nothing is trained; banks of good features, distances to them, and two one-class SVMs.

References:
    M3DM (Wang et al. 2023)  https://github.com/nomewang/M3DM (MIT), its method DINO+Point_MAE
Its third bank, of features fused by a network (UFF), needs weights that are the authors' alone: `m3dm_uff.py`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from m3ad.contract import IMAGE_SIZE
from m3ad.methods.m3dm import CELL_SIDE, SIDES
from torch import Tensor, nn

from m3ad_export.dense.encoders import xyz_tokens
from m3ad_export.dense.torch_ops import interpolated, three_nearest
from m3ad_export.detector import Detector
from m3ad_export.heads.bank import Bank, BankVote, DistanceVote, TokenCells, TwoBanks
from m3ad_export.heads.map_head import checked_choice, pil4
from m3ad_export.heads.voting import SVM_ROWS
from m3ad_export.method import Fitted, Form, Implementation, Job, Networks
from m3ad_export.train.coreset import coreset
from m3ad_export.train.features import FrameFeatures
from m3ad_export.train.samples import sample_evenly
from m3ad_export.train.settings import require_ranges

LEAST_ROWS = 4  # a row and its two neighbours, and one to tell them from
Decision = Literal["sgd", "exact"]


@dataclass(frozen=True, slots=True, kw_only=True)
class M3dmSettings:
    """How the banks are filled, and how both distances are added up.

    Args:
        seed: of the coreset's projection.
        frames: training frames that fill the banks, evenly spread; 0 for all.
        bank_fraction: of all rows of 3D features that are kept, and of those again for RGB, as M3DM's code has it.
        decision: `sgd` fits sklearn's SGDOneClassSVM as published, whose weights depend on the order of the rows;
            `exact` solves the same problem.
        svm_frames: training frames whose maps and scores fit the one-class SVMs.
    """

    seed: int = 0
    frames: int = 0
    bank_fraction: float = 0.1
    decision: Decision = "sgd"
    svm_frames: int = 8

    def __post_init__(self) -> None:
        require_ranges(self, may_be_zero=("seed", "frames"))
        if not self.bank_fraction <= 1:
            raise ValueError(f"bank_fraction must lie in 0..1, got {self.bank_fraction}")
        checked_choice("decision", self.decision, Decision)


def features(frame: FrameFeatures, cells: TokenCells) -> tuple[Tensor, Tensor]:
    """rgb_tokens [P, D] and xyz_cells [3136, D'] of a frame."""
    assert frame.points is not None
    assert frame.centers is not None
    cloud = (frame.xyz_tokens, frame.centers, frame.points, frame.point_pixel)
    found: Tensor = cells(*map(torch.from_numpy, cloud))
    return torch.from_numpy(frame.rgb_tokens), found


@torch.inference_mode()
def fit(job: Job) -> Fitted:
    """Fill both banks from good frames, then fit the weights of the sum to some of them."""
    config: M3dmSettings = job.settings
    samples = sample_evenly(job.samples, config.frames or len(job.samples))
    cells = TokenCells()
    rows = [features(job.extract(s), cells) for s in job.track(samples, "features", len(samples))]
    rgb, xyz = (torch.cat(each) for each in zip(*rows, strict=True))
    rgb_count, xyz_count = bank_sizes(config, len(rgb), len(xyz))
    banks = TwoBanks(
        Bank(rgb[coreset(rgb, rgb_count, config.seed, job.track)]),
        Bank(xyz[coreset(xyz, xyz_count, config.seed, job.track)]),
    )
    banks.scale = rgb.std()
    for bank in (banks.rgb, banks.xyz):
        bank.find_neighbors()
    assert job.extract.rgb
    vote = DistanceVote(job.extract.rgb.config.side)
    fit_weights(vote, banks, sample_evenly(rows, config.svm_frames), config.decision)
    record = {
        "heads": {
            "rgb_width": rgb.shape[1],
            "xyz_width": xyz.shape[1],
            "rgb_rows": rgb_count,
            "xyz_rows": xyz_count,
            "rgb_side": vote.rgb_side,
        }
    }
    return Fitted(networks_of(cells, banks, vote), record, {})


def bank_sizes(config: M3dmSettings, rgb: int, xyz: int) -> tuple[int, int]:
    """How many of so many rows of RGB and 3D features are kept; as many fused rows as of RGB."""
    xyz_count = max(int(config.bank_fraction * xyz), LEAST_ROWS)
    return min(max(int(config.bank_fraction * xyz_count), LEAST_ROWS), rgb), xyz_count


def fit_weights(
    vote: BankVote, banks: nn.Module, rows: Iterable[tuple[Tensor, ...]], decision: Decision
) -> None:
    """Set the vote's weights: one-class SVMs of the frames' scores and of the pixels of their maps, without offsets."""
    scores, pixels = [], []
    for each in rows:
        *distances, largest = banks(*each)
        scores.append(largest * vote.lambdas)
        maps = vote.score_maps(*distances) * vote.lambdas[:, None, None]
        pixels.append(maps.flatten(1).T)
    vote.score_weights = direction(torch.stack(scores), decision)
    vote.map_weights = direction(torch.cat(pixels), decision)


def direction(x: Tensor, decision: Decision) -> Tensor:
    """The weights of a linear one-class SVM (nu 0.5) of rows [R, banks], divided by their sum: the unit stays."""
    from sklearn.linear_model import SGDOneClassSVM
    from sklearn.svm import OneClassSVM

    if decision == "exact":  # in one unit for both columns: a unit each would be another problem
        picked = x[torch.linspace(0, len(x) - 1, min(len(x), SVM_ROWS)).long()].double()
        solver = OneClassSVM(kernel="linear", nu=0.5, tol=1e-6).fit((picked / picked.mean()).numpy())
    else:
        solver = SGDOneClassSVM(nu=0.5, max_iter=1000, random_state=42).fit(x.double().numpy())
    w = torch.tensor(solver.coef_).float().reshape(-1)
    return w / w.sum()


def networks_of(cells: TokenCells, banks: TwoBanks, vote: DistanceVote) -> Networks:
    """The networks of a detector, frozen."""
    return frozen({"cells": cells, "bank": banks, "vote": vote})


def frozen(networks: Networks) -> Networks:
    """The networks in eval mode, without gradients."""
    return {name: network.eval().requires_grad_(False) for name, network in networks.items()}


def build(record: Mapping[str, Any]) -> Networks:
    """Empty banks of a record's sizes."""
    sizes = record["heads"]
    rgb, xyz = (Bank(torch.zeros(sizes[f"{side}_rows"], sizes[f"{side}_width"])) for side in SIDES)
    return networks_of(TokenCells(), TwoBanks(rgb, xyz), DistanceVote(sizes["rgb_side"]))


def parts_of(detector: Detector) -> tuple[TokenCells, TwoBanks, DistanceVote]:
    """The networks of a detector, each of its type."""
    cells, banks, vote = (detector.networks[name] for name in ("cells", "bank", "vote"))
    assert isinstance(cells, TokenCells)
    assert isinstance(banks, TwoBanks)
    assert isinstance(vote, DistanceVote)
    return cells, banks, vote


def predictor(detector: Detector) -> Callable[[FrameFeatures], tuple[Tensor, Tensor]]:
    """Anomaly map and score of a frame."""
    cells, banks, vote = parts_of(detector)

    @torch.inference_mode()
    def predict(frame: FrameFeatures) -> tuple[Tensor, Tensor]:
        voted: tuple[Tensor, Tensor, Tensor] = vote(*banks(*features(frame, cells)))
        return voted[:2]

    return predict


def dense(detector: Detector) -> Form:
    """As published: every cell against every row of its bank, each map upsampled and blurred, then added up."""
    _, banks, vote = parts_of(detector)
    rgb_encoder, _ = detector.encoders

    def run(image: Tensor, points: Tensor, point_pixel: Tensor) -> Tensor:
        xyz = dense_cells(detector, points, point_pixel)
        total = torch.zeros(IMAGE_SIZE, IMAGE_SIZE, device=image.device)
        weights = vote.map_weights * vote.lambdas
        sides = ((banks.rgb, rgb_encoder(image), rgb_encoder.config.side), (banks.xyz, xyz, CELL_SIDE))
        for weight, (bank, queries, side) in zip(weights, sides, strict=True):
            distance = torch.cdist(queries, bank.rows + bank.mean).amin(dim=1) / banks.scale
            total = total + weight * shown(distance, side)
        return total

    return run


def dense_cells(detector: Detector, points: Tensor, point_pixel: Tensor) -> Tensor:
    """3D features of every cell, zero where no point is near: [3136, D]."""
    centers, tokens = xyz_tokens(detector, points)
    grid = tokens.new_zeros(IMAGE_SIZE * IMAGE_SIZE, tokens.shape[1])
    grid[point_pixel.long()] = interpolated(tokens, *three_nearest(points, centers))
    averaged = F.avg_pool2d(grid.T.reshape(1, -1, IMAGE_SIZE, IMAGE_SIZE), 3, stride=1)
    return F.adaptive_avg_pool2d(averaged, CELL_SIDE).flatten(2)[0].T


def shown(distance: Tensor, side: int) -> Tensor:
    """A distance's grid upsampled and blurred: [side * side] -> [224, 224]."""
    grid = distance.reshape(1, 1, side, side)
    fine = F.interpolate(grid, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False)[0, 0]
    blur = pil4().to(fine)
    return blur @ fine @ blur.T


IMPLEMENTATION = Implementation(
    settings=M3dmSettings,
    fit=fit,
    build=build,
    graphs=lambda detector: detector.networks,
    predictor=predictor,
    score_maps=lambda _record: SIDES,
    dense=dense,
)
