"""BTF: nothing is trained; a bank of good parts' image features and histograms side by side, and distances to it.

References:
    BTF (Horwitz, Hoshen 2023)  https://github.com/eliahuhorwitz/3D-ADS (MIT), its method RGB+FPFH
Its image network is timm's WideResNet50-2; torchvision's has the same names and other numbers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from m3ad.contract import IMAGE_SIZE
from m3ad.fpfh import CELL_SIDE, WIDTH
from torch import Tensor

from m3ad_export.detector import Detector
from m3ad_export.heads.bank import Bank
from m3ad_export.heads.btf import MAPS, CellBank, CellVote, LevelRows
from m3ad_export.heads.fold import fold_convolutions
from m3ad_export.heads.map_head import pil4
from m3ad_export.method import Fitted, Form, Implementation, Job, Networks
from m3ad_export.nets.wide_resnet import WideResNet
from m3ad_export.train.coreset import coreset
from m3ad_export.train.features import FrameFeatures
from m3ad_export.train.samples import sample_evenly
from m3ad_export.train.settings import require_ranges

LEAST_ROWS = 4  # a row and its two neighbours, and one to tell them from


@dataclass(frozen=True, slots=True, kw_only=True)
class BtfSettings:
    """How the bank is filled.

    Args:
        seed: of the coreset's projection.
        frames: training frames that fill the bank, evenly spread; 0 for all.
        bank_fraction: of all rows of these frames, 784 each, that are kept.
    """

    seed: int = 0
    frames: int = 0
    bank_fraction: float = 0.1

    def __post_init__(self) -> None:
        require_ranges(self, may_be_zero=("seed", "frames"))
        if not self.bank_fraction <= 1:
            raise ValueError(f"bank_fraction must lie in 0..1, got {self.bank_fraction}")


def rows_of(frame: FrameFeatures, rgb_rows: LevelRows) -> tuple[Tensor, Tensor]:
    """rgb_rows [784, D] and fpfh [784, 33] of a frame."""
    assert frame.images is not None
    assert frame.fpfh is not None
    rows: Tensor = rgb_rows(torch.from_numpy(frame.images))
    return rows, torch.from_numpy(frame.fpfh)


@torch.inference_mode()
def fit(job: Job) -> Fitted:
    """Fill the bank from good frames."""
    config: BtfSettings = job.settings
    assert job.teacher
    rgb_rows = LevelRows(job.teacher)
    samples = sample_evenly(job.samples, config.frames or len(job.samples))
    found = [rows_of(job.extract(s), rgb_rows) for s in job.track(samples, "features", len(samples))]
    rows = torch.cat([torch.cat(pair, dim=1) for pair in found])
    count = max(int(config.bank_fraction * len(rows)), LEAST_ROWS)
    bank = Bank(rows[coreset(rows, count, config.seed, job.track)])
    bank.find_neighbors()
    width = rows.shape[1] - WIDTH
    record = {"heads": {"rgb_width": width, "rows": count}}
    return Fitted(networks_of(CellBank(bank, width)), record, {})


def networks_of(bank: CellBank) -> Networks:
    """The networks of a detector, frozen."""
    networks: Networks = {"bank": bank, "vote": CellVote()}
    return {name: network.eval().requires_grad_(False) for name, network in networks.items()}


def build(record: Mapping[str, Any]) -> Networks:
    """An empty bank of a record's sizes."""
    width, count = record["heads"]["rgb_width"], record["heads"]["rows"]
    return networks_of(CellBank(Bank(torch.zeros(count, width + WIDTH)), width))


def parts_of(detector: Detector) -> tuple[WideResNet, CellBank, CellVote]:
    """Image network, bank and vote of a detector."""
    teacher, bank, vote = detector.teacher, detector.networks["bank"], detector.networks["vote"]
    assert teacher
    assert isinstance(bank, CellBank)
    assert isinstance(vote, CellVote)
    return teacher, bank, vote


def graphs(detector: Detector) -> Networks:
    """Every stage, the image network's norms within its convolutions."""
    teacher, bank, vote = parts_of(detector)
    return {"rgb_rows": LevelRows(fold_convolutions(teacher)).eval(), "bank": bank, "vote": vote}


def predictor(detector: Detector) -> Callable[[FrameFeatures], tuple[Tensor, Tensor]]:
    """Anomaly map and score of a frame."""
    teacher, bank, vote = parts_of(detector)
    rgb_rows = LevelRows(teacher)

    @torch.inference_mode()
    def predict(frame: FrameFeatures) -> tuple[Tensor, Tensor]:
        voted: tuple[Tensor, Tensor, Tensor] = vote(*bank(*rows_of(frame, rgb_rows)))
        return voted[:2]

    return predict


def dense(detector: Detector) -> Form:
    """As published: levels pooled by PyTorch's means, every cell against every row of the bank, upsampled, blurred."""
    teacher, bank, _ = parts_of(detector)
    blur = pil4().float()

    def run(image: Tensor, fpfh: Tensor, _point_pixel: Tensor) -> Tensor:
        pooled = [
            F.adaptive_avg_pool2d(F.avg_pool2d(level, 3, stride=1), CELL_SIDE) for level in teacher(image)[1:]
        ]
        queries = torch.cat([torch.cat(pooled, dim=1).flatten(2)[0].T, fpfh], dim=1)
        distance = torch.cdist(queries, bank.bank.rows + bank.bank.mean).amin(dim=1)
        grid = distance.reshape(1, 1, CELL_SIDE, CELL_SIDE)
        fine = F.interpolate(grid, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False)[0, 0]
        return blur.to(fine) @ fine @ blur.to(fine).T

    return run


IMPLEMENTATION = Implementation(
    settings=BtfSettings,
    fit=fit,
    build=build,
    graphs=graphs,
    predictor=predictor,
    score_maps=lambda _record: MAPS,
    dense=dense,
)
