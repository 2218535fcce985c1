import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = (ROOT / "docs" / "code.md").read_text(encoding="utf-8")
# The README's commands on the real networks; fewer parts, steps and sizes are what keeps this test short.
SHORTER = {
    "m3ad-export sample-data": "--train 3 --validation 2 --test-per-kind 1",
    "m3ad-export train": "--set align_steps=4 --set guide_steps=4",
    "m3ad-export bundle": "--points 1025",
}


def executed(language: str) -> str:
    (block,) = re.findall(
        rf"executed by tests/test_readme.py -->\n```{language}\n(.*?)```", README, re.DOTALL
    )
    return block


def run(command: str, folder: Path) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env={**os.environ, "PATH": path},
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.mark.slow
def test_quick_start_runs_as_written(tmp_path: Path) -> None:
    for command in filter(None, executed("bash").splitlines()):
        shorter = next((flags for start, flags in SHORTER.items() if command.startswith(start)), "")
        run(f"{command} {shorter}", tmp_path)
    assert list((tmp_path / "demo" / "inspected").rglob("*.overlay.png"))
    assert len(list((tmp_path / "demo/bundle/engines/sm89").glob("*.plan"))) == 10

    (tmp_path / "inspect_parts.py").write_text(executed("python"), encoding="utf-8")
    parts = run("python inspect_parts.py", tmp_path).splitlines()
    assert len(parts) == len(list((tmp_path / "demo/sample/test").glob("*/rgb/*.png")))


@pytest.mark.parametrize("page", [README, CODE], ids=["README.md", "docs/code.md"])
def test_every_path_of_the_tree_exists(page: str) -> None:
    (tree,) = re.findall(r"# Where things are\n.*?```\n(.*?)```", page, re.DOTALL)
    rooms: list[str] = []
    for line in tree.splitlines():
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        if indent > 12:  # what is said of the line above goes on
            continue
        rooms = [*rooms[: indent // 2], name]
        assert (ROOT / "".join(rooms)).exists(), line
