"""Shape-Guided: signed distances of patches and features of the image, each held against a few of its kind.

References:
    Shape-Guided (Chu et al., ICML 2023)  https://github.com/jayliu0313/Shape-Guided (no licence: written anew)
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from m3ad.bundle import sha256_of
from m3ad.errors import ArtifactError, M3adError
from m3ad.frames import Sample
from m3ad.methods.shape_guided import CELLS, PATCH_POINTS
from m3ad_plugins import ops
from torch import Tensor

from m3ad_export.checkpoints import load_strictly, read_checkpoint, tensors_of
from m3ad_export.dense.shape_guided import dense_map
from m3ad_export.detector import Detector
from m3ad_export.heads.guided import GuidedDictionary, GuidedVote, RgbRows, line_between, own_cells
from m3ad_export.heads.sdf_folds import FoldedDistance, FoldedEncoder
from m3ad_export.method import Fitted, Form, Implementation, Job, Networks
from m3ad_export.nets.configs import SdfConfig
from m3ad_export.nets.sdf import SdfNetwork
from m3ad_export.nets.wide_resnet import WideResNet
from m3ad_export.official_files import official_file
from m3ad_export.train.features import FrameFeatures
from m3ad_export.train.samples import sample_evenly
from m3ad_export.train.sdf import (
    LEAST_PATCHES,
    ShapeGuidedSettings,
    new_network,
    patches_for_training,
    train_distances,
)
from m3ad_export.weights import WeightsInfo

LICENCE = "none: all rights reserved"
POINTS_SHARE = 10  # patches that a point lies in, on average


def fit(job: Job) -> Fitted:
    """Learn signed distances on good frames, then fill the bank with some of them."""
    config: ShapeGuidedSettings = job.settings
    groups = config.patches or median_patches(job)
    samples = list(job.samples)
    cut = [
        patches_of(job.extract(s), groups, PATCH_POINTS)[0]
        for s in job.track(samples, "patches", len(samples))
    ]
    network = new_network(SdfConfig(), config.seed)
    keys = [job.extract.key(s) for s in samples]
    losses = train_distances(network, patches_for_training(cut), keys, job.folder, config, job.track)
    networks, heads = fill(job, network, groups)
    return Fitted(networks, {"heads": heads}, {"sdf": losses})


def median_patches(job: Job) -> int:
    """10 N / 500 patches for the median N of the training frames.

    Raises:
        FrameError: a frame cannot be read.
    """
    counts = [len(job.extract(s).point_pixel) for s in job.track(job.samples, "points", len(job.samples))]
    return min(max(round(POINTS_SHARE * statistics.median(counts) / PATCH_POINTS), LEAST_PATCHES), 1024)


def patches_of(frame: FrameFeatures, groups: int, size: int) -> tuple[Tensor, Tensor]:
    """neighborhood [G, S, 3] and knn_idx [G, S] of a frame's points."""
    assert frame.points is not None
    _, neighborhood, members = ops.point_group(frame.points, groups, size, 0.0, frame.point_pixel)
    return torch.from_numpy(neighborhood), torch.from_numpy(members)


@torch.inference_mode()
def fill(
    job: Job, network: SdfNetwork, groups: int, size: int = PATCH_POINTS
) -> tuple[Networks, dict[str, Any]]:
    """The bank and the vote of good frames, and the sizes that build them again."""
    config: ShapeGuidedSettings = job.settings
    assert job.teacher
    samples = sample_evenly(job.samples, config.frames or len(job.samples))
    rgb_rows, encoder = RgbRows(job.teacher), FoldedEncoder(network.encoder)
    codes, rows, marks, places = [], [], [], []
    for k, sample in enumerate(job.track(samples, "bank", len(samples))):
        frame = job.extract(sample)
        neighborhood, members = patches_of(frame, groups, size)
        own = own_cells(members, torch.from_numpy(frame.point_pixel))
        used = own.amax(dim=0).nonzero()[:, 0]
        codes.append(encoder(neighborhood))
        marks.append(own)
        rows.append(rgb_rows(image_of(frame))[used])
        places.append(k * CELLS + used)
    frame_of = torch.arange(len(samples)).repeat_interleave(groups)
    bank = GuidedDictionary(
        torch.cat(codes), torch.cat(rows), frame_of, torch.cat(marks), torch.cat(places), len(samples)
    )
    networks: Networks = {"sdf": network, "dictionary": bank, "vote": GuidedVote()}
    vote = aligned(job, networks, sample_evenly(samples, config.align_frames), (groups, size))
    heads = {
        "groups": groups,
        "group_size": size,
        "xyz_width": network.config.code,
        "sdf": asdict(network.config),
        "rgb_rows": len(bank.place),
        "frames": len(samples),
    }
    return frozen({**networks, "vote": vote}), heads


def aligned(job: Job, networks: Networks, samples: Sequence[Sample], sizes: tuple[int, int]) -> GuidedVote:
    """The vote whose line puts mean +- 3 std of the blurred RGB maps onto those of the distances.

    Every frame is in the bank, so that each nearest row is left out.

    Raises:
        M3adError: the maps are of one value.
    """
    assert job.teacher
    rgb_rows, encoder, bank, decoder, vote = parts_of(networks, job.teacher)
    maps: list[list[Tensor]] = [[], []]
    for sample in job.track(samples, "range of the maps", len(samples)):
        frame = job.extract(sample)
        neighborhood, members = patches_of(frame, *sizes)
        pixel = torch.from_numpy(frame.point_pixel)
        rebuilt, left, _ = bank(encoder(neighborhood), rgb_rows(image_of(frame)), members, pixel, skip=1)
        for found, raw in zip(
            maps, vote.raw_maps(decoder(neighborhood, rebuilt), members, pixel, left), strict=True
        ):
            found.append(vote.blur(raw))
    line = line_between(*map(torch.cat, maps))
    if not line.isfinite().all():
        raise M3adError(
            "the RGB residuals of the training frames are all one value; look for images without content"
        )
    vote.line = line
    return vote


