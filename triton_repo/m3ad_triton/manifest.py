"""The manifest of a model repository: every entry's type and range, every listed file's hash, and nothing unlisted.

Nothing of a repository is loaded, linked or run before this file has looked at it.
"""

import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import msgspec
from m3ad.bundle import MANIFEST, read_manifest, sha256_of
from m3ad.contract import CONTRACT_VERSION, Dims, Layout
from m3ad.errors import ArtifactError
from m3ad.frame_door import DepthType
from m3ad.manifest import FileEntry, Json, Sha256, is_inside
from m3ad.method import Contract
from m3ad.methods import METHODS, contract_of
from m3ad.scored import Lattice
from m3ad.serving import MODEL_NAME
from m3ad.signature import SIGNATURE
from m3ad.typed_json import require_whole, typed
from msgspec import Meta, Struct

Runtime = Literal["onnxruntime", "tensorrt"]
FORMAT = "m3ad-repository"
ADVICE = "Write it again: m3ad-triton write BUNDLE REPO"
BYTECODE = "__pycache__"

Name = Annotated[str, Meta(pattern=rf"^{MODEL_NAME.pattern}\Z")]
Text = Annotated[str, Meta(pattern=r"^[^\x00-\x1f\x7f-\x9f]*\Z")]  # what a terminal shows as it is
Bytes = Annotated[int, Meta(ge=0, le=2**50)]


class Plugins(Struct, frozen=True, forbid_unknown_fields=True):
    """The plugin library and its shims, file names beside the models, or why there is none."""

    library: Name | None
    shims: tuple[Name, ...]
    missing: Text | None


class Engine(Struct, frozen=True):
    """What must be known of an engine's target; the rest of its summary is recorded beside."""

    target: Text
    runtime: Text
    compute_capability: Text


class RepositoryManifest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `m3ad-triton write` records: sizes in bytes, `files` by path relative to the repository.

    `frames` says whether it has the door that takes frames besides the one that takes tensors, `depth` of which type
    the depth images are that it takes instead of clouds, `queue_timeout_s` how long a frame may wait at a
    door, `queue_frames` how many may.
    """

    contract_version: int
    method: str
    category: Name
    layout: Layout
    runtime: Runtime
    precision: Text
    model_bytes: Bytes
    dims: Dims
    weights: Text
    bundle_sha256: Sha256
    engines: tuple[Json, ...]
    plugins: Plugins
    cuda_pool_bytes: Bytes
    shared_memory_bytes: Bytes
    files: dict[str, FileEntry]
    frames: bool = False
    depth: DepthType | None = None
    lattice: Lattice = "all"
    refine: float | None = None
    queue_timeout_s: Annotated[float, Meta(ge=0, le=1e6)]
    queue_frames: Annotated[int, Meta(ge=0, le=10**6)]

    def __post_init__(self) -> None:
        if self.method not in METHODS or self.layout not in METHODS[self.method].layouts:
            raise ValueError(f"method {self.method!r} with layout {self.layout!r} is none of m3ad's")
        for engine in self.engines:
            msgspec.convert(engine, Engine, strict=True)
        if not self.files:
            raise ValueError("`files` is empty, expected every file with its sha256")
        if outside := [path for path in self.files if not is_inside(path) or path in (MANIFEST, SIGNATURE)]:
            raise ValueError(f"`files` lists {outside[0]!r}, expected paths of files below the repository")
        for name in (*self.plugins.shims, *filter(None, [self.plugins.library])):
            if name not in self.files:
                raise ValueError(f"`plugins` names {name}, which `files` does not list")
        if self.runtime == "tensorrt" and not self.engines:
            raise ValueError("`engines` is empty, expected those whose plans are served")

    @property
    def on_cpu(self) -> bool:
        """Whether the stages run in Triton's Python backend."""
        return self.runtime == "onnxruntime"

    @property
    def contract(self) -> Contract:
        """What crosses the stage boundaries of the served detector."""
        return contract_of(self.method, self.dims, self.lattice)

    @classmethod
    def from_json(cls, document: Json, source: str, advice: str) -> "RepositoryManifest":
        """Read the manifest's document.

        Raises:
            ArtifactError: an entry is missing, unknown, of another type or out of range; the message names it.
        """
        manifest = typed({k: v for k, v in document.items() if k != "format"}, cls, source, advice)
        require_whole(document["dims"], manifest.dims.to_json(), "$.dims", source, advice)
        return manifest

    def to_json(self) -> Json:
        """The document as it is written."""
        document: dict[str, Any] = msgspec.to_builtins(self)
        return {"format": FORMAT, **document}

    @classmethod
    def read(cls, folder: Path) -> "RepositoryManifest":
        """Read `folder`/manifest.json; no other file is looked at.

        Raises:
            ArtifactError: the folder is not a repository, is of another contract version, or an entry is wrong.
        """
        document = read_manifest(folder, FORMAT, ADVICE)
        version = document.get("contract_version")
        if version != CONTRACT_VERSION or isinstance(version, bool):
            raise ArtifactError(
                f"{folder} is a repository of contract version {version!r:.60}, this m3ad serves version "
                f"{CONTRACT_VERSION}. {ADVICE}"
            )
        return cls.from_json(document, str(folder / MANIFEST), ADVICE)


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
        found += [path for path in paths if path not in (MANIFEST, SIGNATURE) and path not in listed]
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
