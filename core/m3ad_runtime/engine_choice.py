"""Which engines of a bundle run on this machine; why not, and which command builds some that do."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from m3ad.bundle import Bundle, verify_files
from m3ad.contract import Layout
from m3ad.engines import Engines, engine_folders
from m3ad.errors import ArtifactError
from m3ad.methods.common import HEAD_PARTS

Runtime = Literal["auto", "onnxruntime", "tensorrt", "tensorrt_rtx"]
RUNTIMES: tuple[Runtime, ...] = ("auto", "onnxruntime", "tensorrt", "tensorrt_rtx")
GpuRuntime = Literal["tensorrt", "tensorrt_rtx"]
GPU_RUNTIMES: tuple[GpuRuntime, ...] = ("tensorrt", "tensorrt_rtx")  # the whole head comes before its parts
TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}


@dataclass(frozen=True, slots=True)
class Machine:
    """What engines run on.

    Attributes:
        compute_capability: of the GPU, as in 8.9.
        version: of the runtime that is asked for, all four numbers.
    """

    compute_capability: str
    version: str


@dataclass(frozen=True, slots=True)
class Chosen:
    """The engines of one target, and the plans that make up each stage of a layout, in order."""

    engines: Engines
    stages: dict[str, tuple[str, ...]]

    def plans(self) -> list[Path]:
        """Every plan once."""
        return [self.engines.plan(name) for names in self.stages.values() for name in names]

    def needs_plugins(self) -> bool:
        """Whether a plan has layers that only the plugin library knows."""
        entries = self.engines.manifest["files"]
        return any(entries[path.name].get("plugin_layers") for path in self.plans())


def build_command(bundle: Bundle, runtime: GpuRuntime, compute_capability: str = "") -> str:
    """The command that builds engines for this runtime on a GPU of this compute capability."""
    digits = compute_capability.replace(".", "")
    target = "native" if runtime == "tensorrt" else f"sm{digits}" if digits else "TARGET"
    return f"m3ad-export build-engine {bundle.path} --target {target}"


def engines_for(bundle: Bundle, runtime: GpuRuntime) -> list[Engines]:
    """A bundle's engines for a runtime.

    Raises:
        ArtifactError: it has none, or a manifest is damaged.
    """
    build = f"build them: {build_command(bundle, runtime)}"
    found = [Engines.open(folder, build.capitalize()) for folder in engine_folders(bundle.path)]
    if fitting := [engines for engines in found if engines.manifest.get("runtime") == runtime]:
        return fitting
    runtimes = [str(e.manifest.get("runtime") or "a runtime that is not recorded") for e in found]
    others = ", ".join(
        f"{TITLES.get(name, name)} ({e.target})" for name, e in zip(runtimes, found, strict=True)
    )
    only = f", only for {others}" if others else ""
    raise ArtifactError(f"{bundle.path} has no engines for {TITLES[runtime]}{only}; {build}")


def choose(bundle: Bundle, layout: Layout, runtime: GpuRuntime, machine: Machine) -> Chosen:
    """The engines of a layout that run on a machine, verified.

    Raises:
        ArtifactError: those of the bundle are for another GPU or TensorRT, of another state of the bundle, lack a stage
            or were changed.
    """
    build = build_command(bundle, runtime, machine.compute_capability)
    found = engines_for(bundle, runtime)
    capable = [e for e in found if e.compute_capability == machine.compute_capability]
    if not capable:
        have = ", ".join(f"{e.compute_capability} ({e.target})" for e in found)
        raise ArtifactError(
            f"{bundle.path} has {TITLES[runtime]} engines for compute capability {have}, this GPU has "
            f"{machine.compute_capability}; build for it: {build}"
        )
    same = [e for e in capable if e.manifest.get("runtime_version") == machine.version]
    if not same:
        have = ", ".join(str(e.manifest.get("runtime_version")) for e in capable)
        raise ArtifactError(
            f"{capable[0].path} was built by {TITLES[runtime]} {have}, version {machine.version} is installed and "
            f"plans are for one version; build again: {build}"
        )
    (engines, *_) = same
    stages = dict.fromkeys(step.stage for step in bundle.contract.steps(layout))
    chosen = Chosen(engines, {stage: _plans_of(engines, stage, layout, build) for stage in stages})
    _verify_sources(bundle, chosen, build)
    files = {path.name: engines.manifest["files"][path.name] for path in chosen.plans()}
    verify_files(engines.path, files, f"Build again: {build}")
    return chosen


def _plans_of(engines: Engines, stage: str, layout: Layout, build: str) -> tuple[str, ...]:
    """The plans of a stage: one, or the parts of a head that could not be built whole."""
    files: dict[str, Any] = engines.manifest["files"]
    options: Sequence[tuple[str, ...]] = ((stage,), HEAD_PARTS) if stage == "head" else ((stage,),)
    for names in options:
        if all(f"{name}.plan" in files for name in names):
            return names
    raise ArtifactError(
        f"{engines.path} has no plan of stage {stage}; build the layout: {build} --layout {layout}"
    )


def _verify_sources(bundle: Bundle, chosen: Chosen, build: str) -> None:
    """Check that the graphs and weights which the plans were built of are the bundle's."""
    for path in chosen.plans():
        for name, sha256 in chosen.engines.manifest["files"][path.name].get("source_files", {}).items():
            entry = bundle.manifest.files.get(f"onnx/{name}")
            if entry is None or entry.sha256 != sha256:
                raise ArtifactError(
                    f"{path} was built of another {name} than lies in {bundle.path / 'onnx'}; build again: {build}"
                )
