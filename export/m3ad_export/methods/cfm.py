"""CFM: each modality's features mapped to the other's; where a part is as it should be, both mappings meet.

References:
    CFM (Costanzino et al. 2024)  https://github.com/CVLAB-Unibo/crossmodal-feature-mapping (non-commercial)
Two forms. The chain `Mappings` -> `CfmVote` on the rows of the scored pixels; and the fused one, `MapTokens` (first
layers on the tokens) -> `MapRows` (the rest, tile by tile) -> `ChordProduct`, which has the same map. Training is
(1 - mean cos) of both mappings on good frames, one Adam over both.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from m3ad.frames import Sample
from m3ad.methods.cfm import METHOD
from torch import Tensor, nn

from m3ad_export.checkpoints import state_sha256
from m3ad_export.dense.cfm import published
from m3ad_export.detector import Detector
from m3ad_export.heads.map_head import ChordProduct, ImageNorm, checked_choice
from m3ad_export.heads.mappings import BIG_LAYERS, AnyMapping, BigMapping, Mappings, mapping_head
from m3ad_export.heads.mentor import Mapping as OneHiddenLayer
from m3ad_export.heads.tiled import FusedHead
from m3ad_export.heads.voting import cosine_scores
from m3ad_export.method import Fitted, Form, Implementation, Job, Networks
from m3ad_export.official_files import load_frozen, official_file, official_state
from m3ad_export.train.features import FeatureExtractor, FrameFeatures, frame_scores
from m3ad_export.train.optimise import SeededRun, batch_of, generator_of, one_minus_cosine
from m3ad_export.train.samples import Track, draw_pool
from m3ad_export.train.settings import require_ranges
from m3ad_export.weights import WeightsInfo

LICENCE = "non-commercial"
RGB_WIDTH, XYZ_WIDTH = 768, 1152

Recipe = Literal["official", "rows"]
Pairs = Iterable[tuple[Tensor, Tensor]]  # rgb_features [r, D], xyz_features [r, D']


@dataclass(frozen=True, slots=True, kw_only=True)
class CfmSettings:
    """How both mappings are trained, and how the image score is made.

    Args:
        recipe: `official` takes all scored rows of `batch` frames a step, `epochs` times through the frames; `rows`
            takes `rows` of a pool of `pool_rows` that is drawn once, `steps` times, which needs no GPU.
        epochs: 50 in the authors' script, 250 in their published weights.
        big: five hidden layers for one, as for Eyecandies.
        image_norm: `cfm` divides the image score as CFM's tables do; a part that is bad everywhere then scores lower.
    """

    recipe: Recipe = "rows"
    seed: int = 115
    lr: float = 1e-3
    epochs: int = 50
    batch: int = 4
    pool_rows: int = 65536
    rows: int = 512
    steps: int = 250
    checkpoint_steps: int = 50
    big: bool = False
    image_norm: ImageNorm = "none"

    def __post_init__(self) -> None:
        require_ranges(self, may_be_zero=("seed",))
        checked_choice("recipe", self.recipe, Recipe)
        checked_choice("image_norm", self.image_norm, ImageNorm)


class CfmVote(nn.Module):
    """Two pairs of rows and scored_pixel [R] -> anomaly_map [224, 224], score [1], score_maps [3, 224, 224]."""

    def __init__(self, image_norm: ImageNorm = "none") -> None:
        super().__init__()
        self.combine = ChordProduct(image_norm)

    def forward(
        self,
        rgb: Tensor,
        rgb_reconstructed: Tensor,
        xyz: Tensor,
        xyz_reconstructed: Tensor,
        scored_pixel: Tensor,
        point_pixel: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        scores = cosine_scores((rgb, rgb_reconstructed), (xyz, xyz_reconstructed))
        voted: tuple[Tensor, Tensor, Tensor] = self.combine(scores, scored_pixel, point_pixel)
        return voted


def random_networks(
    rgb_width: int = RGB_WIDTH, xyz_width: int = XYZ_WIDTH, *, big: bool = False, seed: int = 115
) -> Mappings:
    """Both mappings untrained, PyTorch's default initialisation under a seed."""
    kind = BigMapping if big else OneHiddenLayer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Mappings(kind(rgb_width, xyz_width), kind(xyz_width, rgb_width))


def load_official(folder: Path, category: str) -> tuple[Mappings, dict[str, WeightsInfo]]:
    """CFM_{2Dto3D,3Dto2D}_<category>_<E>ep_<B>bs.pth of a category, small or `_big` as the files are.

    Returns:
        The networks, frozen, and what the weights of `to_xyz` and `to_rgb` are.

    Raises:
        ArtifactError: a file is missing, there are several, or it is not CFM's; the message names the keys.
    """
    networks: list[AnyMapping] = []
    infos = []
    for direction, widths in (("2Dto3D", (RGB_WIDTH, XYZ_WIDTH)), ("3Dto2D", (XYZ_WIDTH, RGB_WIDTH))):
        path = official_file(folder, category, f"CFM_{direction}_{category}_*.pth")
        big = f"{BIG_LAYERS[0]}.weight" in official_state(path)
        networks.append((BigMapping if big else OneHiddenLayer)(*widths))
        infos.append(load_frozen(networks[-1], path, LICENCE))
    return Mappings(*networks), dict(zip(("to_xyz", "to_rgb"), infos, strict=True))


