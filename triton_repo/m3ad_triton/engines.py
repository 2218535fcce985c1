"""The engines of a bundle that Triton can serve, and the plugin libraries that go with them."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m3ad.bundle import Bundle, verify_files
from m3ad.engines import Engines, engine_folders
from m3ad.errors import ArtifactError, MissingDependencyError

RUNTIME = "tensorrt"


def find_engines(bundle: Bundle, names: Sequence[str], targets: Sequence[str]) -> tuple[Engines, ...]:
    """The TensorRT engines of a bundle, verified, one per compute capability.

    Args:
        bundle: a verified bundle.
        names: the stages that need a plan.
        targets: which engines to take; all that Triton can run when empty.

    Raises:
        ArtifactError: there are none, one was built for TensorRT-RTX, lacks a plan or was changed, or two are for
            the same compute capability.
    """
    folders = engine_folders(bundle.path)
    build = f"Build them: m3ad-export build-engine {bundle.path} --target TARGET"
    if unknown := set(targets) - {p.name for p in folders}:
        have = ", ".join(p.name for p in folders) or "none"
        raise ArtifactError(
            f"{bundle.path} has no engines for {', '.join(sorted(unknown))}, only: {have}. {build}"
        )
    found = [Engines.open(p, build) for p in folders if not targets or p.name in targets]
    usable = [engine for engine in found if engine.manifest.get("runtime") == RUNTIME]
    if not usable or (targets and len(usable) < len(found)):
        why = (
            f"those of {', '.join(e.target for e in found)} are TensorRT-RTX plans, for which Triton has no backend; "
            if found
            else ""
        )
        raise ArtifactError(
            f"{bundle.path} has no TensorRT engines for Triton: {why}build them on the machine that serves "
            f"(m3ad-export build-engine {bundle.path} --target native) or serve on the CPU: --runtime onnxruntime"
        )
    by_capability: dict[str, Engines] = {}
    for engine in usable:
        first = by_capability.setdefault(engine.compute_capability, engine)
        if first is not engine:
            raise ArtifactError(
                f"engines {first.target} and {engine.target} are both for compute capability "
                f"{engine.compute_capability}; choose with --target"
            )
        verify_files(engine.path, engine.manifest["files"], build)
        if missing := [name for name in names if f"{name}.plan" not in engine.manifest["files"]]:
            raise ArtifactError(f"{engine.path} has no plan of {', '.join(missing)}. {build}")
    return tuple(usable)


def place_plugins(engines: Sequence[Engines], folder: Path) -> dict[str, Any]:
    """Copy the plugin library and the shim of each TensorRT major beside the models; return what was placed.

    A shim registers the library's plugins when Triton's plain dlopen loads it; it looks for the library in its own
    folder. Without a built library the repository is still written, and `m3ad-triton check` says what it lacks.
    """
    majors = sorted({e.tensorrt_major for e in engines if e.tensorrt_major is not None})
    if not majors:
        return {"library": None, "shims": [], "missing": None}
    from m3ad_plugins.library import library_path, shim_path

    try:
        library, shims = library_path(), [shim_path(major) for major in majors]
    except MissingDependencyError as error:
        return {"library": None, "shims": [], "missing": str(error)}
    for file in (library, *shims):
        shutil.copyfile(file, folder / file.name)
    return {"library": library.name, "shims": [shim.name for shim in shims], "missing": None}
