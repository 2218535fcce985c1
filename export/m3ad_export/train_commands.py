"""Commands that make detectors: `m3ad-export train`, `methods` and `vote`."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from m3ad.bundle import require_place
from m3ad.camera import read_camera
from m3ad.cli import print_json, print_text, talk
from m3ad.errors import M3adError
from m3ad.frame_settings import Modality, PlaneRemoval, Preprocessing
from m3ad.frames import find_samples
from m3ad.holes import ZeroRule
from m3ad.method import require_lattice
from m3ad.methods import DEFAULT_METHOD, METHODS, method_named
from m3ad.rig import read_rig
from m3ad.scored import Lattice, lattice_of
from m3ad.serving import require_model_name
from m3ad.xyz import camera_of
from rich.progress import Progress

from m3ad_export.nets.configs import (
    RGB_ENCODERS,
    BnMode,
    EfficientNetConfig,
    WideResNetConfig,
    XyzEncoderConfig,
)
from m3ad_export.weights_commands import weights_path

if TYPE_CHECKING:
    from m3ad_export.train.samples import Track

Json = Annotated[bool, typer.Option("--json", help="print one JSON document on stdout")]
DataOpt = Annotated[Path, typer.Option(help="a category in MVTec 3D-AD or Eyecandies layout")]
DetectorArg = Annotated[Path, typer.Argument(metavar="DETECTOR", help="what `m3ad-export train` wrote")]
SetOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="a setting of the method, as `methods` lists them; repeat for several",
    ),
]
LatticeOpt = Annotated[
    str | None,
    typer.Option(help="which pixels are scored: all, half, or every k-th in both axes, k = 2..8"),
]
RigOpt = Annotated[Path | None, typer.Option(help="`m3ad-calibrate rig`'s file, for --plane fixed")]


def train(
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="a category in MVTec 3D-AD or Eyecandies layout")
    ],
    out: Annotated[
        Path, typer.Argument(metavar="DETECTOR", help="folder to write; an interrupted run there goes on")
    ],
    category: Annotated[
        str | None, typer.Option(help="name of the category; the data folder's if left out")
    ] = None,
    rgb_encoder: Annotated[str, typer.Option(help=f"one of {', '.join(RGB_ENCODERS)}")] = "dinov2_vits14",
    rgb_weights: Annotated[
        str, typer.Option(help="a checkpoint file, a name from `weights list`, or `random`")
    ] = "dinov2-vits14-focus",
    xyz_weights: Annotated[
        str, typer.Option(help="Point-MAE's pretrain.pth, `point-mae`, or `random`")
    ] = "random",
    teacher_weights: Annotated[
        str,
        typer.Option(help="WideResNet50-2 of CRD, TRD and BTF: a file, `wide-resnet50-2-v1`, or `random`"),
    ] = "random",
    efficientnet_weights: Annotated[
        str, typer.Option(help="EfficientNet-B5 of AST: a file, `efficientnet-b5`, or `random`")
    ] = "random",
    efficientnet_padded_for: Annotated[
        int,
        typer.Option(
            help="side in pixels that its pads are made for: 456, as published, though images of 768 come",
            min=32,
        ),
    ] = EfficientNetConfig().padded_for,
    group_size: Annotated[
        int | None, typer.Option(min=1, help="neighbours in a group; as the method was published if left out")
    ] = None,
    bn_mode: Annotated[BnMode, typer.Option(help="statistics of Point-MAE's batch norms")] = "sample",
    plane: Annotated[
        PlaneRemoval | None,
        typer.Option(
            help="background plane: none, fixed (calibrated), ransac, or corners (of CRD, TRD and AST); as the method "
            "was published if left out"
        ),
    ] = None,
    normal_size: Annotated[
        int, typer.Option(help="of TRD's Sobel operator, 3, 5 or 7: larger ones make slopes look steeper")
    ] = 5,
    rig: RigOpt = None,
    hole: Annotated[
        float | None,
        typer.Option(help="a number that stands for `not measured`, as -9999; a point with it is a hole"),
    ] = None,
    zero_rule: Annotated[
        ZeroRule,
        typer.Option(help="holes of zeros: (0, 0, 0) only, or a point with any zero coordinate (CFM)"),
    ] = "point",
    camera: Annotated[
        Path | None, typer.Option(help="a depth camera's intrinsics, where none lie beside the depth images")
    ] = None,
    lattice: LatticeOpt = None,
    method: Annotated[str, typer.Option(help="the detector's method; `methods` lists them")] = DEFAULT_METHOD,
    modality: Annotated[
        str, typer.Option(help="both, or the only one there is: rgb or xyz, of methods that run on one")
    ] = "both",
    official: Annotated[
        Path | None,
        typer.Option(
            help="folder of the authors' files, one folder a category: take these heads, train nothing"
        ),
    ] = None,
    settings: SetOpt = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="of training and of random weights; the method's own if left out"),
    ] = None,
) -> None:
    """Train a detector on a category's good parts; the encoders stay frozen."""
    from m3ad_export import weights as known
    from m3ad_export.methods import IMPLEMENTATIONS
    from m3ad_export.official_files import require_official_encoders
    from m3ad_export.training import Encoders, settings_of
    from m3ad_export.training import train as train_detector

    name = category or data.resolve().name
    require_model_name(name, "name one with --category")
    require_place(out / "detector.json")
    declared = method_named(method if modality == "both" else f"{method}_{modality}")
    chosen_lattice = _lattice(lattice) or "all"
    require_lattice(declared, chosen_lattice)
    chosen = settings_of(declared.name, _pairs(settings) | ({} if seed is None else {"seed": str(seed)}))
    if (plane == "fixed") != (rig is not None):
        raise M3adError("--plane fixed and --rig go together; calibrate the rig with: m3ad-calibrate rig")
    if rgb_encoder not in RGB_ENCODERS:
        raise M3adError(f"unknown RGB encoder {rgb_encoder!r}, expected one of {', '.join(RGB_ENCODERS)}")
    if hole is not None and not math.isfinite(hole):
        raise M3adError(
            f"--hole must be a finite number, got {hole}; NaN and infinite points are holes anyway"
        )
    try:
        preprocessing = Preprocessing(
            plane=plane or declared.plane,
            plane_coefficients=read_rig(rig).plane if rig else None,
            plane_distance_m=declared.plane_distance_m,
            hole=hole,
            zero_rule=zero_rule,
            geometry=declared.geometry,
            normal_size=normal_size,
        )
    except ValueError as error:
        raise M3adError(f"{declared.title} cannot be trained so: {error}") from error
    encoders = Encoders()
    if "rgb" in declared.encoders:
        encoder, weights = known.load_rgb_encoder(
            RGB_ENCODERS[rgb_encoder], weights_path(rgb_weights), chosen.seed
        )
        encoders = replace(encoders, rgb=encoder, rgb_weights=weights)
    if "teacher" in declared.encoders:
        teacher, weights = known.load_teacher(WideResNetConfig(), weights_path(teacher_weights), chosen.seed)
        encoders = replace(encoders, teacher=teacher, teacher_weights=weights)
    if "efficientnet" in declared.encoders:
        efficientnet, weights = known.load_efficientnet(
            EfficientNetConfig(padded_for=efficientnet_padded_for),
            weights_path(efficientnet_weights),
            chosen.seed,
        )
        encoders = replace(encoders, efficientnet=efficientnet, efficientnet_weights=weights)
    if "xyz" in declared.encoders:
        config = XyzEncoderConfig(group_size=group_size or declared.group_size, bn_mode=bn_mode)
        cloud_encoder, weights = known.load_xyz_encoder(config, weights_path(xyz_weights), chosen.seed)
        encoders = replace(encoders, xyz=cloud_encoder, xyz_weights=weights)
    fitted = None
    if official is not None:
        require_official_encoders(
            encoders.rgb.config if encoders.rgb else None,
            encoders.rgb_weights,
            encoders.xyz.config if encoders.xyz else None,
            encoders.xyz_weights,
            # a method that names its encoders fills its own memory with what they see
            None if declared.backbones else encoders.teacher_weights,
            encoders.efficientnet_weights,
        )
        load_official = IMPLEMENTATIONS[declared.name].load_official
        if load_official is None:
            raise M3adError(
                f"the authors of {declared.title} published no files; train it without --official"
            )
        fitted, infos = load_official(official, name, chosen)
        fitted.record["official"] = {part: info.to_json() for part, info in infos.items()}
        for part, info in infos.items():
            talk.print(f"{part}: {info.name}, licence: {info.licence}")
    samples = find_samples(data, "train")
    with tracked() as track:
        detector = train_detector(
            samples,
            find_samples(data, "validation"),
            encoders,
            out,
            category=name,
            method=declared.name,
            fitted=fitted,
            preprocessing=replace(
                preprocessing,
                camera=read_camera(camera) if camera else camera_of(samples[0].xyz_path),
                lattice=chosen_lattice,
            ),
            settings=chosen,
            track=track,
        )
    losses = out / "losses.png"
    told = (
        "the authors' heads" if fitted else f"losses in {losses}" if losses.exists() else "nothing is trained"
    )
    print_text(f"{out}: {declared.title}, {detector.record['category']}, {told}")


