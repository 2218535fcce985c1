"""A station that starts with its machine: a unit for systemd, and a folder that `docker build` makes an image of."""

import getpass
import json
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
from m3ad.bundle import new_folder
from m3ad.errors import ArtifactError

from m3ad_client.station import config

IMAGE = "python:3.12-slim"
WATCHDOG_S = 300
UNIT = """\
[Unit]
Description=m3ad station {name}
Wants=network-online.target
After=network-online.target
RequiresMountsFor={mounts}

[Service]
Type=notify
ExecStart={command}
User={user}
Restart=on-failure
RestartSec=5
# It says so while every camera's thread lives; opening bundles takes time, and so does the frame under way at the end.
WatchdogSec={watchdog}
TimeoutStartSec=600
TimeoutStopSec=120
SuccessExitStatus=143
CacheDirectory=m3ad
Environment=XDG_CACHE_HOME=%C/m3ad
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=strict
ProtectHome=read-only
ReadWritePaths={writable}

[Install]
WantedBy=multi-user.target
"""


def unit(settings: Path, read: config.Config) -> str:
    """The unit that runs a station as the user who asks, who can write where it has to and nowhere else.

    Args:
        settings: the configuration's file.
        read: what it says.
    """
    program = Path(sys.executable).parent / "m3ad-client"
    command = [_quoted(str(word), dollar=True) for word in (program, "station", settings.absolute())]
    writable = " ".join(_quoted(str(path)) for path, can_write in places(read).items() if can_write)
    return UNIT.format(
        name=read.store.name.replace("%", "%%"),
        mounts=writable,
        command=" ".join(command),
        user=getpass.getuser(),
        watchdog=WATCHDOG_S,
        writable=writable,
    )


def places(read: config.Config) -> dict[Path, bool]:
    """Every file and folder that a configuration names, and whether the station writes there; sinks write beside."""
    found: dict[Path, bool] = {}
    tables: list[msgspec.Struct] = [read.store, *read.cameras, *read.sinks]
    for table in [*tables, *([read.page] if read.page else [])]:
        for name, value in _paths(table):
            place = value.parent if name == "path" else value
            found[place] = found.get(place, False) or name in ("folder", "path")
    return found


def write_context(settings: Path, read: config.Config, out: Path, wheel: Path | None) -> str:
    """Write a folder that `docker build` makes an image of: Dockerfile and wheel.

    Everything that the configuration names is mounted at its own place, so that the same file serves with and without a
    container. Building fetches Python's image and packages; what it makes needs no network but its sinks'.

    Args:
        settings: the configuration's file.
        read: what it says.
        out: folder to write, new or empty.
        wheel: of m3ad, for Linux and the image's processor.

    Returns:
        The shell line that builds the image and runs it.

    Raises:
        ArtifactError: the wheel is missing, docker cannot mount a path, or `out` holds something already.
    """
    if (
        wheel is None
        or not wheel.is_file()
        or not wheel.name.startswith("m3ad-")
        or "linux" not in wheel.name
    ):
        found = "none is named" if wheel is None else f"{wheel} is none"
        raise ArtifactError(
            f"the image needs m3ad's wheel for Linux, {found}: python -m build --wheel, then --wheel FILE"
        )
    mounts = {settings.absolute(): False} | places(read)
    if odd := next((path for path in mounts if ":" in str(path)), None):
        raise ArtifactError(
            f"{odd}: docker's -v cannot mount a path with a colon in it; move or rename the folder"
        )
    kinds = {type(sink).__name__ for sink in read.sinks}
    extras = ["station", *(["opcua"] if "OpcUa" in kinds else [])]
    extras += ["sign"] if any(camera.require_signature for camera in read.cameras) else []
    lines = [
        f"FROM {IMAGE}",
        "ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1",
        f"COPY {wheel.name} /tmp/",
        f"RUN pip install --no-cache-dir '/tmp/{wheel.name}[{','.join(extras)}]'",
        f"ENTRYPOINT {json.dumps(['m3ad-client', 'station'])}",
    ]
    with new_folder(out) as folder:
        shutil.copy2(wheel, folder / wheel.name)
        (folder / "Dockerfile").write_text("\n".join(lines) + "\n", encoding="utf-8")
    name = f"m3ad-{read.store.name}".lower()
    # The host's network: the page stays on loopback, and brokers and servers have the names that they have there.
    run = ["docker", "run", "--detach", "--name", name, "--restart=unless-stopped", "--stop-timeout=120"]
    run += ["--network=host"]
    for path, can_write in mounts.items():
        run += ["-v", f"{path}:{path}{'' if can_write else ':ro'}"]
    words = shlex.join([*run, name, str(settings.absolute())])
    user = '--user "$(id -u):$(id -g)"'
    build = shlex.join(["docker", "build", "-t", name, str(out)])
    return f"{build} && {words.replace('docker run', f'docker run {user}', 1)}"


def _paths(table: msgspec.Struct) -> Iterator[tuple[str, Path]]:
    for name in table.__struct_fields__:
        value = getattr(table, name)
        if isinstance(value, Path):
            yield name, value


def _quoted(word: str, *, dollar: bool = False) -> str:
    """A word of a unit: systemd's specifiers begin with %, and its commands' variables with $."""
    plain = word.replace("\\", "\\\\").replace("%", "%%")
    plain = plain.replace("$", "$$") if dollar else plain
    return f'"{plain.replace(chr(34), chr(92) + chr(34))}"' if any(c in plain for c in " \t'\"\\;") else plain
