"""Command `m3ad-export`: from good parts to a bundle and its engines. Options and messages; the work is elsewhere."""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from m3ad.bundle import Bundle
from m3ad.cli import print_json, print_text, run, talk
from m3ad.contract import MAX_POINTS, MIN_POINTS, Layout
from m3ad.errors import M3adError
from m3ad.frames import find_samples, read_sample
from m3ad.holes import ZeroRule
from m3ad.methods import METHODS, method_named
from m3ad.preprocess import Modality, PlaneRemoval, Preprocessing, prepare
from m3ad.rig import read_rig
from rich.progress import Progress

from m3ad_export.graphs.precision import Precision
from m3ad_export.nets.configs import RGB_ENCODERS, BnMode, XyzEncoderConfig
from m3ad_export.weights_commands import app as weights_app
from m3ad_export.weights_commands import weights_path

if TYPE_CHECKING:
    from m3ad_export.train.samples import Track

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(weights_app, name="weights")

# Only the commands that need these import them: `build-engine` and `doctor` run on boxes without torch.
NEEDED_TO_EXPORT = ("torch", "onnxscript", "sklearn", "matplotlib", "onnxruntime")

Json = Annotated[bool, typer.Option("--json", help="print one JSON document on stdout")]
BundleArg = Annotated[Path, typer.Argument(metavar="BUNDLE", help="what `m3ad-export bundle` wrote")]
DetectorArg = Annotated[Path, typer.Argument(metavar="DETECTOR", help="what `m3ad-export train` wrote")]
DataOpt = Annotated[Path, typer.Option(help="a category in MVTec 3D-AD or Eyecandies layout")]
LayoutOpt = Annotated[Layout | None, typer.Option(help="one layout only; all there are if left out")]
SetOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="a setting of the method, as `methods` lists them; repeat for several",
    ),
]
RigOpt = Annotated[Path | None, typer.Option(help="`m3ad-calibrate rig`'s file, for --plane fixed")]


@app.command("sample-data")
def sample_data(
    out: Annotated[Path, typer.Argument(help="folder to write; an older sample category there is replaced")],
    seed: Annotated[int, typer.Option(min=0, help="of everything that varies")] = 0,
    train_parts: Annotated[int, typer.Option("--train", min=1, help="good parts to train on")] = 24,
    validation_parts: Annotated[
        int, typer.Option("--validation", min=1, help="good parts for the threshold")
    ] = 8,
    test_per_kind: Annotated[int, typer.Option(min=1, help="test parts: good, geometry, colour, both")] = 6,
    size: Annotated[int, typer.Option(min=128, help="side of the frames in pixels")] = 256,
) -> None:
    """Make a procedural category: textured parts with a height field, defects in geometry, colour and both."""
    from m3ad_export.sample_data import write_sample_data

    write_sample_data(
        out, seed=seed, train=train_parts, validation=validation_parts, test_per_kind=test_per_kind, size=size
    )
    print_text(
        f"{out}: {train_parts} training, {validation_parts} validation and {4 * test_per_kind} test parts"
    )


@app.command()
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
    group_size: Annotated[
        int | None, typer.Option(min=1, help="neighbours in a group; as the method was published if left out")
    ] = None,
    bn_mode: Annotated[BnMode, typer.Option(help="statistics of Point-MAE's batch norms")] = "sample",
    plane: Annotated[
        PlaneRemoval, typer.Option(help="background plane: none, fixed (calibrated) or ransac")
    ] = "none",
    rig: RigOpt = None,
    hole: Annotated[
        float | None,
        typer.Option(help="a number that stands for `not measured`, as -9999; a point with it is a hole"),
    ] = None,
    zero_rule: Annotated[
        ZeroRule,
        typer.Option(help="holes of zeros: (0, 0, 0) only, or a point with any zero coordinate (CFM)"),
    ] = "point",
    method: Annotated[
        str, typer.Option(help="cfm, cmdr_iad or mentor3ad; `methods` tells more")
    ] = "mentor3ad",
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
    from m3ad_export.training import Encoders, settings_of
    from m3ad_export.training import train as train_detector

    declared = method_named(method if modality == "both" else f"{method}_{modality}")
    chosen = settings_of(declared.name, _pairs(settings) | ({} if seed is None else {"seed": str(seed)}))
    if (plane == "fixed") != (rig is not None):
        raise M3adError("--plane fixed and --rig go together; calibrate the rig with: m3ad-calibrate rig")
    if rgb_encoder not in RGB_ENCODERS:
        raise M3adError(f"unknown RGB encoder {rgb_encoder!r}, expected one of {', '.join(RGB_ENCODERS)}")
    if hole is not None and not math.isfinite(hole):
        raise M3adError(
            f"--hole must be a finite number, got {hole}; NaN and infinite points are holes anyway"
        )
    name = category or data.resolve().name
    encoders = Encoders()
    if "image" in declared.inputs:
        encoder, weights = known.load_rgb_encoder(
            RGB_ENCODERS[rgb_encoder], weights_path(rgb_weights), chosen.seed
        )
        encoders = replace(encoders, rgb=encoder, rgb_weights=weights)
    if "points" in declared.inputs:
        config = XyzEncoderConfig(group_size=group_size or declared.group_size, bn_mode=bn_mode)
        cloud_encoder, weights = known.load_xyz_encoder(config, weights_path(xyz_weights), chosen.seed)
        encoders = replace(encoders, xyz=cloud_encoder, xyz_weights=weights)
    fitted = None
    if official is not None:
        load_official = IMPLEMENTATIONS[declared.name].load_official
        if load_official is None:
            raise M3adError(
                f"the authors of {declared.title} published no files; train it without --official"
            )
        fitted, infos = load_official(official, name, chosen)
        for part, info in infos.items():
            talk.print(f"{part}: {info.name}, licence: {info.licence}")
    with tracked() as track:
        detector = train_detector(
            find_samples(data, "train"),
            find_samples(data, "validation"),
            encoders,
            out,
            category=name,
            method=declared.name,
            fitted=fitted,
            preprocessing=Preprocessing(
                plane=plane,
                plane_coefficients=read_rig(rig).plane if rig else None,
                hole=hole,
                zero_rule=zero_rule,
            ),
            settings=chosen,
            track=track,
        )
    told = "the authors' heads" if fitted else f"losses in {out / 'losses.png'}"
    print_text(f"{out}: {declared.title}, {detector.record['category']}, {told}")


