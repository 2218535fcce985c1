"""The `docker run` line that serves repositories with NVIDIA's official image."""

import shlex
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from m3ad.errors import ArtifactError

from m3ad_triton.engines import RUNTIME
from m3ad_triton.repository import Repository, server_arguments, verify_distinct

IMAGE = "nvcr.io/nvidia/tritonserver:26.08-py3"


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
    docker = ["docker", "run", "--rm", "-p", "8000-8002:8000-8002"]
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


def _checkout() -> Path | None:
    """The folder of m3ad's sources when it is an editable install."""
    spec = find_spec("m3ad_triton")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parents[2]
    return root if (root / "pyproject.toml").is_file() else None