def image_of(frame: FrameFeatures) -> Tensor:
    """The frame's image, [1, 3, 224, 224]."""
    assert frame.images is not None
    return torch.from_numpy(frame.images)


def frozen(networks: Networks) -> Networks:
    """The networks in eval mode, without gradients."""
    return {name: network.eval().requires_grad_(False) for name, network in networks.items()}


def build(record: Mapping[str, Any]) -> Networks:
    """Networks of a record's sizes, the bank empty."""
    sizes = record["heads"]
    config = SdfConfig(**sizes["sdf"])
    count = sizes["frames"] * sizes["groups"]
    channels = 3 * 2 * record["encoders"]["teacher"]["inner"]
    bank = GuidedDictionary(
        torch.zeros(count, config.code),
        torch.zeros(sizes["rgb_rows"], channels),
        torch.zeros(count),
        torch.zeros(count, CELLS),
        torch.zeros(sizes["rgb_rows"]),
        sizes["frames"],
    )
    return frozen({"sdf": SdfNetwork(config), "dictionary": bank, "vote": GuidedVote()})


def parts_of(
    networks: Networks, teacher: WideResNet
) -> tuple[RgbRows, FoldedEncoder, GuidedDictionary, FoldedDistance, GuidedVote]:
    """The stages behind the patches, in order."""
    sdf, bank, vote = (networks[name] for name in ("sdf", "dictionary", "vote"))
    assert isinstance(sdf, SdfNetwork)
    assert isinstance(bank, GuidedDictionary)
    assert isinstance(vote, GuidedVote)
    return RgbRows(teacher), FoldedEncoder(sdf.encoder), bank, FoldedDistance(sdf.NIF), vote


def graphs(detector: Detector) -> Networks:
    """Every stage but the patches, norms inside the layers."""
    assert detector.teacher
    names = ("rgb_rows", "sdf_encoder", "dictionary", "sdf_decoder", "vote")
    return frozen(dict(zip(names, parts_of(detector.networks, detector.teacher), strict=True)))


def predictor(detector: Detector) -> Callable[[FrameFeatures], tuple[Tensor, Tensor]]:
    """Anomaly map and score of a frame."""
    assert detector.teacher
    rgb_rows, encoder, bank, decoder, vote = parts_of(detector.networks, detector.teacher)
    dims = detector.dims

    @torch.inference_mode()
    def predict(frame: FrameFeatures) -> tuple[Tensor, Tensor]:
        neighborhood, members = patches_of(frame, dims.groups, dims.group_size)
        pixel = torch.from_numpy(frame.point_pixel)
        rebuilt, left, largest = bank(encoder(neighborhood), rgb_rows(image_of(frame)), members, pixel)
        voted: tuple[Tensor, Tensor, Tensor] = vote(
            decoder(neighborhood, rebuilt), members, pixel, left, largest
        )
        return voted[:2]

    return predict


def dense(detector: Detector) -> Form:
    """As published: patch by patch, each with its own dictionary."""
    sdf, bank, vote = (detector.networks[name] for name in ("sdf", "dictionary", "vote"))
    assert isinstance(sdf, SdfNetwork)
    assert isinstance(bank, GuidedDictionary)
    assert isinstance(vote, GuidedVote)
    assert detector.teacher
    return dense_map(detector.teacher, sdf.encoder, sdf.NIF, bank, vote.line, detector.dims)


def refit(detector: Detector, job: Job) -> Networks:
    """The same signed distances, the bank filled with other good frames; its sizes go into the record."""
    sdf = detector.networks["sdf"]
    assert isinstance(sdf, SdfNetwork)
    known = detector.record.get("heads", {})
    groups = known.get("groups") or job.settings.patches or median_patches(job)
    networks, detector.record["heads"] = fill(job, sdf, groups, known.get("group_size", PATCH_POINTS))
    return networks


def load_official(
    folder: Path, _category: str, _settings: ShapeGuidedSettings
) -> tuple[Fitted, dict[str, WeightsInfo]]:
    """The one .pth in the folder, {sdf_model, current_iteration}: one for all categories. `refit` fills the bank.

    Raises:
        ArtifactError: there is none, there are several, or it is not Shape-Guided's; the message names the keys.
    """
    path = official_file(folder, ".", "*.pth")
    document = read_checkpoint(path)
    if set(document) != {"sdf_model", "current_iteration"}:
        raise ArtifactError(
            f"{path} holds {', '.join(sorted(map(str, document))[:5]) or 'nothing'}, expected sdf_model and "
            "current_iteration"
        )
    network = SdfNetwork(SdfConfig())
    load_strictly(network, tensors_of(document["sdf_model"], path), path)
    info = WeightsInfo(
        name=path.name, kind="pretrained", sha256=sha256_of(path), licence=LICENCE, note="sdf_model"
    )
    return Fitted(frozen({"sdf": network}), {}, {}), {"sdf": info}


IMPLEMENTATION = Implementation(
    settings=ShapeGuidedSettings,
    fit=fit,
    build=build,
    graphs=graphs,
    predictor=predictor,
    score_maps=lambda _record: GuidedVote.MAPS,
    dense=dense,
    refit=refit,
    load_official=load_official,
)
