"""Engines on disk: `bundle/engines/<target>/`, plans with a manifest of their own; they are added to a bundle later."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field

from m3ad.bundle import MANIFEST, read_manifest
from m3ad.manifest import FileEntry, Sha256
from m3ad.typed_json import typed

FORMAT = "m3ad-engines"
Precision = Literal["fp32", "fp16", "bf16"]  # of the matrix products, where the bundle is fp32
Version = Annotated[str, Meta(pattern=r"^[0-9]{1,4}(\.[0-9A-Za-z.+-]*)?\Z")]


class PlanEntry(FileEntry, frozen=True):
    """What is read of one plan's entry: its layers that are plugins, and the hashes of the files it was built of."""

    plugin_layers: list[str] = field(default_factory=list)
    source_files: dict[str, Sha256] = field(default_factory=dict)


class EngineManifest(Struct, frozen=True):
    """What is read of an engine folder's manifest; the rest is recorded for people."""

    target: str
    compute_capability: str
    files: dict[str, PlanEntry]
    runtime: str | None = None
    runtime_version: Version | None = None
    precision: str | None = None


@dataclass(frozen=True, slots=True)
class Engines:
    """One target's engines, as their manifest describes them; `bundle.verify_files` checks the plans."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path, advice: str) -> "Engines":
        """Read the manifest of `engines/<target>/`.

        Raises:
            ArtifactError: it is not a folder of engines, or an entry is wrong; `advice` says what to do.
        """
        document = read_manifest(path, FORMAT, advice)
        typed(document, EngineManifest, str(path / MANIFEST), advice)
        return cls(path, document)

    @property
    def target(self) -> str:
        """The target's name, as in sm89."""
        return str(self.manifest["target"])

    @property
    def compute_capability(self) -> str:
        """The compute capability the plans were built for, as in 8.9."""
        return str(self.manifest["compute_capability"])

    @property
    def precision(self) -> str:
        """The precision the plans were built with."""
        return str(self.manifest.get("precision", "not recorded"))

    @property
    def tensorrt_major(self) -> int | None:
        """TensorRT's major version, or None when it was not recorded."""
        version = self.manifest.get("runtime_version")
        return None if version is None else int(version.split(".")[0])

    def plan(self, stage: str) -> Path:
        """The path of a stage's plan."""
        return self.path / f"{stage}.plan"

    def summary(self) -> dict[str, Any]:
        """What a repository records of them."""
        return {key: value for key, value in self.manifest.items() if key not in ("format", "files")}


def engine_folders(bundle: Path) -> list[Path]:
    """The folder of every target a bundle has engines for, by name; hidden ones are of builds that were cut off."""
    folders = (bundle / "engines").glob("*")
    return sorted(p for p in folders if p.is_dir() and not p.name.startswith("."))
