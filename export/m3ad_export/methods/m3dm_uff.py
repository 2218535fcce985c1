"""M3DM with its third bank, of features that the authors' network (UFF) fuses; the network is theirs alone.

References:
    M3DM (Wang et al. 2023)  https://github.com/nomewang/M3DM (MIT), its method DINO+Point_MAE+Fusion
UFF is not trained here: the published training pairs features of other places with each other. Their file comes in, and
the banks are filled with good parts.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from m3ad.bundle import sha256_of
from m3ad.contract import IMAGE_SIZE
from m3ad.errors import ArtifactError, M3adError
from m3ad.methods.m3dm import CELL_SIDE, CELLS, SIDES, UFF_SIDES, token_of_cell
from torch import Tensor

from m3ad_export.checkpoints import State, load_strictly, read_checkpoint, tensors_of
from m3ad_export.detector import Detector
from m3ad_export.heads.bank import Bank, TokenCells
from m3ad_export.heads.three_banks import FusionBank, ThreeBanks, ThreeDistanceVote
from m3ad_export.method import Fitted, Form, Implementation, Job, Networks
from m3ad_export.methods.m3dm import (
    M3dmSettings,
    bank_sizes,
    dense_cells,
    features,
    fit_weights,
    frozen,
    shown,
)
from m3ad_export.nets.uff import Uff
from m3ad_export.official_files import official_file
from m3ad_export.train.coreset import coreset
from m3ad_export.train.features import FrameFeatures
from m3ad_export.train.samples import sample_evenly
from m3ad_export.weights import WeightsInfo

LICENCE = "MIT"


def fit(_job: Job) -> Fitted:
    """Refuse: there is nothing to fill a third bank with before UFF's weights are there.

    Raises:
        M3adError: always.
    """
    raise M3adError(
        "M3DM's third bank holds what the authors' UFF fuses, which is not trained here: put their checkpoint "
        "(`UFF Module` in M3DM's README) as the one .pth into a folder and add --official FOLDER, or take --method m3dm"
    )


@torch.inference_mode()
def fill(job: Job, uff: Uff) -> tuple[Networks, dict[str, Any]]:
    """Networks whose banks hold good frames' features, and their sizes."""
    config: M3dmSettings = job.settings
    assert job.extract.rgb
    side = job.extract.rgb.config.side
    cells = TokenCells()
    samples = sample_evenly(job.samples, config.frames or len(job.samples))
    frames = [features(job.extract(s), cells) for s in job.track(samples, "features", len(samples))]
    rgb, xyz = (torch.cat(each) for each in zip(*frames, strict=True))
    rgb_count, xyz_count = bank_sizes(config, len(rgb), len(xyz))

    def chosen(rows: Tensor, count: int) -> Tensor:
        return rows[coreset(rows, count, config.seed, job.track)]

    # Theirs appends the zero row of shifted features to the 3D bank: everywhere the mean of all.
    mean_row = xyz.mean().expand(1, xyz.shape[1])
    banks = ThreeBanks(
        Bank(chosen(rgb, rgb_count)),
        Bank(torch.cat([chosen(xyz, xyz_count), mean_row])),
        FusionBank(chosen(fused_rows(frames, uff, side), rgb_count), xyz.shape[1], side),
    )
    banks.scale = rgb.std()
    for bank in (banks.rgb, banks.xyz, banks.fusion):
        bank.find_neighbors()
    vote = ThreeDistanceVote(side)
    asked = [(*frame, *uff(*frame)) for frame in sample_evenly(frames, config.svm_frames)]
    fit_weights(vote, banks, asked, config.decision)
    sizes = {
        "rgb_width": rgb.shape[1],
        "xyz_width": xyz.shape[1],
        "rgb_rows": rgb_count,
        "xyz_rows": xyz_count + 1,
        "fusion_rows": rgb_count,
        "rgb_side": side,
    }
    return networks_of(cells, uff, banks, vote), sizes


def fused_rows(frames: Sequence[tuple[Tensor, Tensor]], uff: Uff, rgb_side: int) -> Tensor:
    """Fused rows of frames' RGB tokens and cells: [frames * 3136, D' + D]."""
    token = torch.from_numpy(token_of_cell(rgb_side)).long()
    widths = [each.shape[1] for each in frames[0]]
    rows = torch.empty(len(frames), CELLS, sum(widths))  # filled frame by frame: 24 MB each at full size
    for k, (rgb, xyz) in enumerate(frames):
        rgb_half, xyz_half = uff(rgb, xyz)
        rows[k] = torch.cat([xyz_half, rgb_half[token]], dim=1)
    return rows.flatten(0, 1)


def networks_of(cells: TokenCells, uff: Uff, banks: ThreeBanks, vote: ThreeDistanceVote) -> Networks:
    """The networks of a detector, frozen."""
    return frozen({"cells": cells, "uff": uff, "bank": banks, "vote": vote})


