"""A detector small enough for fast tests, and bundles made from it by the real export."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from m3ad.bundle import Bundle
from m3ad.frame_settings import Preprocessing
from m3ad.preprocess import ModelInput
from m3ad_export.bundle_writer import write_bundle
from m3ad_export.detector import Detector
from m3ad_export.graphs.parity import parity_inputs
from m3ad_export.heads.mentor import HeadConfig, heads_from_config
from m3ad_export.heads.voting import Vm, VotingConfig, map_names
from m3ad_export.nets.configs import RgbEncoderConfig, XyzEncoderConfig
from m3ad_export.nets.point_mae import PointMaeEncoder
from m3ad_export.nets.vit import VisionTransformer
from m3ad_plugins import ops

pytest_plugins = ["serving", "gpu_engines", "stations"]

TINY_RGB = RgbEncoderConfig(
    name="tiny", patch_size=28, width=24, depth=2, heads=2, blocks=(0, 1), final_norm=True
)
TINY_XYZ = XyzEncoderConfig(name="tiny", width=24, depth=2, heads=2, blocks=(0, 1), groups=64, group_size=16)


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Give every parameter, norms' affine included, values that no identity hides behind."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            fan = parameter[0].numel() if parameter.ndim > 1 else 25
            is_gain = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(noise / fan**0.5 + (1.0 if is_gain else 0.0))


def make_tiny_detector(category: str = "tiny") -> Detector:
    """Every part of the real detector, two blocks deep and 24 wide, with random weights."""
    config = HeadConfig(rgb_width=TINY_RGB.token_width, xyz_width=TINY_XYZ.token_width, mentor_width=16)
    mfm, mgm = heads_from_config(config)
    rgb, xyz, vm = VisionTransformer(TINY_RGB), PointMaeEncoder(TINY_XYZ), Vm(VotingConfig())
    for seed, module in enumerate((rgb, xyz, mfm, mgm)):
        randomise(module, seed)
        module.eval()
    vm.baseline = torch.rand(vm.baseline.shape, generator=torch.Generator().manual_seed(0)) + 0.5
    random = {"kind": "random", "sha256": "0" * 64, "licence": "none", "note": "tests"}
    record = {
        "method": "mentor3ad",
        "category": category,
        "encoders": {
            "rgb": {"name": "tiny", "weights": {"name": "tiny", **random}},
            "xyz": {"name": "tiny", "weights": {"name": "tiny", **random}},
        },
        "heads": asdict(config),
        "voting": asdict(VotingConfig()),
        "preprocessing": Preprocessing().to_json(),
        "threshold": {"value": 0.01},
    }
    networks = {"mfm": mfm, "mgm": mgm, "vm": vm.eval()}
    return Detector(rgb, xyz, networks, record, len(map_names(vm.config)))


def make_input(points: int, seed: int = 0) -> ModelInput:
    """A prepared frame with this many foreground points."""
    image = np.random.default_rng(seed).normal(size=(1, 3, 224, 224)).astype(np.float32)
    return ModelInput(**parity_inputs(points, image))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For networks so small that a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def sampled_by(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The pixels by which each call of the ops samples, in order."""
    pixels: list[np.ndarray] = []
    sample = ops.point_group

    def point_group(*arguments: Any) -> tuple[np.ndarray, ...]:
        *_, point_pixel = arguments
        pixels.append(point_pixel)
        return sample(*arguments)

    monkeypatch.setattr(ops, "point_group", point_group)
    return pixels


@pytest.fixture(scope="session")
def tiny_detector() -> Detector:
    return make_tiny_detector()


@pytest.fixture(scope="session")
def tiny_bundle(tiny_detector: Detector, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Both layouts, exported for real; tests that change it copy it first."""
    path: Path = tmp_path_factory.mktemp("bundle") / "tiny"
    write_bundle(
        tiny_detector, make_input(3000), path, layouts=("chain", "fused"), parity_points=(1024, 1025)
    )
    return Bundle.open(path)
