"""Command `m3ad-export`: from good parts to a bundle and its engines. Options and messages; the work is elsewhere."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from m3ad.bundle import Bundle
from m3ad.cli import print_json, print_text, run, talk
from m3ad.contract import MAX_POINTS, MIN_POINTS, Layout
from m3ad.engines import Precision
from m3ad.frame_settings import Preprocessing
from m3ad.frames import find_samples, read_sample
from m3ad.preprocess import prepare
from m3ad.serving import require_model_name

from m3ad_export.train_commands import DataOpt, DetectorArg, Json, methods, train, vote
from m3ad_export.weights_commands import app as weights_app

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(weights_app, name="weights")

# Only the commands that need torch, onnx and the like import them: `build-engine` runs on boxes without torch, `doctor`
# and `sign` without any.
BundleArg = Annotated[Path, typer.Argument(metavar="BUNDLE", help="what `m3ad-export bundle` wrote")]
LayoutOpt = Annotated[Layout | None, typer.Option(help="one layout only; all there are if left out")]


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


for command in (train, methods, vote):
    app.command()(command)


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
    category: Annotated[
        str | None, typer.Option(help="another name for the category, which names its model")
    ] = None,
    as_json: Json = False,
) -> None:
    """Export to ONNX, prove parity with PyTorch, and write the bundle; a failing parity writes nothing."""
    from m3ad_export.bundle_writer import write_bundle
    from m3ad_export.graphs.parity import PARITY_POINTS
    from m3ad_export.saved import load_detector

    trained = load_detector(detector)
    trained.record["category"] = category or trained.record["category"]
    require_model_name(trained.record["category"], "name one with --category")
    sample = find_samples(data, "validation")[0]
    preprocessing = Preprocessing.from_json(trained.record["preprocessing"])
    golden = prepare(read_sample(sample, preprocessing.camera), preprocessing)
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
    image = _golden(opened, "image")
    method = opened.contract.method
    frame = None if method.geometry == "points" else {n: _golden(opened, n) for n in method.inputs}
    layouts = tuple(opened.manifest.layouts)
    deviations = check_parity(load_detector(detector), bundle / "onnx", image, layouts, frame=frame)
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
    plugins: Annotated[
        bool | None,
        typer.Option(
            "--plugins/--no-plugins",
            help="custom ops of TensorRT-RTX as plugins; where the plugin library is built if left out",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Build an engine of every stage into BUNDLE/engines/TARGET; what is up to date there stays."""
    from m3ad_export.engine import accepted, build_engines

    opened = Bundle.open(bundle)
    if accept_loss is not None:
        opened = accepted(opened, accept_loss)
    layouts = (layout,) if layout else tuple(opened.manifest.layouts)
    written = [build_engines(opened, t, precision, layouts, talk.print, plugins=plugins) for t in target]
    if as_json:
        print_json([str(folder) for folder in written])
    else:
        for folder in written:
            print_text(f"{folder}: written")


@app.command()
def sign(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="a bundle or a repository")],
    key: Annotated[
        Path, typer.Option(help="Ed25519 private key, PEM: openssl genpkey -algorithm ed25519 -out KEY")
    ],
) -> None:
    """Sign a bundle or a repository: its manifests, whose hashes cover every file, engines included.

    `--require-signature PUBKEY` of `m3ad-triton write|serve` and `m3ad-client infer` takes nothing else. What changes
    a manifest afterwards (a threshold, a rig, a gate, an engine) asks for a new signature.
    """
    from m3ad.signature import sign as write_signature

    print_text(f"{write_signature(folder, key)}: written")


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


def _golden(bundle: Bundle, name: str) -> Any:
    import numpy as np

    return np.load(bundle.file(f"golden/{name}.npy"), allow_pickle=False)


def main() -> None:
    """Entry point of `m3ad-export`."""
    run(app)
