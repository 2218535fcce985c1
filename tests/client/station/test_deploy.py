"""The unit as systemd itself reads it, the container's recipe, and what a station says of itself."""

import contextlib
import itertools
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from m3ad_client.cli import app
from m3ad_client.station import deploy, station
from m3ad_client.station.config import read_config
from m3ad_client.station.station import Station
from stations import PAGE, TOKEN
from typer.testing import CliRunner

ANALYZE = shutil.which("systemd-analyze")
MORE = (
    '[[sink]]\nkind = "opcua"\nname = "plc"\nurl = "opc.tcp://plc:4840"\n'
    '[[sink]]\nkind = "webhook"\nname = "mes"\nurl = "https://mes/x"\nsecret_file = "secret"\n'
)


def run(*words: object) -> str:
    result = CliRunner().invoke(app, ["station", *map(str, words)])
    assert result.exit_code == 0, result.output or result.exception
    return result.stdout


@pytest.fixture
def odd(settings: Callable[..., Path], tmp_path: Path) -> Path:
    """A configuration in a folder whose name systemd and shells would read otherwise."""
    folder = tmp_path / "50% off $HOME"
    folder.mkdir()
    (folder / "station.toml").write_text(settings(more=MORE + PAGE).read_text())
    return folder / "station.toml"


def test_the_unit_starts_this_station_and_writes_where_it_has_to(
    settings: Callable[..., Path], tmp_path: Path
) -> None:
    path = settings(more=PAGE)
    text = run(path, "--unit")
    values = dict(re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE))
    assert shlex.split(values["ExecStart"]) == [
        f"{Path(sys.executable).parent}/m3ad-client",
        "station",
        str(path),
    ]
    writable = {str(tmp_path), str(tmp_path / "station"), str(tmp_path / "left")}
    assert {*shlex.split(values["ReadWritePaths"])} == writable
    assert (values["Type"], values["Restart"]) == ("notify", "on-failure")
    assert values["SuccessExitStatus"] == str(128 + signal.SIGTERM)
    assert not (tmp_path / "station").exists()  # nothing was opened


@pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed: apt-get install systemd")
def test_systemd_finds_nothing_wrong_with_the_unit(odd: Path, tmp_path: Path) -> None:
    unit = tmp_path / "m3ad-station.service"
    unit.write_text(run(odd, "--unit"))
    done = subprocess.run(
        [str(ANALYZE), "verify", "--man=no", unit], capture_output=True, text=True, check=False
    )
    told = [line for line in done.stderr.splitlines() if "m3ad-station" in line]
    assert (told, done.returncode) == ([], 0), done.stderr
    unit.write_text(unit.read_text().replace("Restart=on-failure", "Restart=sometimes"))
    done = subprocess.run(
        [str(ANALYZE), "verify", "--man=no", unit], capture_output=True, text=True, check=False
    )
    assert "sometimes" in done.stderr  # it does look


def test_the_container_has_the_wheel_and_sees_every_place(odd: Path, tmp_path: Path) -> None:
    wheel = tmp_path / "m3ad-0.1.0-py3-none-linux_x86_64.whl"
    wheel.write_bytes(b"wheel")
    line = run(odd, "--container", tmp_path / "image", "--wheel", wheel)
    assert (tmp_path / "image" / wheel.name).read_bytes() == b"wheel"
    recipe = (tmp_path / "image" / "Dockerfile").read_text()
    assert f"RUN pip install --no-cache-dir '/tmp/{wheel.name}[station,opcua]'" in recipe
    assert recipe.splitlines()[-1] == 'ENTRYPOINT ["m3ad-client", "station"]'
    words = shlex.split(line)
    assert words[:5] == ["docker", "build", "-t", "m3ad-station", str(tmp_path / "image")]
    assert words[-2:] == ["m3ad-station", str(odd)]
    mounts = dict(w.split(":", 1) for flag, w in itertools.pairwise(words) if flag == "-v")
    folder = odd.parent
    want = {str(folder / name): str(folder / name) for name in ("station", "left")}
    want[str(folder)] = str(folder)  # where the files of JSON lines and CSV lie
    for name in ("secret", "token", "station.toml"):
        want[str(folder / name)] = f"{folder / name}:ro"
    bundle = str(read_config(odd).cameras[0].bundle)
    want[bundle] = f"{bundle}:ro"
    assert mounts == want


@pytest.mark.parametrize(
    ("wheel", "why"),
    [(None, "none is named"), ("m3ad-0.1.0.tar.gz", "is none"), ("absent-linux.whl", "is none")],
)
def test_what_is_no_wheel_leaves_nothing(wheel: str | None, why: str, odd: Path, tmp_path: Path) -> None:
    (tmp_path / "m3ad-0.1.0.tar.gz").write_bytes(b"x")
    named = ["--wheel", str(tmp_path / wheel)] if wheel else []
    result = CliRunner().invoke(app, ["station", str(odd), "--container", str(tmp_path / "image"), *named])
    assert "the image needs m3ad's wheel for Linux" in str(result.exception)
    assert why in str(result.exception)
    assert not (tmp_path / "image").exists()


def test_systemd_is_told_that_it_runs_and_it_ends_when_asked(
    settings: Callable[..., Path], put: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "token").write_text(TOKEN)
    put(1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(90)
        environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}
        command = [Path(sys.executable).parent / "m3ad-client", "station", settings(more=PAGE)]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        try:
            assert [listener.recv(64) for _ in range(2)] == [b"READY=1", b"WATCHDOG=1"]
        finally:
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=90)
        assert process.returncode == 128 + signal.SIGTERM, said


def test_a_camera_that_is_stuck_is_not_alive(
    settings: Callable[..., Path], put: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(station, "STUCK_S", 1.5)
    opened, stuck = Station(read_config(settings()), lambda _: None), threading.Event()
    try:
        with opened.running():
            time.sleep(0.2)
            assert opened.is_alive()
            monkeypatch.setattr(opened.lines[0], "_read", lambda *_: stuck.wait(60) and None)
            put(1)
            for _ in range(600):
                if not opened.is_alive():
                    break
                time.sleep(0.05)
            assert not opened.is_alive()
            stuck.set()
    finally:
        stuck.set()
        with contextlib.suppress(Exception):
            opened.close()


def test_paths_are_quoted_as_units_want_them() -> None:
    assert deploy._quoted("/plain/path") == "/plain/path"
    assert deploy._quoted("/a b") == '"/a b"'
    assert deploy._quoted("/100%/$x", dollar=True) == "/100%%/$$x"