def train_cfm(
    samples: Sequence[Sample],
    extract: FeatureExtractor,
    networks: Mappings,
    folder: Path,
    config: CfmSettings,
    track: Track = lambda steps, _description, _total: steps,
) -> list[float]:
    """Train both mappings in place on good frames; they are frozen afterwards.

    Args:
        samples: good frames.
        extract: gives their features.
        networks: untrained.
        folder: of the checkpoint; a run that was interrupted goes on from it.
        config: training settings.
        track: shows progress.

    Returns:
        The loss of every step, the sum of both directions.

    Raises:
        FrameError: a frame cannot be read.
        M3adError: a loss is not finite.
    """
    settings = [asdict(config), [extract.key(s) for s in samples], state_sha256(networks)]
    run = SeededRun(folder, settings, seed=config.seed, checkpoint_steps=config.checkpoint_steps, track=track)
    if config.recipe == "rows":
        rgb, xyz = draw_pool(samples, extract, config.pool_rows, config.seed, track)

        def backward(step: int) -> float:
            generator = generator_of(config.seed, step)
            picked = torch.randint(len(rgb), (config.rows,), generator=generator)
            return backward_both(networks, [(rgb[picked], xyz[picked])], config.rows)

        steps = config.steps
    else:

        def backward(step: int) -> float:
            frames = [extract(samples[i]) for i in batch_of(step, len(samples), config.batch, config.seed)]
            chunks = (
                (chunk["rgb_features"], chunk["xyz_features"]) for frame in frames for chunk in frame.chunks()
            )
            return backward_both(networks, chunks, sum(len(frame.scored_pixel) for frame in frames))

        steps = config.epochs * -(-len(samples) // config.batch)
    return run.optimise("cfm", networks, steps, config.lr, backward)


def backward_both(networks: Mappings, pairs: Pairs, rows: int) -> float:
    """Gradients of (1 - mean cos) of both directions, added up chunk by chunk: the mean runs over all `rows`."""
    total = 0.0
    for rgb, xyz in pairs:
        rgb_again, xyz_again = networks(rgb, xyz)
        loss = (one_minus_cosine(rgb_again, rgb) + one_minus_cosine(xyz_again, xyz)) / rows
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return total


def fit(job: Job) -> Fitted:
    """Train both mappings on good frames."""
    config: CfmSettings = job.settings
    rgb, xyz = job.extract.rgb, job.extract.xyz
    assert rgb
    assert xyz
    maps = random_networks(rgb.config.token_width, xyz.config.token_width, big=config.big, seed=config.seed)
    losses = train_cfm(job.samples, job.extract, maps, job.folder, config, job.track)
    record = record_of(rgb.config.token_width, xyz.config.token_width, config.big, config.image_norm)
    return Fitted(networks_of(maps, config.image_norm), record, {"map": losses})


def record_of(rgb_width: int, xyz_width: int, big: bool, image_norm: ImageNorm) -> dict[str, Any]:
    """What builds the networks again."""
    heads = {"rgb_width": rgb_width, "xyz_width": xyz_width, "big": big}
    return {"heads": heads, "vote": {"image_norm": image_norm}}


def networks_of(maps: Mappings, image_norm: ImageNorm) -> Networks:
    """The networks of a detector."""
    return {"map": maps, "vote": CfmVote(image_norm).eval()}


def build(record: Mapping[str, Any]) -> Networks:
    """Untrained networks of a record."""
    return networks_of(random_networks(**record["heads"]), record["vote"]["image_norm"])


def fused_head(detector: Detector) -> FusedHead:
    """The fused head's modules, made of the trained ones."""
    maps, vote = detector.networks["map"], detector.networks["vote"]
    assert isinstance(maps, Mappings)
    assert isinstance(vote, CfmVote)
    return mapping_head(maps, vote.combine)


def predictor(detector: Detector) -> Callable[[FrameFeatures], tuple[Tensor, Tensor]]:
    """Anomaly map and score of a frame by the fused head."""
    head = fused_head(detector)

    @torch.inference_mode()
    def predict(frame: FrameFeatures) -> tuple[Tensor, Tensor]:
        voted: tuple[Tensor, Tensor, Tensor] = head.vote(*frame_scores(frame, head, METHOD.pairs))
        return voted[:2]

    return predict


def dense(detector: Detector) -> Form:
    """CFM's published graph with these mappings."""
    maps = detector.networks["map"]
    assert isinstance(maps, Mappings)
    return published(detector, maps)


def official(folder: Path, category: str, settings: CfmSettings) -> tuple[Fitted, dict[str, WeightsInfo]]:
    """The authors' files of a category as what training would leave."""
    maps, infos = load_official(folder, category)
    big = isinstance(maps.to_xyz, BigMapping)
    record = record_of(RGB_WIDTH, XYZ_WIDTH, big, settings.image_norm)
    return Fitted(networks_of(maps, settings.image_norm), record, {}), infos


IMPLEMENTATION = Implementation(
    settings=CfmSettings,
    fit=fit,
    build=build,
    graphs=lambda detector: detector.networks,
    predictor=predictor,
    score_maps=lambda _record: ChordProduct.MAPS,
    dense=dense,
    fused=fused_head,
    load_official=official,
)
