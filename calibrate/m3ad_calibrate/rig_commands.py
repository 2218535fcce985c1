"""The commands `rig` and `drift` of `m3ad-calibrate`."""

from pathlib import Path
from typing import Annotated

import typer
from m3ad.bundle import Bundle, require_place
from m3ad.cli import print_json, print_text, talk
from m3ad.errors import ArtifactError, M3adError
from m3ad.frame_settings import Preprocessing
from m3ad.frames import find_pairs, find_samples, read_sample
from m3ad.preprocess import with_holes
from m3ad.rig import Rig, drift, fit_rig

app = typer.Typer()
MAX_FRAMES = 32
POOR_COVERAGE = 0.5


@app.command("rig")
def rig_command(
    data: Annotated[
        Path, typer.Option(help="a category, whose good training frames are used, or a folder of frames")
    ],
    out: Annotated[
        Path, typer.Option(help="JSON file to write, for `m3ad-export train --plane fixed --rig`")
    ] = Path("rig.json"),
    hole: Annotated[
        float | None, typer.Option(help="a number that stands for `not measured`, as in `m3ad-export train`")
    ] = None,
    bundle: Annotated[Path | None, typer.Option(help="also write it into this bundle's manifest")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document on stdout")] = False,
) -> None:
    """Find the plane that parts lie on from empty or good frames, and how far and how well it is seen."""
    opened = Bundle.open(bundle) if bundle else None
    require_place(out)
    samples = find_samples(data, "train") if (data / "train").is_dir() else find_pairs(data)
    step = -(-len(samples) // MAX_FRAMES)
    settings = Preprocessing(hole=hole)
    rig = fit_rig([with_holes(read_sample(sample), settings) for sample in samples[::step]])
    rig.write(out)
    if opened:
        opened.update(rig=rig.to_json())
    if as_json:
        print_json(rig.to_json())
        return
    print_text(
        f"{out}: plane {', '.join(f'{c:.5f}' for c in rig.plane)}, {rig.distance_m * 1e3:.1f} mm from the sensor; the "
        f"borders of {len(rig.frames)} frames lie {rig.residual_m * 1e3:.2f} mm off it; at least "
        f"{rig.coverage:.0%} of the pixels have a point"
    )
    if rig.coverage < POOR_COVERAGE:
        talk.print(
            f"only {rig.coverage:.0%} of the pixels have a point: look at exposure and working distance"
        )
    if rig.left_out:
        print_text(f"left out, their plane or what they measure is another: {', '.join(rig.left_out)}")


@app.command("drift")
def drift_command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="a bundle that holds a rig")],
    frames: Annotated[Path, typer.Argument(metavar="FRAMES", help="a folder of later frames")],
) -> None:
    """Warn of frames that no longer fit the rig; exit code 1 when there are some."""
    opened = Bundle.open(bundle)
    if opened.manifest.rig is None:
        raise ArtifactError(
            f"{bundle} holds no rig; calibrate one: m3ad-calibrate rig --data FRAMES --bundle {bundle}"
        )
    rig = Rig.from_json(opened.manifest.rig, str(bundle))
    settings = opened.preprocessing
    samples = find_pairs(frames)
    drifted = 0
    for sample in samples:
        frame = with_holes(read_sample(sample, settings.camera), settings)
        found = drift(rig, frame)
        drifted += bool(found)
        for line in found:
            talk.print(f"{frame.name}: {line}")
    if drifted:
        raise M3adError(
            f"{drifted} of {len(samples)} frames no longer fit the rig; look at camera and support, then calibrate it "
            f"again: m3ad-calibrate rig"
        )
    print_text(f"{len(samples)} frames fit the rig")
