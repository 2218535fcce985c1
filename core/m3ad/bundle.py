"""The bundle: what `m3ad-export` writes and everything else reads, verified whenever it is opened.

A bundle is a folder: `manifest.json`, `onnx/`, `golden/`, `calibration/`, `engines/<target>/`. Every file the manifest
lists is hashed; engines carry a manifest of their own because they are added after the bundle is written.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3ad.contract import CONTRACT_VERSION, Dims
from m3ad.errors import ArtifactError

MANIFEST = "manifest.json"
FORMAT = "m3ad-bundle"


@dataclass(frozen=True, slots=True)
class Bundle:
    """A verified bundle: its folder and its manifest."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> "Bundle":
        """Open a bundle and check its format, its contract version and the hash of every listed file.

        Raises:
            ArtifactError: the folder is no bundle, is of another contract version, or a file was changed.
        """
        manifest = read_manifest(path, FORMAT, "Write one with: m3ad-export bundle")
        version = manifest.get("contract_version")
        if version != CONTRACT_VERSION:
            raise ArtifactError(
                f"{path} is a bundle of contract version {version}, this m3ad reads version {CONTRACT_VERSION}; "
                f"export it again: m3ad-export bundle"
            )
        verify_files(path, manifest["files"], "Export it again: m3ad-export bundle")
        return cls(path, manifest)

    @property
    def dims(self) -> Dims:
        """The sizes of this bundle's tensors."""
        return Dims(**self.manifest["dims"])

    @property
    def name(self) -> str:
        """The category the bundle was trained for."""
        return str(self.manifest["category"])

    def file(self, relative: str) -> Path:
        """The path of a file the manifest lists.

        Raises:
            ArtifactError: the bundle has no such file.
        """
        if relative not in self.manifest["files"]:
            raise ArtifactError(
                f"{self.path} holds no {relative}; export it again with this layout: m3ad-export bundle"
            )
        return self.path / relative

    def verify_usable(self) -> None:
        """Check that a quantized bundle passed its gate, or that somebody accepted the loss.

        Raises:
            ArtifactError: it failed, or was never gated.
        """
        gate = self.manifest.get("gate")
        if "precision" not in self.manifest or (gate and (gate["passed"] or gate["accepted"])):
            return
        found = "failed its gate" if gate else "was never gated"
        raise ArtifactError(
            f"{self.path} is quantized and {found}; find a better plan with m3ad-calibrate sensitivity, or "
            f"take the loss on your own account: m3ad-export build-engine --accept-loss 'NAME: REASON'"
        )

    def update(self, **changes: Any) -> "Bundle":
        """Replace top-level manifest entries, in one atomic rename."""
        manifest = {**self.manifest, **changes}
        write_json(self.path / MANIFEST, manifest)
        return Bundle(self.path, manifest)

    def add_file(self, relative: str, source: Path) -> "Bundle":
        """Move `source` into the bundle under `relative` and list it in the manifest."""
        target = self.path / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)
        return self.update(files={**self.manifest["files"], relative: file_entry(target)})


def read_manifest(folder: Path, expected_format: str, advice: str) -> dict[str, Any]:
    """Read `folder`/manifest.json and check what kind of artefact it describes.

    Raises:
        ArtifactError: no such folder, no readable manifest in it, or one of another kind.
    """
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder. {advice}")
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{folder} has no {MANIFEST}, so it is no {expected_format}. {advice}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is not valid JSON ({error}). {advice}") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != expected_format:
        raise ArtifactError(f"{path} describes {found!r}, expected {expected_format!r}. {advice}")
    return dict(manifest)


def verify_files(folder: Path, files: dict[str, Any], advice: str) -> None:
    """Check presence and sha256 of every listed file.

    Raises:
        ArtifactError: a file is missing or differs from what was written.
    """
    for relative, entry in files.items():
        path = folder / relative
        if not path.is_file():
            raise ArtifactError(f"{path} is missing, the manifest lists it. {advice}")
        found = sha256_of(path)
        if found != entry["sha256"]:
            raise ArtifactError(
                f"{path} was changed after it was written: sha256 {found[:12]}..., "
                f"expected {entry['sha256'][:12]}.... {advice}"
            )


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_entry(path: Path) -> dict[str, Any]:
    """What a manifest records of one file."""
    return {"sha256": sha256_of(path), "bytes": path.stat().st_size}


def file_entries(folder: Path) -> dict[str, Any]:
    """Manifest entries of every file below `folder` except its own manifest, by relative path."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    return {p.relative_to(folder).as_posix(): file_entry(p) for p in paths}


def write_json(path: Path, document: Any) -> None:
    """Write JSON under a temporary name and rename it, so that nobody reads half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


@contextmanager
def new_folder(target: Path, expected_format: str | None = None) -> Iterator[Path]:
    """Yield a temporary folder beside `target` that takes its place when the block ends without an error.

    An existing target is replaced only when its manifest says it is of `expected_format` (or it is empty).

    Raises:
        ArtifactError: `target` exists and is something else.
    """
    target = target.absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        advice = "Choose another folder or remove this one first."
        if expected_format is None:
            raise ArtifactError(f"{target} exists already. {advice}")
        read_manifest(target, expected_format, advice)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            os.replace(target, old / target.name)
            os.replace(temporary, target)
            shutil.rmtree(old)
        else:
            os.replace(temporary, target)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)
