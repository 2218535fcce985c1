"""What README and docs name exists: commands, their options, and the pages they point to."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from m3ad_calibrate.cli import app as calibrate
from m3ad_client.cli import app as client
from m3ad_export.cli import app as export
from m3ad_plugins.cli import app as plugins
from m3ad_triton.cli import app as triton

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
APPS = {"export": export, "calibrate": calibrate, "client": client, "plugins": plugins, "triton": triton}


def code_of(page: str) -> list[str]:
    """Lines of the code blocks without their comments, and code within the text."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)
    lines = [line.split(" #")[0] for block in blocks for line in re.sub(r"\\\n", " ", block).splitlines()]
    return [*lines, *(re.sub(r"\s+", " ", code) for code in re.findall(r"`([^`]+)`", prose))]


def problems(code: str) -> list[str]:
    """What of the commands in a piece of code is not there."""
    wrong = []
    for name, words in re.findall(r"m3ad-(\w+) ([a-z][^;&─]*)", code):
        if name not in APPS:
            continue
        commands = typer.main.get_command(APPS[name]).commands  # type: ignore[attr-defined]
        for subcommand in words.split()[0].split("|"):
            command = commands.get(subcommand)
            if command is None:
                wrong.append(f"m3ad-{name} has no command {subcommand}")
                continue
            rest = words.split()[1:]
            if rest and rest[0] in getattr(command, "commands", {}):
                command = command.commands[rest[0]]
            known = {o for option in command.params for o in (*option.opts, *option.secondary_opts)} | {
                "--help"
            }
            wrong += [
                f"m3ad-{name} {subcommand} has no option {option}"
                for option in re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", words)
                if option not in known
            ]
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_option_exists(page: Path) -> None:
    assert [p for code in code_of(page.read_text(encoding="utf-8")) for p in problems(code)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_what_is_not_there_is_noticed() -> None:
    assert problems("m3ad-client inspect DATA") == ["m3ad-client has no command inspect"]
    assert problems("m3ad-client infer|eval DATA --bundel B") == [
        "m3ad-client infer has no option --bundel",
        "m3ad-client eval has no option --bundel",
    ]
    assert problems("m3ad-export weights fetch NAME") == []


def test_the_reference_is_written_from_the_docstrings(tmp_path: Path) -> None:
    """As `make api` does it, of one module: its functions with their arguments and errors."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pdoc",
            "--docformat",
            "google",
            "--no-show-source",
            "-o",
            tmp_path,
            "m3ad.metrics",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    page = (tmp_path / "m3ad" / "metrics.html").read_text(encoding="utf-8")
    assert all(f'id="{name}"' in page for name in ("aupro", "pro_curve", "rank_correlation"))
    assert ">Raises" in page
