"""The JSON document and the Markdown rows of a run."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from m3ad.atomic import file_beside

from m3ad_plugins.build import PACKAGE
from m3ad_plugins.cuda_build import built_folder
from m3ad_plugins.gpu.steps import Result

FORMAT = "m3ad-gpu-report 1"


def gpu_of_this_machine() -> str:
    """Name, driver and compute capability as nvidia-smi says them; empty if it does not answer.

    JetPack 6 has no nvidia-smi: there the device tree names the module.
    """
    query = ["nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        done = None
    if done is not None and done.returncode == 0 and done.stdout.strip():
        return done.stdout.strip().splitlines()[0]
    model = Path("/proc/device-tree/model")
    named = model.read_text(errors="replace").strip("\0\n ") if model.is_file() else ""
    return named if "Jetson" in named or "NVIDIA" in named else ""


def document(gpu: str, results: Sequence[Result], command: Sequence[str] = sys.argv) -> dict[str, Any]:
    """What is known of the run, JSON-able."""
    return {
        "format": FORMAT,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": gpu or None,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "m3ad": version("m3ad"),
        "plugin_sources": built_folder().name,
        "from": "wheel" if "site-packages" in PACKAGE.parts else "checkout",
        "command": " ".join([Path(command[0]).name, *command[1:]]),
        "steps": [asdict(result) for result in results],
    }


def markdown(report: dict[str, Any]) -> str:
    """The rows for MEASUREMENTS.md."""
    lines = [
        f"{report['device'] or 'No GPU'}; {report['machine']}; m3ad {report['m3ad']}, {report['plugin_sources']}; "
        f"{report['date'][:10]}, `{report['command']}`:",
        "",
        "| step | | figures |",
        "|---|---|---|",
    ]
    for step in report["steps"]:
        plain = {n: v for n, v in step["figures"].items() if not isinstance(v, dict | list)}
        shown = ", ".join(f"{name} {value}" for name, value in plain.items()) or step["said"]
        shown = shown or ("in the JSON document" if step["figures"] else "")
        shown = shown.replace("|", "\\|")
        seconds = f" in {step['seconds']:.0f} s" if step["seconds"] else ""
        lines.append(f"| {step['name']} | {step['state']}{seconds} | {shown} |")
    return "\n".join(lines) + "\n"


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write the document, and its rows beside it with suffix .md; nobody reads half of either."""
    for target, text in (
        (path, json.dumps(report, indent=2) + "\n"),
        (path.with_suffix(".md"), markdown(report)),
    ):
        with file_beside(target) as written:
            written.write_text(text, encoding="utf-8")