@app.command()
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


@app.command()
def vote(
    detector: DetectorArg,
    out: Annotated[Path, typer.Argument(metavar="REFITTED", help="folder to write")],
    data: DataOpt,
    without: Annotated[
        Modality | None,
        typer.Option(help="mask a modality out of these and all later frames: rgb to one colour, xyz flat"),
    ] = None,
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
            settings=_pairs(settings),
            track=track,
        )
    masked = f", {without} masked out" if without else ""
    print_text(f"{out}: threshold {refitted.record['threshold']['value']:.6g}{masked}")


@app.command()
def bundle(
    detector: DetectorArg,
    out: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="folder to write; an older bundle there is replaced")
    ],
    data: DataOpt,
    layout: LayoutOpt = None,
    points: Annotated[
        list[int] | None, typer.Option(min=MIN_POINTS, max=MAX_POINTS, help="cloud sizes to prove parity for")
    ] = None,
    as_json: Json = False,
) -> None:
    """Export to ONNX, prove parity with PyTorch, and write the bundle; a failing parity writes nothing."""
    from m3ad_export.bundle_writer import write_bundle
    from m3ad_export.graphs.parity import PARITY_POINTS
    from m3ad_export.saved import load_detector

    trained = load_detector(detector)
    sample = find_samples(data, "validation")[0]
    golden = prepare(read_sample(sample), Preprocessing.from_json(trained.record["preprocessing"]))
    deviations = write_bundle(
        trained,
        golden,
        out,
        layouts=(layout,) if layout else (),
        parity_points=tuple(points or PARITY_POINTS),
        say=talk.print,
    )
    if as_json:
        print_json(Bundle.open(out).document)
        return
    for deviation in deviations:
        if deviation.value == "anomaly_map":
            print_text(str(deviation))
    print_text(f"{out}: written")


@app.command()
def parity(detector: DetectorArg, bundle: BundleArg, as_json: Json = False) -> None:
    """Run the same inputs through PyTorch and ONNX Runtime, stage by stage and end to end."""
    from m3ad_export.graphs.parity import check_parity, summary, verify_parity
    from m3ad_export.saved import load_detector

    opened = Bundle.open(bundle)
    image = _golden_image(opened)
    layouts = tuple(opened.manifest.layouts)
    deviations = check_parity(load_detector(detector), bundle / "onnx", image, layouts)
    if as_json:
        print_json(summary(deviations))
    else:
        for deviation in deviations:
            print_text(str(deviation))
    verify_parity(deviations)


@app.command("build-engine")
def build_engine(
    bundle: BundleArg,
    target: Annotated[
        list[str], typer.Option(help="sm86, sm89, sm120.. (TensorRT-RTX, no GPU needed) or native")
    ],
    precision: Annotated[
        Precision | None,
        typer.Option(help="of the matrix products; fp16 if left out, a quantized bundle's own"),
    ] = None,
    layout: LayoutOpt = None,
    accept_loss: Annotated[
        str | None,
        typer.Option(metavar="'NAME: REASON'", help="build a quantized bundle whose gate failed; recorded"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Build an engine of every stage into BUNDLE/engines/TARGET."""
    from m3ad_export.engine import accepted, build_engines

    opened = Bundle.open(bundle)
    if accept_loss is not None:
        opened = accepted(opened, accept_loss)
    layouts = (layout,) if layout else tuple(opened.manifest.layouts)
    written = [build_engines(opened, t, precision, layouts, talk.print) for t in target]
    if as_json:
        print_json([str(folder) for folder in written])
    else:
        for folder in written:
            print_text(f"{folder}: written")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say in one line each what this machine has and lacks; exit code 1 when something is missing."""
    from m3ad_export.doctor import findings

    found = findings()
    if as_json:
        print_json([asdict(finding) for finding in found])
    else:
        for finding in found:
            print_text(f"{'ok  ' if finding.is_well else 'MISS'} {finding}")
    if not all(finding.is_well for finding in found):
        raise typer.Exit(1)


@contextmanager
def tracked() -> "Iterator[Track]":
    """Progress bars for as long as the block runs."""
    with Progress(console=talk) as progress:
        yield lambda items, description, total: progress.track(items, total=total, description=description)


def _pairs(settings: list[str] | None) -> dict[str, str]:
    """NAME=VALUE options by name."""
    pairs = {}
    for text in settings or ():
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise M3adError(f"--set needs NAME=VALUE, got {text!r}; m3ad-export methods lists the names")
        pairs[name] = value
    return pairs


def _golden_image(bundle: Bundle) -> Any:
    import numpy as np

    return np.load(bundle.file("golden/image.npy"), allow_pickle=False)


def main() -> None:
    """Entry point of `m3ad-export`."""
    try:
        run(app)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in NEEDED_TO_EXPORT:
            raise
        typer.echo(
            f"error: {missing} is not installed, this command needs it: pip install 'm3ad[export]'", err=True
        )
        sys.exit(1)
