"""Several categories in one folder: a repository each, written together, with one copy of equal files on the disk."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from m3ad.atomic import file_beside
from m3ad.bundle import MANIFEST, Bundle, read_manifest
from m3ad.camera import Camera
from m3ad.contract import Layout
from m3ad.errors import ArtifactError
from m3ad.frame_door import DepthType

from m3ad_triton.config import QUEUE, Queue
from m3ad_triton.manifest import FORMAT, Runtime
from m3ad_triton.repository import Repository, write_repository


def find_repositories(paths: Iterable[Path]) -> list[Path]:
    """Each path, or where it is a folder of repositories, those in it by name."""
    found: list[Path] = []
    for path in paths:
        inside = _inside(path) if path.is_dir() and not (path / MANIFEST).is_file() else []
        found += inside or [path]
    return found


def write_categories(
    bundles: Sequence[Path],
    target: Path,
    runtime: Runtime,
    layout: Layout | None = None,
    engine_targets: Sequence[str] = (),
    *,
    frames: bool = True,
    depth: DepthType | None = None,
    camera: Camera | None = None,
    queue: Queue = QUEUE,
) -> list[Repository]:
    """Write the repositories of several bundles as `target`/<category>; others that lie there stay.

    Each is replaced as a whole. Arguments as of `write_repository`.

    Raises:
        ArtifactError: two bundles are of one category, `target` holds something else, or as of `write_repository`.
    """
    owners: dict[str, Path] = {}
    for path in bundles:
        bundle = Bundle.open(path)
        bundle.verify_usable()
        if (first := owners.setdefault(bundle.name, path)) is not path:
            raise ArtifactError(
                f"{first} and {path} are both of category {bundle.name}, and one server holds one of a name; export "
                "one under another: m3ad-export bundle --category NAME"
            )
    if target.exists():
        left = _others(target)
        if left:
            raise ArtifactError(
                f"{target} holds {left[0]}, which is no repository; several bundles are written into a folder of "
                "repositories alone: name another folder"
            )
    written = [
        write_repository(
            path,
            target / category,
            runtime,
            layout,
            engine_targets,
            frames=frames,
            depth=depth,
            camera=camera,
            queue=queue,
        )
        for category, path in owners.items()
    ]
    _share_files(written)
    return written


def _inside(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if not p.name.startswith(".") and (p / MANIFEST).is_file())


def _others(target: Path) -> list[str]:
    if not target.is_dir():
        return ["no folder"]
    return [p.name for p in sorted(target.iterdir()) if not p.name.startswith(".") and not _is_one(p)]


def _is_one(path: Path) -> bool:
    try:
        read_manifest(path, FORMAT, "")
    except ArtifactError:
        return False
    return True


def _share_files(repositories: Sequence[Repository]) -> None:
    """Give equal files of these repositories one place on the disk, where the file system has hard links."""
    first: dict[str, Path] = {}
    for repository in repositories:
        for name, entry in repository.manifest.files.items():
            path = repository.path / name
            source = first.setdefault(entry.sha256, path)
            if source is not path and entry.bytes:
                try:
                    with file_beside(path) as link:
                        os.link(source, link)
                except OSError:
                    return
