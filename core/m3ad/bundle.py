"""The bundle: what `m3ad-export` writes and everything else reads, verified whenever it is opened.

A bundle is a folder: `manifest.json`, `onnx/`, `golden/`, `calibration/`, `engines/<target>/`. Every file the manifest
lists is hashed; engines carry a manifest of their own because they are added after the bundle is written.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from m3ad.atomic import NO_ROOM, file_beside, folder_beside, locked, put_in_place
from m3ad.contract import CONTRACT_VERSION, Dims, Layout
from m3ad.errors import ArtifactError
from m3ad.frame_settings import Preprocessing
from m3ad.manifest import FileEntry, Manifest, is_inside
from m3ad.method import Contract
from m3ad.methods import contract_of
from m3ad.typed_json import read_json, require_whole, typed

MANIFEST = "manifest.json"
FORMAT = "m3ad-bundle"
EXPORT_AGAIN = "Export it again: m3ad-export bundle"


@dataclass(frozen=True, slots=True)
class Bundle:
    """A verified bundle: its folder, its manifest, and the document that the manifest was read from."""

    path: Path
    manifest: Manifest
    document: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> "Bundle":
        """Open a bundle and check its format, its contract version and the hash of every listed file.

        Raises:
            ArtifactError: the folder is not a bundle, is of another contract version, or a file was changed.
        """
        bundle = cls.read(path)
        bundle.verify()
        return bundle

    @classmethod
    def read(cls, path: Path) -> "Bundle":
        """Read a bundle's manifest; its files are not looked at before `verify`.

        Raises:
            ArtifactError: the folder is not a bundle, or is of another contract version.
        """
        document = read_manifest(path, FORMAT, "Write one with: m3ad-export bundle")
        version = document.get("contract_version")
        if version != CONTRACT_VERSION or isinstance(version, bool):
            raise ArtifactError(
                f"{path} is a bundle of contract version {version}, this m3ad reads version {CONTRACT_VERSION}; "
                f"export it again: m3ad-export bundle"
            )
        return cls.of_document(path, document)

    def verify(self, files: Iterable[str] | None = None) -> None:
        """Check the hash of every listed file, or of those named.

        Raises:
            ArtifactError: one is missing or was changed.
        """
        listed = self.document["files"]
        chosen = listed if files is None else {relative: listed[relative] for relative in files}
        verify_files(self.path, chosen, EXPORT_AGAIN)

    @classmethod
    def of_document(cls, path: Path, document: dict[str, Any]) -> "Bundle":
        """A bundle from its manifest's JSON, every field checked; the files are not looked at.

        Raises:
            ArtifactError: a field is missing, of another type or out of range, or a file that the CPU runtime would
                load is not listed.
        """
        manifest = typed(document, Manifest, str(path / MANIFEST), EXPORT_AGAIN)
        require_whole(document["dims"], manifest.dims.to_json(), "$.dims", str(path / MANIFEST), EXPORT_AGAIN)
        preprocessing = Preprocessing.from_json(manifest.preprocessing)
        contract = contract_of(manifest.method, manifest.dims, preprocessing.lattice)
        used = dict.fromkeys(step.stage for layout in manifest.layouts for step in contract.steps(layout))
        needed = [f"onnx/{file}" for stage in used for file in contract.method.cpu[stage].files]
        if missing := [file for file in needed if file not in manifest.files]:
            raise ArtifactError(f"{path / MANIFEST} does not list {missing[0]}. {EXPORT_AGAIN}")
        return cls(path, manifest, document)

    @property
    def contract(self) -> Contract:
        """What crosses the stage boundaries of this bundle's detector."""
        return contract_of(self.manifest.method, self.manifest.dims, self.preprocessing.lattice)

    @property
    def dims(self) -> Dims:
        """The sizes of this bundle's tensors."""
        return self.manifest.dims

    @property
    def name(self) -> str:
        """The category the bundle was trained for."""
        return self.manifest.category

    @property
    def preprocessing(self) -> Preprocessing:
        """What is done with a frame before the first stage."""
        return Preprocessing.from_json(self.manifest.preprocessing)

    @property
    def precision(self) -> str:
        """The type that the graphs' products are computed in: fp32, or what the bundle was quantized to."""
        return self.manifest.precision.type if self.manifest.precision else "fp32"

    @property
    def refine(self) -> float | None:
        """The limit that a second pass over the lattice's high places is made for; None where there is none."""
        change, threshold = self.manifest.lattice, self.manifest.threshold
        return threshold.limits.lowest if change and change.refine else None

    def file(self, relative: str) -> Path:
        """The path of a file the manifest lists.

        Raises:
            ArtifactError: the bundle has no such file.
        """
        if relative not in self.manifest.files:
            raise ArtifactError(
                f"{self.path} holds no {relative}; export it again with this layout: m3ad-export bundle"
            )
        return self.path / relative

    def layout(self, wanted: Layout | None = None) -> Layout:
        """The layout asked for, or the one to ship: the last.

        Raises:
            ArtifactError: the bundle has no such layout.
        """
        if wanted is not None and wanted not in self.manifest.layouts:
            method = self.contract.method
            advice = (
                "export it again with this layout: m3ad-export bundle"
                if wanted in method.layouts
                else f"{method.title} has no other, so leave --layout out"
            )
            raise ArtifactError(
                f"{self.path} has no layout {wanted}, only {', '.join(self.manifest.layouts)}; {advice}"
            )
        return wanted or self.manifest.layouts[-1]

    def verify_usable(self) -> None:
        """Check that a bundle of another precision or lattice passed its gate, or that somebody accepted the loss.

        Raises:
            ArtifactError: it failed, or was never gated.
        """
        gate, precision = self.manifest.gate, self.manifest.precision
        if (precision or self.manifest.lattice) is None or (gate and (gate.passed or gate.accepted)):
            return
        found = "failed its gate" if gate else "was never gated"
        if precision is None:
            raise ArtifactError(
                f"{self.path} scores the lattice {self.preprocessing.lattice} and {found}; choose one with "
                "m3ad-calibrate lattice, or take the loss on your own account: m3ad-export build-engine --accept-loss "
                "'NAME: REASON'"
            )
        raise ArtifactError(
            f"{self.path} is quantized and {found}; find a better plan with m3ad-calibrate sensitivity, or "
            f"take the loss on your own account: m3ad-export build-engine --accept-loss 'NAME: REASON'"
        )

    def update(self, **changes: Any) -> "Bundle":
        """Replace top-level manifest entries, in one atomic rename; what others changed meanwhile is kept.

        Raises:
            ArtifactError: one of these entries, or a file of the bundle, was changed since it was opened.
        """
        with locked(self.path):
            updated = Bundle.of_document(self.path, {**self.current("files", *changes), **changes})
            write_json(self.path / MANIFEST, updated.document)
        return updated

    def current(self, *unchanged: str) -> dict[str, Any]:
        """The manifest's document as it is now; whoever writes it next holds the folder's lock meanwhile.

        Raises:
            ArtifactError: one of the named entries was changed since the bundle was opened.
        """
        document = read_manifest(self.path, FORMAT, EXPORT_AGAIN)
        for name in unchanged:
            if document.get(name) != self.document.get(name):
                raise ArtifactError(
                    f"{self.path}: another program changed `{name}` of its manifest meanwhile, so nothing was "
                    "written; run this command again"
                )
        return document


