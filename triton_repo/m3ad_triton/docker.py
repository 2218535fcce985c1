"""NVIDIA's official image: the `docker run` line that serves repositories, and a folder that builds one with them."""

import json
import shlex
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from m3ad.bundle import new_folder
from m3ad.errors import ArtifactError

from m3ad_triton.engines import RUNTIME
from m3ad_triton.repository import Repository, server_arguments, verify_distinct

IMAGE = "nvcr.io/nvidia/tritonserver:26.08-py3"
JETSON_IMAGE = f"{IMAGE}-igpu"


def docker_line(repositories: Sequence[Repository], image: str = IMAGE) -> str:
    """One line for a shell: mounts, shared memory, plugin shims and the same server arguments as a local server.

    CPU stages and the steps around frames import m3ad inside the container, so that line installs it there first; plans
    behind the door that takes tensors need nothing.

    Raises:
        ArtifactError: two repositories hold a model of one name, or docker cannot mount a folder.
    """
    verify_distinct(repositories)
    if odd := next((r.path for r in repositories if ":" in str(r.path)), None):
        raise ArtifactError(
            f"{odd}: docker's -v cannot mount a path with a colon in it; move or rename the folder"
        )
    on_gpu = all(r.manifest.runtime == RUNTIME for r in repositories)
    shared = sum(r.manifest.shared_memory_bytes for r in repositories)
    mounts = {r.path: f"/models/{r.manifest.category}" for r in repositories}
    server = shlex.join(["tritonserver", *server_arguments(repositories, list(mounts.values()))])
    docker = ["docker", "run", "--rm", "-p", "127.0.0.1:8000-8002:8000-8002"]
    docker += [f"--shm-size={max(shared, 2**26) // 2**20}m"]
    docker += ["--gpus=all"] if on_gpu else []
    for path, place in mounts.items():
        docker += ["-v", f"{path}:{place}:ro"]
    if on_gpu and not any(r.manifest.frames for r in repositories):
        return f"{shlex.join([*docker, image])} {server}"
    source, package = _checkout(), "m3ad" if on_gpu else "m3ad[cpu]"
    if source is None:
        install = f"pip install '{package}'"
    else:
        docker += ["-v", f"{source}:/m3ad:ro"]
        install = f"cp -r /m3ad /tmp/m3ad && pip install '/tmp/{package}'"
    return f"{shlex.join([*docker, image, 'bash', '-c'])} {shlex.quote(f'{install} && {server}')}"


def write_context(
    repositories: Sequence[Repository], out: Path, wheel: Path | None = None, *, jetson: bool = False
) -> str:
    """Write a folder that `docker build` makes an image of: Dockerfile, repositories, and the wheel for CPU stages.

    Building fetches the official image and, for CPU stages, Python packages; what it makes needs no network.

    Args:
        repositories: to serve; their plugin libraries lie inside them.
        out: folder to write, new or empty.
        wheel: of m3ad, for the image's processor; not looked at when every stage is a plan.
        jetson: for Jetson's integrated GPU (aarch64) instead of x86_64.

    Returns:
        The shell line that builds the image and runs it.

    Raises:
        ArtifactError: two repositories hold a model of one name, the wheel is missing or of another processor, or
            `out` holds something already.
    """
    verify_distinct(repositories)
    on_gpu = all(r.manifest.runtime == RUNTIME for r in repositories)
    lines = [f"FROM {JETSON_IMAGE if jetson else IMAGE}"]
    if not on_gpu:
        wheel = _wheel_of(wheel, "aarch64" if jetson else "x86_64")
        lines += [
            "ENV PIP_BREAK_SYSTEM_PACKAGES=1 PYTHONDONTWRITEBYTECODE=1",
            f"COPY {wheel.name} /tmp/",
            f"RUN pip install --no-cache-dir '/tmp/{wheel.name}[triton]'",
        ]
    places = [f"/models/{r.manifest.category}" for r in repositories]
    server = ["tritonserver", *server_arguments(repositories, places)]
    if not on_gpu:
        probe = json.dumps(["m3ad-triton", "probe", *places])
        lines.append(f"HEALTHCHECK --interval=30s --timeout=30s --start-period=300s --retries=2 CMD {probe}")
    lines += ["COPY models /models", "EXPOSE 8000 8001 8002", f"ENTRYPOINT {json.dumps(server)}"]
    with new_folder(out) as folder:
        for repository in repositories:
            shutil.copytree(repository.path, folder / "models" / repository.manifest.category)
        if wheel is not None and not on_gpu:
            shutil.copy2(wheel, folder / wheel.name)
        (folder / "Dockerfile").write_text("\n".join(lines) + "\n", encoding="utf-8")
    name = f"m3ad-{'-'.join(r.manifest.category for r in repositories)}".lower()
    shared = max(sum(r.manifest.shared_memory_bytes for r in repositories), 2**26) // 2**20
    run = ["docker", "run", "--rm", "-p", "127.0.0.1:8000-8002:8000-8002", f"--shm-size={shared}m"]
    run += (["--runtime=nvidia"] if jetson else ["--gpus=all"]) if on_gpu else []
    return f"{shlex.join(['docker', 'build', '-t', name, str(out)])} && {shlex.join([*run, name])}"


def _wheel_of(wheel: Path | None, machine: str) -> Path:
    if wheel is None or not wheel.is_file():
        found = "none is named" if wheel is None else f"{wheel} is not there"
        raise ArtifactError(
            f"stages on the CPU need m3ad's wheel in the image, {found}: python -m build --wheel, then --wheel FILE"
        )
    if not wheel.name.startswith("m3ad-") or not wheel.name.endswith(f"_{machine}.whl"):
        raise ArtifactError(
            f"{wheel.name} is no wheel of m3ad for {machine}, which the image is for; build one there"
        )
    return wheel


def _checkout() -> Path | None:
    """The folder of m3ad's sources when it is an editable install."""
    spec = find_spec("m3ad_triton")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parents[2]
    return root if (root / "pyproject.toml").is_file() else None
