"""CMDR-IAD: four networks, each trained alone on good frames; with one modality, its decoder alone (our reading).

References:
    CMDR-IAD  https://github.com/ECGAI-Research/CMDR-IAD (no licence; its weights are unpublished)
Training is 1 - mean cos over the scored rows. The decoders run by the exact rewrites of `heads.cmdr_rewrites`.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from m3ad.methods.cmdr_iad import METHODS, MODALITIES, REACH, WINDOW, pairs_of
from m3ad_runtime.windows import needed
from torch import Tensor, nn

from m3ad_export.dense.encoders import dense_rgb, dense_xyz
from m3ad_export.dense.torch_ops import scored_pixels
from m3ad_export.detector import Detector
from m3ad_export.heads.cmdr import CmdrConfig, CmdrNetworks
from m3ad_export.heads.cmdr_rewrites import (
    RgbDecoder,
    XyzDecoderRest,
    folded_rgb,
    folded_xyz,
    hidden_of_tokens,
    rgb_rebuilt,
    rgb_taps,
    xyz_rebuilt,
)
from m3ad_export.heads.map_head import (
    GatedReconstruction,
    ImageNorm,
    Modality,
    Smoothing,
)
from m3ad_export.heads.mappings import CrossMap, Mappings, folded_map, mapping_head
from m3ad_export.heads.tiled import FusedHead
from m3ad_export.heads.voting import cosine_scores
from m3ad_export.method import Fitted, Form, Implementation, Job, Networks
from m3ad_export.official_files import load_frozen, official_file
from m3ad_export.train.cmdr import CmdrSettings, train_cmdr
from m3ad_export.train.features import FrameFeatures, frame_scores
from m3ad_export.weights import WeightsInfo

LICENCE = "none: all rights reserved"


class CmdrVote(nn.Module):
    """Rows that `pairs_of` the declaration names, each once, then scored_pixel [R] -> map, score [1], score_maps."""

    def __init__(
        self,
        modality: Modality = "both",
        fusion_smoothing: Smoothing = "code",
        image_norm: ImageNorm = "none",
    ) -> None:
        super().__init__()
        self.pairs = pairs_of(modality)
        self.combine = GatedReconstruction(modality, fusion_smoothing, image_norm)

    def forward(self, *rows_and_pixel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        *rows, scored_pixel = rows_and_pixel
        named = dict(zip(dict.fromkeys(name for pair in self.pairs for name in pair), rows, strict=True))
        scores = cosine_scores(*((named[a], named[b]) for a, b in self.pairs))
        voted: tuple[Tensor, Tensor, Tensor] = self.combine(scores, scored_pixel)
        return voted


def random_networks(config: CmdrConfig, seed: int = 115) -> CmdrNetworks:
    """Untrained networks, PyTorch's default initialisation under a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CmdrNetworks(config)


def load_official(
    folder: Path, category: str, config: CmdrConfig | None = None
) -> tuple[CmdrNetworks, dict[str, WeightsInfo]]:
    """{map2Dto3D,map3Dto2D,Dec2D,Dec3D}_<category>_independent_<E>ep_<B>bs.pth of a category, those of the modality.

    Returns:
        The networks, frozen, and what the weights of each are.

    Raises:
        ArtifactError: a file is missing, there are several, or it is not CMDR-IAD's; the message names the keys.
    """
    networks = CmdrNetworks(config or CmdrConfig())
    infos = {}
    for name, network in networks.parts().items():
        path = official_file(folder, category, f"{name}_{category}_independent_*.pth")
        infos[name] = load_frozen(network, path, LICENCE)
    return networks.eval().requires_grad_(False), infos


def fit(modality: Modality, job: Job) -> Fitted:
    """Train the networks of a modality on good frames."""
    config: CmdrSettings = job.settings
    rgb, xyz = job.extract.rgb, job.extract.xyz
    widths: dict[str, int] = {}
    if rgb:
        widths["rgb_width"] = rgb.config.token_width
    if xyz:
        widths["xyz_width"] = xyz.config.token_width
    sizes = CmdrConfig(modality=modality, **widths)  # type: ignore[arg-type]
    networks = random_networks(sizes, config.seed)
    losses = train_cmdr(job.samples, job.extract, networks, job.folder, config, job.track)
    return Fitted(*saved(networks, config), losses)


def saved(networks: CmdrNetworks, config: CmdrSettings) -> tuple[Networks, dict[str, Any]]:
    """The networks of a detector, and what builds them again."""
    smoothing, norm = config.fusion_smoothing, config.image_norm
    vote = CmdrVote(networks.config.modality, smoothing, norm).eval()
    record = {
        "heads": asdict(networks.config),
        "vote": {"fusion_smoothing": smoothing, "image_norm": norm},
    }
    return {"cmdr": networks, "vote": vote}, record


def build(record: Mapping[str, Any]) -> Networks:
    """Untrained networks of a record."""
    networks = CmdrNetworks(msgspec.convert(record["heads"], CmdrConfig))
    return {"cmdr": networks, "vote": CmdrVote(networks.config.modality, **record["vote"])}


def networks_of(detector: Detector) -> tuple[CmdrNetworks, CmdrVote]:
    """The networks and the vote of a detector."""
    networks, vote = detector.networks["cmdr"], detector.networks["vote"]
    assert isinstance(networks, CmdrNetworks)
    assert isinstance(vote, CmdrVote)
    return networks, vote


