"""The manifest of a model repository: every entry's type and range, every listed file's hash, and nothing unlisted.

Nothing of a repository is loaded, linked or run before this file has looked at it.
"""

import os
import re
import sys
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from m3ad.bundle import MANIFEST, read_manifest, sha256_of
from m3ad.contract import CONTRACT_VERSION, LAYOUTS, Dims, Layout
from m3ad.errors import ArtifactError

Runtime = Literal["onnxruntime", "tensorrt"]
FORMAT = "m3ad-repository"
ADVICE = "Write it again: m3ad-triton write BUNDLE REPO"
# What Triton takes as a model's name, and what needs no quoting on any command line.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
SHA256 = re.compile(r"[0-9a-f]{64}")
BYTECODE = "__pycache__"
LARGEST_SIZE = 2**20
LARGEST_BYTES = 2**50


@dataclass(frozen=True, slots=True)
class FileEntry:
    """What is recorded of one file."""

    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Plugins:
    """The plugin library and its shims, file names beside the models, or why there is none."""

    library: str | None
    shims: tuple[str, ...]
    missing: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RepositoryManifest:
    """What `m3ad-triton write` records: sizes in bytes, `files` by path relative to the repository."""

    contract_version: int
    category: str
    layout: Layout
    runtime: Runtime
    precision: str
    model_bytes: int
    dims: Dims
    weights: str
    bundle_sha256: str
    engines: tuple[dict[str, Any], ...]
    plugins: Plugins
    cuda_pool_bytes: int
    shared_memory_bytes: int
    files: Mapping[str, FileEntry]

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "RepositoryManifest":
        """Read the manifest's document.

        Raises:
            ValueError: an entry is missing, of another type or out of range; the message names it.
        """
        found = cls(**{f.name: _entry(document, f.name, READERS[f.name]) for f in fields(cls)})
        for name in (*found.plugins.shims, *filter(None, [found.plugins.library])):
            if name not in found.files:
                raise ValueError(f"`plugins` names {name}, which `files` does not list")
        if found.runtime == "tensorrt" and not found.engines:
            raise ValueError("`engines` is empty, expected those whose plans are served")
        return found

    def to_json(self) -> dict[str, Any]:
        """The document as it is written."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def read(cls, folder: Path) -> "RepositoryManifest":
        """Read `folder`/manifest.json; no other file is looked at.

        Raises:
            ArtifactError: the folder is no repository, is of another contract version, or an entry is wrong.
        """
        try:
            document = read_manifest(folder, FORMAT, ADVICE)
        except (OSError, ValueError, RecursionError) as error:
            why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise ArtifactError(f"{folder / MANIFEST} cannot be read: {why}. {ADVICE}") from error
        version = document.get("contract_version")
        if version != CONTRACT_VERSION or isinstance(version, bool):
            raise ArtifactError(
                f"{folder} is a repository of contract version {_shown(version)}, this m3ad serves version "
                f"{CONTRACT_VERSION}. {ADVICE}"
            )
        try:
            return cls.from_json(document)
        except ValueError as error:
            raise ArtifactError(f"{folder / MANIFEST}: entry {error}. {ADVICE}") from error


def file_problems(folder: Path, manifest: RepositoryManifest) -> list[str]:
    """What differs between the files of a repository and its manifest, one sentence each."""
    unlisted = find_unlisted(folder, manifest.files)
    changed = (_difference(folder, name, entry) for name, entry in manifest.files.items())
    return [problem for problem in changed if problem] + [
        f"{folder / name} is not listed in {MANIFEST}, a server must not find it. {_advice(name)}"
        for name in unlisted
    ]


def find_unlisted(folder: Path, listed: Mapping[str, Any]) -> list[str]:
    """Whatever lies below `folder` and is no listed file: files, links, and folders with nothing to see in them.

    Links are told and never followed.
    """
    found = []

    def tell(error: OSError) -> None:
        found.append(f"{Path(error.filename).relative_to(folder).as_posix()}/")

    for place, folders, names in os.walk(folder, onerror=tell):
        here = Path(place)
        links = [name for name in folders if (here / name).is_symlink()]
        paths = [(here / name).relative_to(folder).as_posix() for name in (*names, *links)]
        found += [path for path in paths if path != MANIFEST and path not in listed]
        if not folders and not names and here != folder:
            found.append(f"{here.relative_to(folder).as_posix()}/")
    return sorted(found)


def _difference(folder: Path, name: str, entry: FileEntry) -> str | None:
    path = folder / name
    try:
        for step in (path, *(folder / parent for parent in PurePosixPath(name).parents[:-1])):
            if step.is_symlink():
                return f"{step} is a link, a repository holds its files itself. {ADVICE}"
        if not path.is_file():
            return f"{path} is missing, the manifest lists it. {ADVICE}"
        size = path.stat().st_size
        found = sha256_of(path) if size == entry.bytes else ""
    except OSError as error:
        return f"{path} cannot be read ({error.strerror}). {ADVICE}"
    if found == entry.sha256:
        return None
    told = f"sha256 {found[:12]}..., expected {entry.sha256[:12]}..."
    if size != entry.bytes:
        told = f"{size} bytes, expected {entry.bytes}"
    return f"{path} was changed after it was written: {told}. {ADVICE}"


def _advice(name: str) -> str:
    parts = PurePosixPath(name).parts
    if BYTECODE not in parts:
        return f"Remove it, or write it again: {ADVICE.partition(': ')[2]}"
    cache = PurePosixPath(*parts[: parts.index(BYTECODE) + 1])
    return f"A server that m3ad-triton did not start left byte code: remove the folder {cache}"


def _entry(document: Mapping[str, Any], name: str, reader: Callable[[Any], Any]) -> Any:
    if name not in document:
        raise ValueError(f"`{name}` is missing")
    try:
        return reader(document[name])
    except ValueError as error:
        raise ValueError(f"`{name}` {error}") from error


def _shown(value: Any) -> str:
    """A wrong value in a message: short, in ASCII."""
    if isinstance(value, int) and abs(value) > 10**20:
        return "a number of more than 20 digits"
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _wrong(value: Any, expected: str) -> ValueError:
    return ValueError(f"is {_shown(value)}, expected {expected}")


def _whole(low: int, high: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise _wrong(value, f"a whole number in {low}..{high}")
        return value

    return read


def is_finite_number(value: Any) -> bool:
    """A number that a float can hold: no NaN, no infinity, no boolean."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max


