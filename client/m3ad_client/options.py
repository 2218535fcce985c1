"""Options that several commands take, and what they share around a result: TLS files, a warning, its tables."""

from pathlib import Path
from typing import Annotated, Any

import typer
from m3ad import cli as shared
from m3ad.bundle import Bundle
from m3ad.errors import ArtifactError

from m3ad_client.report import Table
from m3ad_client.triton import Tls

Paths = Annotated[
    list[Path], typer.Argument(metavar="RGB XYZ | FOLDER", help="one frame's two files, or a folder")
]
Split = Annotated[str, typer.Option(help="train, validation or test, when the folder has splits")]
Model = Annotated[str | None, typer.Option(help="the category to use; not needed when the server has one")]
UseTls = Annotated[bool, typer.Option("--tls", help="connect over TLS")]
Ca = Annotated[Path | None, typer.Option(help="certificate authority to trust", exists=True)]
Key = Annotated[Path | None, typer.Option(help="client key", exists=True)]
Cert = Annotated[Path | None, typer.Option(help="client certificate", exists=True)]
Timeout = Annotated[float, typer.Option(help="for each request")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document on stdout")]
Markdown = Annotated[bool, typer.Option("--markdown", help="print Markdown tables")]
DEFAULT_URL = "localhost:8001"


def tls_of(use: bool, ca: Path | None, key: Path | None, cert: Path | None) -> Tls | None:
    """What `--tls`, `--ca`, `--key` and `--cert` say together."""
    if not use and (ca or key or cert):
        raise typer.BadParameter("--ca, --key and --cert need --tls")
    if (key is None) != (cert is None):
        raise typer.BadParameter("--key and --cert go together")
    return Tls(ca=ca, key=key, cert=cert) if use else None


def warn_unless_usable(bundle: Bundle) -> None:
    """Say so when a bundle did not pass its gate."""
    try:
        bundle.verify_usable()
    except ArtifactError as error:
        shared.talk.print(f"warning: {error}")


def print_tables(result: dict[str, Any], tables: list[Table], as_json: bool, markdown: bool) -> None:
    """Print a result as one JSON document, as Markdown or for a terminal."""
    if as_json:
        shared.print_json(result)
    elif markdown:
        shared.print_text("\n".join(table.to_markdown() for table in tables))
    else:
        console = shared.plain_console()
        for table in tables:
            console.print(table.to_rich(), "", soft_wrap=False)
