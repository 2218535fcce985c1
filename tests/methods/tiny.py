"""Every method small enough for fast tests, with random weights; the encoders are those of `conftest`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import TINY_RGB, TINY_XYZ, make_tiny_detector, randomise
from m3ad.bundle import Bundle
from m3ad.frame_settings import Preprocessing
from m3ad.frames import find_samples, read_sample
from m3ad.methods import METHODS
from m3ad.preprocess import prepare
from m3ad.scored import Lattice
from m3ad_export.bundle_writer import write_bundle
from m3ad_export.detector import Detector
from m3ad_export.heads.bank import Bank, TwoBanks
from m3ad_export.heads.three_banks import FusionBank, ThreeBanks
from m3ad_export.methods import IMPLEMENTATIONS
from m3ad_export.sample_data import write_sample_data
from m3ad_export.saved import load_detector
from m3ad_export.training import Encoders, train

WIDTHS = {"rgb_width": TINY_RGB.token_width, "xyz_width": TINY_XYZ.token_width}
OTHERS = ("cfm", "cmdr_iad", "cmdr_iad_rgb", "cmdr_iad_xyz", "m3dm", "m3dm_uff")


def record_of(method: str) -> dict[str, Any]:
    """What builds the method's networks."""
    if method == "cfm":
        return {"heads": {**WIDTHS, "big": False}, "vote": {"image_norm": "none"}}
    if method == "m3dm":
        return {"heads": {**WIDTHS, "rgb_rows": 20, "xyz_rows": 50, "rgb_side": TINY_RGB.side}}
    if method == "m3dm_uff":
        return {"heads": {**record_of("m3dm")["heads"], "fusion_rows": 30}}
    modality = method.removeprefix("cmdr_iad").lstrip("_") or "both"
    sizes = {"heads": 2, "rgb_convs": [12, 8], "xyz_convs": [16, 12, 10, 8]}
    return {
        "heads": {**WIDTHS, **sizes, "modality": modality},
        "vote": {"fusion_smoothing": "code", "image_norm": "none"},
    }


def fill(banks: TwoBanks | ThreeBanks) -> None:
    """Rows as tokens of random encoders have them."""
    generator = torch.Generator().manual_seed(3)
    for bank in (banks.rgb, banks.xyz):
        bank.load_state_dict(Bank(torch.randn(bank.rows.shape, generator=generator)).state_dict())
        bank.find_neighbors()
    if isinstance(banks, ThreeBanks):
        fusion = banks.fusion
        width = WIDTHS["xyz_width"]
        rows = torch.randn(len(fusion.xyz_rows), width + WIDTHS["rgb_width"], generator=generator)
        fusion.load_state_dict(FusionBank(rows, width, TINY_RGB.side).state_dict())
        fusion.find_neighbors()


def make_detector(method: str, lattice: Lattice = "all") -> Detector:
    """A detector of a method, its modality's encoders alone."""
    base = make_tiny_detector(method if lattice == "all" else f"{method}_{lattice}")
    inputs = METHODS[method].inputs
    encoders = {"rgb": "image", "xyz": "points"}
    record = {
        **{key: value for key, value in base.record.items() if key not in ("heads", "voting")},
        **record_of(method),
        "method": method,
        "preprocessing": Preprocessing(lattice=lattice).to_json(),
        "encoders": {
            side: {**asdict(config), **base.record["encoders"][side]}
            for side, config in (("rgb", TINY_RGB), ("xyz", TINY_XYZ))
            if encoders[side] in inputs
        },
    }
    implementation = IMPLEMENTATIONS[method]
    networks = implementation.build(record)
    for seed, network in enumerate(networks.values()):
        randomise(network, seed + 5)
        if isinstance(network, (TwoBanks, ThreeBanks)):
            fill(network)
        network.requires_grad_(False).eval()
    rgb, xyz = base.encoders
    return Detector(
        rgb if "image" in inputs else None,
        xyz if "points" in inputs else None,
        networks,
        record,
        len(implementation.score_maps(record)),
    )


@dataclass
class Trained:
    """A category, the detector that was trained on it, and its bundle."""

    data: Path
    folder: Path
    bundle: Bundle


def trained_on_images(root: Path, method: str, encoders: Encoders, settings: Any) -> Trained:
    """A method of images from good parts to a bundle, the golden frame one of validation's."""
    write_sample_data(root / "data", train=3, validation=2, test_per_kind=1, size=128)
    train(
        find_samples(root / "data", "train"),
        find_samples(root / "data", "validation"),
        encoders,
        root / "detector",
        category="tiny",
        preprocessing=Preprocessing(plane="none"),
        settings=settings,
        method=method,
    )
    detector = load_detector(root / "detector")
    sample = find_samples(root / "data", "validation")[0]
    golden = prepare(read_sample(sample), Preprocessing.from_json(detector.record["preprocessing"]))
    write_bundle(detector, golden, root / "bundle")
    return Trained(root / "data", root / "detector", Bundle.open(root / "bundle"))
