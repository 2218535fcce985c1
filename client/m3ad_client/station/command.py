"""`m3ad-client station`: run a station."""

from pathlib import Path
from typing import Annotated

import typer
from m3ad import cli as shared
from m3ad.errors import M3adError
from m3ad.systemd import tell_systemd

from m3ad_client.station import deploy
from m3ad_client.station.config import read_config
from m3ad_client.station.station import Station

app = typer.Typer()


@app.command()
def station(
    settings: Annotated[Path, typer.Argument(metavar="STATION.toml", help="its configuration")],
    check: Annotated[
        bool, typer.Option("--check", help="look at the configuration and open everything, no more")
    ] = False,
    once: Annotated[
        bool, typer.Option("--once", help="judge and deliver what lies there now, then end")
    ] = False,
    revive: Annotated[
        list[str] | None, typer.Option(help="queue the dead letters of this sink again; repeat for several")
    ] = None,
    unit: Annotated[bool, typer.Option("--unit", help="print a unit for systemd, no more")] = False,
    container: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="write a folder for `docker build`, and print how to run it"),
    ] = None,
    wheel: Annotated[Path | None, typer.Option(help="with --container: m3ad's wheel for the image")] = None,
) -> None:
    """Watch folders, judge each part once, remember it and tell the plant; runs until it is ended (Ctrl-C, SIGTERM)."""
    read = read_config(settings)
    if unit or container:
        shared.print_text(
            deploy.write_context(settings, read, container, wheel)
            if container
            else deploy.unit(settings, read)
        )
        return
    for name in revive or ():
        if name not in [sink.name for sink in read.sinks]:
            raise typer.BadParameter(f"--revive {name} is no sink of {settings}")
    opened = Station(read, shared.say)
    try:
        for name in revive or ():
            shared.talk.print(f"sink {name}: {opened.ledger.revive(name)} dead letters are queued again")
        if check:
            cameras, sinks = len(read.cameras), len(read.sinks)
            shared.talk.print(
                f"{settings} is sound: {cameras} cameras, {sinks} sinks, ledger {opened.ledger.path}"
            )
        elif once:
            opened.once()
        else:
            with opened.running():
                page = f", its page {opened.web.url}" if opened.web else ""
                shared.say(f"station {read.store.name} runs; its ledger is {opened.ledger.path}{page}")
                tell_systemd("READY=1")
                while True:
                    if ended := opened.ended():
                        raise M3adError(
                            f"{', '.join(ended)} ended, which is a bug: please report it with the log, and start the "
                            "station again; frames and verdicts are kept"
                        )
                    if opened.is_alive():
                        tell_systemd("WATCHDOG=1")
                    opened.stop.wait(deploy.WATCHDOG_S / 10)
    finally:
        opened.close()