def _not_negative(value: Any) -> int | float:
    if not isinstance(value, int | float) or not is_finite_number(value) or value < 0:
        raise _wrong(value, "a finite number of at least 0")
    return value  # as it is: 0 and 0.0 are spelt differently in a configuration


def _text(value: Any) -> str:
    if not isinstance(value, str) or any(unicodedata.category(c) in ("Cc", "Cs") for c in value):
        raise _wrong(value, "text")
    return value


def _matching(pattern: re.Pattern[str], what: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise _wrong(value, what)
        return value

    return read


def _one_of(*known: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if not isinstance(value, str) or value not in known:
            raise _wrong(value, " or ".join(known))
        return value

    return read


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(value, "an object")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise _wrong(value, "a list")
    return list(value)


def _read_dims(value: Any) -> Dims:
    sizes = _object(value)
    if unknown := sizes.keys() - {field.name for field in fields(Dims)}:
        raise ValueError(f"has the unknown size {_shown(min(unknown))}")
    whole = _whole(1, LARGEST_SIZE)
    return Dims(
        **{
            f.name: _entry(sizes, f.name, _not_negative if f.type in (float, "float") else whole)
            for f in fields(Dims)
        }
    )


def _read_plugins(value: Any) -> Plugins:
    entries = _object(value)
    name = _matching(NAME, "a file name")
    library, shims, missing = (
        _entry(entries, "library", lambda v: v if v is None else name(v)),
        _entry(entries, "shims", lambda v: tuple(name(shim) for shim in _list(v))),
        _entry(entries, "missing", lambda v: v if v is None else _text(v)),
    )
    return Plugins(library, shims, missing)


def _read_engine(value: Any) -> dict[str, Any]:
    entries = _object(value)
    for name in ("target", "runtime", "compute_capability"):
        _entry(entries, name, _text)
    return entries


def _read_path(value: str) -> str:
    """A path that stays in its folder on every system: no root, no step up, no empty step, no backslash."""
    _text(value)
    if "\\" in value or any(part in ("", ".", "..") for part in value.split("/")) or value == MANIFEST:
        raise _wrong(value, "the path of a file below the repository")
    return value


def _read_files(value: Any) -> dict[str, FileEntry]:
    entries = _object(value)
    if not entries:
        raise ValueError("is empty, expected every file with its sha256")
    return {_read_path(path): _entry(entries, path, _read_file) for path in entries}


def _read_file(value: Any) -> FileEntry:
    entry = _object(value)
    sha256 = _entry(entry, "sha256", _matching(SHA256, "64 hexadecimal digits"))
    return FileEntry(sha256, _entry(entry, "bytes", _whole(0, LARGEST_BYTES)))


READERS: dict[str, Callable[[Any], Any]] = {
    "contract_version": _whole(0, LARGEST_SIZE),
    "category": _matching(NAME, "letters, digits, '_', '-' and '.'"),
    "layout": _one_of(*LAYOUTS),
    "runtime": _one_of(*get_args(Runtime)),
    "precision": _text,
    "model_bytes": _whole(0, LARGEST_BYTES),
    "dims": _read_dims,
    "weights": _text,
    "bundle_sha256": _matching(SHA256, "64 hexadecimal digits"),
    "engines": lambda value: tuple(_read_engine(engine) for engine in _list(value)),
    "plugins": _read_plugins,
    "cuda_pool_bytes": _whole(0, LARGEST_BYTES),
    "shared_memory_bytes": _whole(0, LARGEST_BYTES),
    "files": _read_files,
}