def methods(as_json: Json = False) -> None:
    """List the methods with their inputs, layouts and settings."""
    from m3ad_export.methods import IMPLEMENTATIONS

    rows: list[dict[str, Any]] = [
        {
            "name": method.name,
            "title": method.title,
            "inputs": list(method.inputs),
            "layouts": list(method.layouts),
            "group_size": method.group_size,
            "settings": asdict(IMPLEMENTATIONS[method.name].settings()),
        }
        for method in METHODS.values()
    ]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        print_text(
            f"{row['name']}: {row['title']}; {', '.join(row['layouts'])}; from {', '.join(row['inputs'])}"
        )
        print_text("    " + ", ".join(f"{name}={value}" for name, value in row["settings"].items()))


def vote(
    detector: DetectorArg,
    out: Annotated[Path, typer.Argument(metavar="REFITTED", help="folder to write")],
    data: DataOpt,
    without: Annotated[
        Modality | None,
        typer.Option(help="mask a modality out of these and all later frames: rgb to one colour, xyz flat"),
    ] = None,
    lattice: LatticeOpt = None,
    settings: SetOpt = None,
) -> None:
    """Fit a detector's vote and threshold anew: to another line's good parts, or to frames that lack a modality."""
    from m3ad_export.saved import load_detector
    from m3ad_export.training import refit

    with tracked() as track:
        refitted = refit(
            load_detector(detector),
            find_samples(data, "train"),
            find_samples(data, "validation"),
            out,
            without=without,
            lattice=_lattice(lattice),
            settings=_pairs(settings),
            track=track,
        )
    masked = f", {without} masked out" if without else ""
    print_text(f"{out}: threshold {refitted.record['threshold']['value']:.6g}{masked}")


@contextmanager
def tracked() -> "Iterator[Track]":
    """Progress bars for as long as the block runs."""
    with Progress(console=talk) as progress:
        yield lambda items, description, total: progress.track(items, total=total, description=description)


def _lattice(text: str | None) -> Lattice | None:
    """The lattice of the option, None where it is left out."""
    try:
        return None if text is None else lattice_of(text)
    except ValueError as error:
        raise M3adError(f"--{error}") from error


def _pairs(settings: list[str] | None) -> dict[str, str]:
    """NAME=VALUE options by name."""
    pairs = {}
    for text in settings or ():
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise M3adError(f"--set needs NAME=VALUE, got {text!r}; m3ad-export methods lists the names")
        pairs[name] = value
    return pairs