def build(record: Mapping[str, Any]) -> Networks:
    """Networks of a record's sizes, the banks empty."""
    sizes = record["heads"]
    rgb, xyz = (Bank(torch.zeros(sizes[f"{side}_rows"], sizes[f"{side}_width"])) for side in SIDES)
    width = sizes["rgb_width"] + sizes["xyz_width"]
    fusion = FusionBank(torch.zeros(sizes["fusion_rows"], width), sizes["xyz_width"], sizes["rgb_side"])
    return networks_of(
        TokenCells(),
        Uff(sizes["rgb_width"], sizes["xyz_width"]),
        ThreeBanks(rgb, xyz, fusion),
        ThreeDistanceVote(sizes["rgb_side"]),
    )


def parts_of(detector: Detector) -> tuple[TokenCells, Uff, ThreeBanks, ThreeDistanceVote]:
    """The networks of a detector, each of its type."""
    cells, uff, banks, vote = (detector.networks[name] for name in ("cells", "uff", "bank", "vote"))
    assert isinstance(cells, TokenCells)
    assert isinstance(uff, Uff)
    assert isinstance(banks, ThreeBanks)
    assert isinstance(vote, ThreeDistanceVote)
    return cells, uff, banks, vote


def graphs(detector: Detector) -> Networks:
    """Every stage, and UFF's halves, of which its graph is composed."""
    _, uff, *_ = parts_of(detector)
    return {**detector.networks, **{f"uff_{side}": uff.part(side) for side in SIDES}}


def predictor(detector: Detector) -> Callable[[FrameFeatures], tuple[Tensor, Tensor]]:
    """Anomaly map and score of a frame."""
    cells, uff, banks, vote = parts_of(detector)

    @torch.inference_mode()
    def predict(frame: FrameFeatures) -> tuple[Tensor, Tensor]:
        rgb, xyz = features(frame, cells)
        voted: tuple[Tensor, Tensor, Tensor] = vote(*banks(rgb, xyz, *uff(rgb, xyz)))
        return voted[:2]

    return predict


def dense(detector: Detector) -> Form:
    """As published: both halves on every cell, every row against every row of its bank, maps blurred and added up."""
    _, uff, banks, vote = parts_of(detector)
    rgb_encoder, _ = detector.encoders

    def run(image: Tensor, points: Tensor, point_pixel: Tensor) -> Tensor:
        side = rgb_encoder.config.side
        rgb, xyz = rgb_encoder(image), dense_cells(detector, points, point_pixel)
        repeated = F.adaptive_avg_pool2d(rgb.T.reshape(1, -1, side, side), CELL_SIDE)[0].flatten(1).T
        rgb_half, xyz_half = uff(repeated, xyz)
        fusion = banks.fusion
        queries = {
            "xyz": (xyz, banks.xyz.rows + banks.xyz.mean, CELL_SIDE),
            "rgb": (rgb, banks.rgb.rows + banks.rgb.mean, side),
            "fusion": (
                torch.cat([xyz_half, rgb_half], dim=1),
                torch.cat([fusion.xyz_rows + fusion.xyz_mean, fusion.rgb_rows + fusion.rgb_mean], dim=1),
                CELL_SIDE,
            ),
        }
        total = torch.zeros(IMAGE_SIZE, IMAGE_SIZE, device=image.device)
        for weight, name in zip(vote.map_weights * vote.lambdas, UFF_SIDES, strict=True):
            rows, bank, cells = queries[name]
            distance = torch.cdist(rows, bank).amin(dim=1) / banks.scale
            total = total + weight * shown(distance, cells)
        return total

    return run


def refit(detector: Detector, job: Job) -> Networks:
    """The same UFF, the banks filled with other good frames; their sizes go into the record."""
    uff = detector.networks["uff"]
    assert isinstance(uff, Uff)
    networks, detector.record["heads"] = fill(job, uff)
    return networks


def load_official(
    folder: Path, _category: str, _settings: M3dmSettings
) -> tuple[Fitted, dict[str, WeightsInfo]]:
    """The one .pth in the folder, a trainer's file whose `model` is the state dict, one for all categories.

    `refit` fills the banks.

    Raises:
        ArtifactError: there is none, there are several, or it is not UFF's; the message names the keys.
    """
    path = official_file(folder, ".", "*.pth")
    document = read_checkpoint(path)
    if "model" not in document:
        raise ArtifactError(
            f"{path} holds {', '.join(sorted(map(str, document))[:5]) or 'nothing'}, expected a checkpoint with UFF's "
            "state dict as its `model`"
        )
    state = tensors_of(document["model"], path)
    network = Uff(**widths_of(state))
    load_strictly(network, state, path)
    info = WeightsInfo(
        name=path.name, kind="pretrained", sha256=sha256_of(path), licence=LICENCE, note="model"
    )
    return Fitted(frozen({"uff": network}), {}, {}), {"uff": info}


def widths_of(state: State) -> dict[str, int]:
    """The widths of a checkpoint's network, the published ones where it does not say."""
    sizes = {"rgb_width": 768, "xyz_width": 1152}
    norms = {f"{side}_width": state.get(f"{side}_norm.weight") for side in ("rgb", "xyz")}
    return sizes | {name: len(norm) for name, norm in norms.items() if norm is not None and norm.ndim == 1}


IMPLEMENTATION = Implementation(
    settings=M3dmSettings,
    fit=fit,
    build=build,
    graphs=graphs,
    predictor=predictor,
    score_maps=lambda _record: UFF_SIDES,
    dense=dense,
    refit=refit,
    load_official=load_official,
)