def read_manifest(folder: Path, expected_format: str, advice: str) -> dict[str, Any]:
    """Read `folder`/manifest.json and check what kind of artefact it describes.

    Raises:
        ArtifactError: no such folder, no readable manifest in it, or one of another kind.
    """
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder. {advice}")
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{folder} has no {MANIFEST}, so it is not a {expected_format}. {advice}")
    manifest = read_json(path, advice)
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != expected_format:
        raise ArtifactError(f"{path} describes {found!r}, expected {expected_format!r}. {advice}")
    return dict(manifest)


def verify_files(folder: Path, files: Any, advice: str) -> None:
    """Check that every listed file lies in the folder itself and has the listed sha256.

    Args:
        folder: where the manifest lies.
        files: the manifest's `files`: relative path -> sha256 and bytes.
        advice: what to do when something is wrong, a sentence.

    Raises:
        ArtifactError: the list is damaged; or a file is missing, is or lies behind a link, is named outside the
            folder, or differs from what was written.
    """
    for relative, entry in typed(files, dict[str, FileEntry], str(folder / MANIFEST), advice).items():
        path = folder / relative
        if not is_inside(relative):
            raise ArtifactError(f"{folder / MANIFEST} lists {relative!r}, a path outside {folder}. {advice}")
        if any((folder / part).is_symlink() for part in (relative, *_parents(relative))):
            raise ArtifactError(f"{path} is a link or lies behind one; expected the file itself. {advice}")
        if not path.is_file():
            raise ArtifactError(f"{path} is missing, the manifest lists it. {advice}")
        actual = sha256_of(path)
        if actual != entry.sha256:
            raise ArtifactError(
                f"{path} was changed after it was written: sha256 {actual[:12]}..., "
                f"expected {entry.sha256[:12]}.... {advice}"
            )


def _parents(relative: str) -> list[str]:
    return [parent.as_posix() for parent in PurePosixPath(relative).parents][:-1]


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def file_entry(path: Path) -> dict[str, Any]:
    """What a manifest records of one file."""
    return {"sha256": sha256_of(path), "bytes": path.stat().st_size}


def file_entries(folder: Path) -> dict[str, Any]:
    """Manifest entries of every file below `folder` except its own manifest, by relative path."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    return {p.relative_to(folder).as_posix(): file_entry(p) for p in paths}


def write_json(path: Path, document: Any) -> None:
    """Write JSON under a temporary name and rename it, so that nobody reads half of it, also after a power cut."""
    with file_beside(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(document, indent=1, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def require_place(path: Path) -> None:
    """Check that a file can be written at `path`, before the work whose result it gets; nothing is left there.

    Raises:
        ArtifactError: it cannot; the message says why.
    """
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be written ({error.strerror}); name another path, or make room there"
        ) from error


@contextmanager
def new_folder(target: Path, expected_format: str | None = None) -> Iterator[Path]:
    """Yield a temporary folder beside `target` that takes its place when the block ends without an error.

    An existing target is replaced only when its manifest says it is of `expected_format` (or it is empty).

    Raises:
        ArtifactError: `target` exists and is something else, or cannot be written; the disk is full.
    """
    target = target.absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        advice = "Choose another folder or remove this one first."
        if expected_format is None:
            raise ArtifactError(f"{target} exists already. {advice}")
        read_manifest(target, expected_format, advice)
    require_place(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with folder_beside(target) as temporary:
            yield temporary
            temporary.chmod(0o755)
            put_in_place(temporary, target)
    except OSError as error:
        # NumPy's writer tells how many items fitted, and no reason.
        if error.errno in NO_ROOM or error.errno is None:
            raise ArtifactError(
                f"{target} cannot be written ({error.strerror or error}); make room there, or name another folder"
            ) from error
        raise
