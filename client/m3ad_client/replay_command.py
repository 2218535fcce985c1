"""`m3ad-client replay`: judge a ledger's parts again."""

from pathlib import Path
from typing import Annotated, Any

import typer
from m3ad import cli as shared
from m3ad.bundle import Bundle
from m3ad.contract import Layout
from m3ad.errors import ArtifactError, M3adError
from m3ad.ledger import Ledger
from m3ad_runtime.engine_choice import Runtime
from m3ad_runtime.pipeline import Inspector
from rich.progress import track

from m3ad_client.options import (
    Ca,
    Cert,
    Json,
    Key,
    Markdown,
    Model,
    UseTls,
    print_tables,
    tls_of,
    warn_unless_usable,
)
from m3ad_client.replay import numbers, summary, tables
from m3ad_client.replay import replay as judge_again
from m3ad_client.triton import Tls, TritonInspector


def replay(
    ledger: Annotated[
        Path, typer.Argument(metavar="LEDGER", help="`ledger.sqlite` of a station, which may be running")
    ],
    bundle: Annotated[Path | None, typer.Option(help="judge by this bundle, in this process")] = None,
    url: Annotated[str | None, typer.Option(help="judge by the Triton at HOST:PORT instead")] = None,
    model: Model = None,
    layout: Annotated[Layout | None, typer.Option(help="of the bundle; the one to ship if left out")] = None,
    runtime: Annotated[
        Runtime, typer.Option(help="of the bundle: engines on this machine's GPU or ONNX Runtime")
    ] = "auto",
    camera: Annotated[str | None, typer.Option(help="whose parts; not needed where there is one")] = None,
    last: Annotated[int | None, typer.Option(min=1, help="only so many, the newest")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="limit of reject; that of the bundle or server if left out")
    ] = None,
    review: Annotated[
        float | None, typer.Option(help="limit of review; that of the bundle or server if left out")
    ] = None,
    old_limits: Annotated[
        bool, typer.Option("--old-limits", help="hold each score against the limits its part was judged by")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="folder for pictures of the changed parts, before beside now")
    ] = None,
    at_most: Annotated[
        int, typer.Option(min=0, help="exit code 1 where more verdicts are other ones than this")
    ] = 0,
    tls: UseTls = False,
    ca: Ca = None,
    key: Key = None,
    cert: Cert = None,
    as_json: Json = False,
    markdown: Markdown = False,
) -> None:
    """Judge a ledger's parts again, by another bundle, engine or version: which verdicts change?"""
    if (bundle is None) == (url is None):
        raise typer.BadParameter("name what judges: --bundle FOLDER or --url HOST:PORT")
    if url is not None and (layout or runtime != "auto"):
        raise typer.BadParameter("--layout and --runtime are for --bundle; a server has its own")
    if tls and url is None:
        raise typer.BadParameter("--tls is for --url")
    secured = tls_of(tls, ca, key, cert)
    if old_limits and (threshold is not None or review is not None):
        raise typer.BadParameter("--old-limits takes no --threshold and no --review")
    with Ledger(ledger) as opened:
        wanted = numbers(opened, camera, last)
        with _inspector(bundle, url, model, secured, layout, runtime) as inspector:
            try:
                inspector.limits = inspector.limits.moved(threshold, review)
            except ValueError as error:
                raise typer.BadParameter(str(error)) from error
            parts = judge_again(inspector, opened, wanted, out, old_limits=old_limits)
            shown = track(parts, "judging again", len(wanted), console=shared.talk, transient=True)
            found = summary(list(shown))
            serving = inspector.serving if isinstance(inspector, TritonInspector) else inspector.runtime
            result: dict[str, Any] = {
                "ledger": str(ledger),
                "judged_by": str(bundle or url),
                "category": inspector.record.category,
                "runtime": serving,
                "limits": None
                if old_limits
                else {"reject": inspector.limits.reject, "review": inspector.limits.review},
                "at_most": at_most,
                **found,
            }
    print_tables(result, tables(result, f"{ledger} judged again by {bundle or url}"), as_json, markdown)
    if not found["replayed"]:
        raise M3adError(f"none of {found['gone']} frames is there any more, so nothing was judged again")
    if found["changed"] > at_most:
        raise M3adError(f"{found['changed']} verdicts are other ones, at most {at_most} are allowed")


def _inspector(
    bundle: Path | None,
    url: str | None,
    model: str | None,
    tls: Tls | None,
    layout: Layout | None,
    runtime: Runtime,
) -> Inspector | TritonInspector:
    if bundle is None:
        return TritonInspector(str(url), model, tls=tls)
    if model is not None:
        raise ArtifactError("--model is for --url; a bundle has one category")
    warn_unless_usable(Bundle.read(bundle))
    return Inspector.open(bundle, layout, runtime=runtime, say=shared.talk.print)
