"""Command `m3ad-export`: from good parts to a bundle and its engines. Options and messages; the work is elsewhere."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from m3ad.bundle import Bundle
from m3ad.cli import print_json, print_text, run, talk
from m3ad.contract import LAYOUTS, MAX_POINTS, MIN_POINTS, Layout
from m3ad.errors import M3adError
from m3ad.frames import find_samples, read_sample
from m3ad.holes import ZeroRule
from m3ad.preprocess import Modality, PlaneRemoval, Preprocessing, prepare
from m3ad.rig import read_rig
from m3ad_plugins import ops
from rich.progress import Progress

from m3ad_export import weights as known
from m3ad_export.graphs.precision import Precision
from m3ad_export.nets.point_mae import BnMode, XyzEncoderConfig
from m3ad_export.nets.vit import RGB_ENCODERS
from m3ad_export.train.fit import TrainConfig
from m3ad_export.train.fit_vote import Track
from m3ad_export.weights_commands import app as weights_app
from m3ad_export.weights_commands import weights_path

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(weights_app, name="weights")

DEFAULTS = TrainConfig()

Json = Annotated[bool, typer.Option("--json", help="print one JSON document on stdout")]
BundleArg = Annotated[Path, typer.Argument(metavar="BUNDLE", help="what `m3ad-export bundle` wrote")]
DetectorArg = Annotated[Path, typer.Argument(metavar="DETECTOR", help="what `m3ad-export train` wrote")]
DataOpt = Annotated[Path, typer.Option(help="a category in MVTec 3D-AD or Eyecandies layout")]
LayoutOpt = Annotated[Layout | None, typer.Option(help="one layout only; both if left out")]
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
        int, typer.Option(min=1, help="neighbours in a group: 32 (paper) or 128 (CFM)")
    ] = 32,
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
    align_steps: Annotated[int, typer.Option(min=1, help="of stage 1, MFM")] = DEFAULTS.align_steps,
    guide_steps: Annotated[int, typer.Option(min=1, help="of stage 2, MGM")] = DEFAULTS.guide_steps,
    expected_frames: Annotated[
        int,
        typer.Option(
            min=0, help="good frames that show what to expect at each pixel; 12 for parts in a fixture"
        ),
    ] = DEFAULTS.expected_frames,
    seed: Annotated[int, typer.Option(min=0, help="of training and of random weights")] = 0,
) -> None:
    """Train the heads of a category on its good parts; the encoders stay frozen."""
    from m3ad_export.train.fit import Encoders
    from m3ad_export.train.fit import train as train_detector

    if (plane == "fixed") != (rig is not None):
        raise M3adError("--plane fixed and --rig go together; calibrate the rig with: m3ad-calibrate rig")
    if rgb_encoder not in RGB_ENCODERS:
        raise M3adError(f"unknown RGB encoder {rgb_encoder!r}, expected one of {', '.join(RGB_ENCODERS)}")
    if hole is not None and not math.isfinite(hole):
        raise M3adError(
            f"--hole must be a finite number, got {hole}; NaN and infinite points are holes anyway"
        )
    rgb = known.load_rgb_encoder(RGB_ENCODERS[rgb_encoder], weights_path(rgb_weights), seed)
    xyz = known.load_xyz_encoder(
        XyzEncoderConfig(group_size=group_size, bn_mode=bn_mode), weights_path(xyz_weights), seed
    )
    with tracked() as track:
        detector = train_detector(
            find_samples(data, "train"),
            find_samples(data, "validation"),
            Encoders(*rgb, *xyz),
            out,
            ops,
            category=category or data.resolve().name,
            preprocessing=Preprocessing(
                plane=plane,
                plane_coefficients=read_rig(rig).plane if rig else None,
                hole=hole,
                zero_rule=zero_rule,
            ),
            config=TrainConfig(
                seed=seed,
                align_steps=align_steps,
                guide_steps=guide_steps,
                expected_frames=expected_frames,
            ),
            track=track,
        )
    print_text(f"{out}: {detector.record['category']}, losses in {out / 'losses.png'}")


@app.command()
def vote(
    detector: DetectorArg,
    out: Annotated[Path, typer.Argument(metavar="REFITTED", help="folder to write")],
    data: DataOpt,
    without: Annotated[
        Modality | None,
        typer.Option(help="mask a modality out of these and all later frames: rgb to one colour, xyz flat"),
    ] = None,
    expected_frames: Annotated[
        int | None, typer.Option(min=0, help="as in `train`; as many as DETECTOR has if left out")
    ] = None,
) -> None:
    """Fit a trained detector's vote anew: to another line's good parts, or to frames that lack a modality."""
    from m3ad_export.detector import load_detector
    from m3ad_export.train.fit_vote import refit_vote

    with tracked() as track:
        refitted = refit_vote(
            load_detector(detector),
            find_samples(data, "train"),
            find_samples(data, "validation"),
            out,
            ops,
            without=without,
            expected_frames=expected_frames,
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
    from m3ad_export.detector import load_detector
    from m3ad_export.graphs.parity import PARITY_POINTS

    trained = load_detector(detector)
    sample = find_samples(data, "validation")[0]
    golden = prepare(read_sample(sample), Preprocessing.from_json(trained.record["preprocessing"]))
    deviations = write_bundle(
        trained,
        golden,
        out,
        ops,
        layouts=(layout,) if layout else LAYOUTS,
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
    from m3ad_export.detector import load_detector
    from m3ad_export.graphs.parity import check_parity, summary, verify_parity

    opened = Bundle.open(bundle)
    image = _golden_image(opened)
    layouts = tuple(opened.manifest.layouts)
    deviations = check_parity(load_detector(detector), bundle / "onnx", ops, image, layouts)
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
def tracked() -> Iterator[Track]:
    """Progress bars for as long as the block runs."""
    with Progress(console=talk) as progress:
        yield lambda items, description, total: progress.track(items, total=total, description=description)


def _golden_image(bundle: Bundle) -> Any:
    import numpy as np

    return np.load(bundle.file("golden/image.npy"), allow_pickle=False)


def main() -> None:
    """Entry point of `m3ad-export`."""
    run(app)
