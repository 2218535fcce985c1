"""The command `robustness` of `m3ad-calibrate`."""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from m3ad.bundle import Bundle, require_place
from m3ad.cli import print_json, print_text, talk
from m3ad.frames import Sample, find_samples, read_sample
from m3ad.preprocess import with_holes
from m3ad.serving import weights_line
from m3ad_runtime.pipeline import Inspector

from m3ad_calibrate.disturb import DISTURBANCES
from m3ad_calibrate.gate import onnx_digest

app = typer.Typer()


@app.command()
def robustness(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="what `m3ad-export bundle` wrote")],
    data: Annotated[
        Path, typer.Option(help="a category in MVTec 3D-AD or Eyecandies layout; its test split")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="JSON, Markdown and PNG to write; BUNDLE/../robustness if left out"),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="a disturbance by name, as in the table; repeat for several")
    ] = None,
    frames: Annotated[
        int | None, typer.Option(min=1, help="good and as many defective frames; all if left out")
    ] = None,
    auroc_drop: Annotated[
        float, typer.Option(min=0, max=1, help="how much lower image AUROC may be where a level holds")
    ] = 0.01,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document on stdout")] = False,
) -> None:
    """Disturb the test split step by step (light, optics, sensor, mounting) and say up to where verdicts hold."""
    from m3ad_calibrate.robustness import document, measure, told
    from m3ad_calibrate.robustness_report import save_report

    names = [each.name for each in DISTURBANCES]
    if unknown := [name for name in only or () if name not in names]:
        raise typer.BadParameter(f"--only {unknown[0]} is unknown, expected one of {', '.join(names)}")
    opened = Bundle.open(bundle)
    place = out or bundle.resolve().parent / "robustness"
    require_place(place.with_suffix(".json"))
    place.parent.mkdir(parents=True, exist_ok=True)
    inspector = Inspector(opened)
    samples = _picked(find_samples(data, "test"), frames)
    read = [
        (with_holes(read_sample(s, inspector.preprocessing.camera), inspector.preprocessing), s.is_good)
        for s in samples
    ]
    wanted = [each for each in DISTURBANCES if not only or each.name in only]
    undisturbed, found = measure(inspector, read, wanted, auroc_drop, talk.print)
    about = {
        "category": opened.name,
        "method": opened.manifest.method,
        "precision": opened.precision,
        "weights": weights_line(opened.manifest.encoders, opened.manifest.official),
        "onnx_sha256": onnx_digest(opened),
    }
    goods = [good for _, good in read]
    report = document(about, inspector.limits.reject, auroc_drop, goods, undisturbed, found)
    files = save_report(report, place)
    if as_json:
        print_json(report)
        return
    print_text(f"undisturbed, {len(read)} frames: {told(undisturbed)}")
    for each in found:
        print_text(each.sentence())
    print_text(f"report: {', '.join(map(str, files))}")


def _picked(samples: list[Sample], count: int | None) -> list[Sample]:
    """All samples, or `count` good and `count` defective ones, evenly from the list."""
    if count is None:
        return samples
    chosen = []
    for group in ([s for s in samples if s.is_good], [s for s in samples if not s.is_good]):
        chosen += [
            group[i] for i in sorted({round(i) for i in np.linspace(0, len(group) - 1, count)}) if group
        ]
    return chosen