def graphs(detector: Detector) -> Networks:
    """The dense parts of the chain's stages: mappings, decoders by the exact rewrites, vote."""
    networks, vote = networks_of(detector)
    found: Networks = {"vote": vote}
    if networks.maps:
        found["map"] = folded_maps(networks.maps)
    if networks.rgb_decoder:
        found["rgb_decoder_windows"] = RgbDecoder(networks.rgb_decoder, detector.dims.rgb_tokens)
    if networks.xyz_decoder:
        found["xyz_decoder_rest"] = XyzDecoderRest(networks.xyz_decoder)
    return found


def folded_maps(maps: Mappings) -> Mappings:
    """Both mappings with their LN affines in the layers behind."""
    to_xyz, to_rgb = maps.to_xyz, maps.to_rgb
    assert isinstance(to_xyz, CrossMap)
    assert isinstance(to_rgb, CrossMap)
    return Mappings(folded_map(to_xyz), folded_map(to_rgb)).eval()


def pixel_weights(detector: Detector) -> npt.NDArray[np.float32]:
    """The XYZ decoder's first layer, one row for each pixel: [50176, 1568]."""
    networks, _ = networks_of(detector)
    assert networks.xyz_decoder
    weight: npt.NDArray[np.float32] = networks.xyz_decoder.first.weight.detach().T.contiguous().numpy()
    return weight


def fused_head(detector: Detector) -> FusedHead:
    """The fused head's modules, made of the trained ones; it is given the decoders' rows."""
    networks, vote = networks_of(detector)
    assert networks.maps
    return mapping_head(folded_maps(networks.maps), vote.combine)


def predictor(detector: Detector) -> Callable[[FrameFeatures], tuple[Tensor, Tensor]]:
    """Anomaly map and score of a frame by the rewrites."""
    networks, vote = networks_of(detector)
    rgb = folded_rgb(networks.rgb_decoder) if networks.rgb_decoder else None
    xyz = folded_xyz(networks.xyz_decoder) if networks.xyz_decoder else None
    head = fused_head(detector) if networks.maps else None
    (method,) = (m for m in METHODS if m.name == detector.record["method"])

    @torch.inference_mode()
    def predict(frame: FrameFeatures) -> tuple[Tensor, Tensor]:
        pixel = torch.from_numpy(frame.scored_pixel)
        rebuilt: dict[str, Tensor] = {}
        if rgb:
            tokens = torch.from_numpy(frame.rgb_tokens)
            region = map(torch.from_numpy, needed(frame.scored_pixel, WINDOW, REACH))
            rebuilt["rgb_rebuilt"] = rgb_rebuilt(rgb, rgb_taps(len(tokens)), tokens, *region)
        if xyz:
            hidden = hidden_of_tokens(xyz, torch.from_numpy(frame.xyz_tokens), frame.xyz_operator)
            rebuilt["xyz_rebuilt"] = xyz_rebuilt(xyz, hidden, pixel)
        if head:
            scores, *_ = frame_scores(frame, head, method.pairs, rebuilt)
        else:
            side = "rgb" if rgb else "xyz"
            operator, tokens_of = (
                (frame.rgb_operator, frame.rgb_tokens) if rgb else (frame.xyz_operator, frame.xyz_tokens)
            )
            features = torch.from_numpy(operator.apply(tokens_of))
            scores = cosine_scores((features, rebuilt[f"{side}_rebuilt"]))
        voted: tuple[Tensor, Tensor, Tensor] = vote.combine(scores, pixel)
        return voted[:2]

    return predict


def dense(detector: Detector) -> Form:
    """CMDR-IAD on every pixel of the grid, the modules as published."""
    networks, vote = networks_of(detector)

    def run(image: Tensor, points: Tensor, point_pixel: Tensor) -> Tensor:
        rgb = dense_rgb(detector, image) if networks.rgb_decoder else None
        xyz = dense_xyz(detector, points, point_pixel) if networks.xyz_decoder else None
        pixel = scored_pixels(point_pixel)
        pairs: list[tuple[Tensor, Tensor]] = []
        if networks.maps and rgb is not None and xyz is not None:
            rgb_again, xyz_again = networks.maps(rgb, xyz)
            pairs += [(rgb, rgb_again), (xyz, xyz_again)]
        if networks.rgb_decoder and rgb is not None:
            pairs.append((rgb, networks.rgb_decoder(rgb[None])[0]))
        if networks.xyz_decoder and xyz is not None:
            pairs.append((xyz, networks.xyz_decoder(xyz[None])[0]))
        scores = cosine_scores(*((a[pixel], b[pixel]) for a, b in pairs))
        anomaly_map: Tensor = vote.combine(scores, pixel)[0]
        return anomaly_map

    return run


def official(
    modality: Modality, folder: Path, category: str, settings: CmdrSettings
) -> tuple[Fitted, dict[str, WeightsInfo]]:
    """The authors' files of a category as what training would leave."""
    networks, infos = load_official(folder, category, CmdrConfig(modality=modality))
    return Fitted(*saved(networks, settings), {}), infos


def _implementation(modality: Modality) -> Implementation:
    return Implementation(
        settings=CmdrSettings,
        fit=partial(fit, modality),
        build=build,
        graphs=graphs,
        predictor=predictor,
        score_maps=lambda _record: GatedReconstruction(modality).maps,
        dense=dense,
        fused=fused_head if modality == "both" else None,
        pixel_weights=pixel_weights if modality != "rgb" else None,
        load_official=partial(official, modality),
    )


IMPLEMENTATIONS = {
    method.name: _implementation(modality) for method, modality in zip(METHODS, MODALITIES, strict=True)
}
