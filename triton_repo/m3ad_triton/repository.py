"""A model repository: written from a bundle, opened by the server and by the checks.

On disk: one folder per model as Triton wants them, and beside them, where Triton does not look, `manifest.json` and
the plugin libraries.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from m3ad.bundle import (
    MANIFEST,
    Bundle,
    file_entries,
    new_folder,
    sha256_of,
    write_json,
)
from m3ad.camera import Camera
from m3ad.contract import CONTRACT_VERSION, Layout, Step
from m3ad.engines import Engines
from m3ad.errors import ArtifactError
from m3ad.frame_door import ADMIT, JUDGE, PREPARE, DepthType, door_stages
from m3ad.serving import RECORD_PARAMETER, DepthInput, ServingRecord, require_model_name

from m3ad_triton import config
from m3ad_triton.engines import find_engines, place_plugins
from m3ad_triton.golden import write_golden
from m3ad_triton.manifest import ADVICE, FORMAT, RepositoryManifest, Runtime, file_problems

VERSION = "1"
MODEL_PY = '''"""The stage that this model's parameters name."""

from m3ad_triton.stage_model import TritonPythonModel  # noqa: F401
'''
GATE_PY = '''"""Where a door begins."""

from m3ad_triton.gate import TritonPythonModel  # noqa: F401
'''
STEP_PY = {
    **dict.fromkeys(config.GATES, GATE_PY),
    PREPARE: '''"""A frame's tensors, by the settings in this model's parameters."""

from m3ad_triton.frame_models import Prepare as TritonPythonModel  # noqa: F401
''',
    ADMIT: '''"""Tensors as they are, in their turn."""

from m3ad_triton.frame_models import Admit as TritonPythonModel  # noqa: F401
''',
    JUDGE: '''"""A part's verdict and defects, by the settings in this model's parameters."""

from m3ad_triton.frame_models import Judge as TritonPythonModel  # noqa: F401
''',
}


@dataclass(frozen=True, slots=True)
class Repository:
    """A model repository: its folder and its manifest."""

    path: Path
    manifest: RepositoryManifest

    @classmethod
    def open(cls, path: Path) -> "Repository":
        """Open a repository and check every entry of its manifest and every file: all listed ones and no other.

        Raises:
            ArtifactError: the folder is not a repository, is of another contract version, its manifest is wrong, a file
                was changed, or one is not listed.
        """
        manifest = RepositoryManifest.read(path)
        if problems := file_problems(path, manifest):
            raise ArtifactError(first_of(path, problems))
        return cls(path.absolute(), manifest)


def first_of(path: Path, problems: Sequence[str]) -> str:
    """The first problem of a repository in one sentence, and how to see the others."""
    more = f" ({len(problems) - 1} more: m3ad-triton check {path})" if len(problems) > 1 else ""
    return f"{path} cannot be served: {problems[0]}{more}"


def write_repository(
    bundle_path: Path,
    target: Path,
    runtime: Runtime,
    layout: Layout | None = None,
    engine_targets: Sequence[str] = (),
    *,
    frames: bool = True,
    depth: DepthType | None = None,
    camera: Camera | None = None,
    queue: config.Queue = config.QUEUE,
) -> Repository:
    """Write the model repository of a bundle; an older one in its place is replaced.

    Args:
        bundle_path: what `m3ad-export bundle` wrote.
        target: the folder to write.
        runtime: onnxruntime runs the stages in Triton's Python backend on the CPU, tensorrt as plans.
        layout: chain has one model a stage of the paper's, fused has one `head`; the one to ship when left out.
        engine_targets: which of the bundle's engines to take, by target; all when left out.
        frames: also write the door that takes frames, whose first and last steps need Python on the server.
        depth: let that door take depth images of this type instead of clouds.
        camera: of the depth images; the bundle's when left out.
        queue: how long a frame may wait at a door before it is refused, and how many may.

    Raises:
        ArtifactError: the bundle lacks a file, an engine, a camera or golden data, or `target` is something else.
    """
    bundle = Bundle.open(bundle_path)
    bundle.verify_usable()
    written = bundle.precision
    require_model_name(bundle.name, "export it under another: m3ad-export bundle --category NAME")
    contract = bundle.contract
    layout = bundle.layout(layout)
    wiring = contract.steps(layout)
    names = list(dict.fromkeys(step.stage for step in wiring))
    of_depth = _depth_input(bundle, depth, camera) if depth else None
    engines = find_engines(bundle, names, engine_targets) if runtime == "tensorrt" else ()
    with new_folder(target, FORMAT) as folder:
        for name in names:
            model = folder / config.model_name(bundle.name, name)
            (model / VERSION).mkdir(parents=True)
            first_use = next(step for step in wiring if step.stage == name)
            warmup = _write_warmup(bundle, first_use, model / config.WARMUP_FOLDER)
            text = _write_stage(bundle, name, model, engines, warmup)
            (model / "config.pbtxt").write_text(text, encoding="utf-8")
        serving = {
            "runtime": runtime,
            "precision": ", ".join(sorted({e.precision for e in engines})) if engines else written,
            "model_bytes": _model_bytes(folder, len(engines) or 1),
            "refine": None if engines else bundle.refine,
        }
        record = ServingRecord.of(bundle, layout, of_depth)
        on_cpu = not engines
        door = config.tensor_ensemble(record, serving, on_cpu=on_cpu)
        _write_model(folder, door)
        write_golden(bundle, folder / door.name)
        for step in config.steps_around(frames=frames, on_cpu=on_cpu):
            if step in config.GATES:
                model = config.plain_step(config.model_name(bundle.name, step), door_stages(contract)[step])
            else:
                model = config.frame_step(record, step, queue, on_cpu=on_cpu)
            _write_model(folder, model, STEP_PY[step])
        if frames:
            _write_model(folder, config.frame_ensemble(record, serving))
        plugins = place_plugins(engines, folder)
        manifest = RepositoryManifest.from_json(
            {
                "contract_version": CONTRACT_VERSION,
                "category": bundle.name,
                "layout": layout,
                **serving,
                "method": contract.method.name,
                "dims": bundle.dims.to_json(),
                "lattice": contract.lattice,
                "weights": record.weights,
                "bundle_sha256": sha256_of(bundle.path / MANIFEST),
                "engines": [engine.summary() for engine in engines],
                "plugins": plugins,
                "cuda_pool_bytes": config.intermediate_bytes(contract, layout),
                "shared_memory_bytes": config.shared_memory_bytes(
                    contract, None if engines else layout, frames=frames
                ),
                "frames": frames,
                "depth": depth,
                "queue_timeout_s": queue.timeout_s,
                "queue_frames": queue.frames,
                "files": file_entries(folder),
            },
            f"the repository of {bundle.path}",
            "Export the bundle again: m3ad-export bundle",
        )
        write_json(folder / MANIFEST, manifest.to_json())
    return Repository(target.absolute(), manifest)


def _depth_input(bundle: Bundle, depth: DepthType, camera: Camera | None) -> DepthInput:
    found = camera or bundle.preprocessing.camera
    if found is None:
        raise ArtifactError(
            f"{bundle.path} knows no camera, which depth images need to become points; give its intrinsics: "
            "m3ad-triton write --camera FILE"
        )
    return DepthInput(depth, found)


def verify_distinct(repositories: Sequence[Repository]) -> None:
    """Check that one server can hold these repositories: Triton serves none of two models of one name.

    Raises:
        ArtifactError: two are of one category, or a category is named as another's stage.
    """
    owners: dict[str, Repository] = {}
    for repository in repositories:
        for model in dict.fromkeys(
            name.partition("/")[0] for name in repository.manifest.files if "/" in name
        ):
            first = owners.setdefault(model, repository)
            if first is not repository:
                raise ArtifactError(
                    f"{first.path} and {repository.path} both hold a model `{model}`, and one server holds one of a "
                    "name; serve them with two servers, or export one bundle under another category"
                )


def server_arguments(
    repositories: Sequence[Repository], places: Sequence[str], models: str | None = None
) -> list[str]:
    """Arguments of a tritonserver that serves these repositories, each seen by the server at its place.

    With `models` the models of all lie in that folder, and only plugins at the places.

    The configurations are complete, so auto-complete is off: it would load every plan one extra time.
    """
    pool = max(r.manifest.cuda_pool_bytes for r in repositories)
    shims = [
        f"{place}/{shim}"
        for repository, place in zip(repositories, places, strict=True)
        for shim in repository.manifest.plugins.shims
    ]
    return [
        *(f"--model-repository={place}" for place in ([models] if models else places)),
        "--disable-auto-complete-config",
        "--strict-readiness=true",
        "--rate-limit=execution_count",
        f"--cuda-memory-pool-byte-size=0:{pool}",
        *([f"--backend-config=tensorrt,plugins={';'.join(shims)}"] if shims else []),
    ]


def _write_model(folder: Path, model: Any, code: str | None = None) -> None:
    """A model's folder: its configuration, and its code or, of an ensemble, nothing."""
    version = folder / model.name / VERSION
    version.mkdir(parents=True)
    if code is None:
        (version / ".keep").touch()  # Triton wants the empty folder, archives drop it
    else:
        (version / "model.py").write_text(code, encoding="utf-8")
    (folder / model.name / "config.pbtxt").write_text(config.to_text(model), encoding="utf-8")


def _write_stage(
    bundle: Bundle,
    name: str,
    model: Path,
    engines: Sequence[Engines],
    warmup: dict[str, npt.NDArray[Any]],
) -> str:
    stage, version = bundle.contract.stages[name], model / VERSION
    if engines:
        plans = {engine.compute_capability: f"{engine.target}.plan" for engine in engines}
        for engine in engines:
            shutil.copyfile(engine.plan(name), version / f"{engine.target}.plan")
        return config.to_text(config.tensorrt_stage(model.name, stage, plans, warmup))
    for file in bundle.contract.method.cpu[name].files:
        shutil.copyfile(bundle.file(f"onnx/{file}"), version / file)
    (version / "model.py").write_text(MODEL_PY, encoding="utf-8")
    return config.to_text(config.python_stage(model.name, stage, bundle.contract, warmup, bundle.refine))


def _write_warmup(bundle: Bundle, step: Step, folder: Path) -> dict[str, npt.NDArray[Any]]:
    """Write a stage's inputs of the golden frame as raw bytes."""
    folder.mkdir()
    arrays = {}
    for tensor in bundle.contract.stages[step.stage].inputs:
        path = bundle.file(f"golden/{step.inputs[tensor.name]}.npy")
        array = np.load(path, allow_pickle=False)
        if problem := tensor.mismatch(array):
            raise ArtifactError(f"{path}: {problem}; export the bundle again: m3ad-export bundle")
        (folder / tensor.name).write_bytes(np.ascontiguousarray(array).tobytes())
        arrays[tensor.name] = array
    return arrays


def _model_bytes(folder: Path, copies: int) -> int:
    """Bytes of the ONNX files or plans that one server loads: nearly all of it weights."""
    kinds = ("*.onnx", "*.weights", "*.plan")
    return sum(path.stat().st_size for kind in kinds for path in folder.rglob(kind)) // copies


def stage_of(model: str, manifest: RepositoryManifest) -> str | None:
    """The stage a model of a repository stands for, or None when it is not one of its stage models."""
    around = config.steps_around(frames=manifest.frames, on_cpu=manifest.on_cpu)
    stages = [*manifest.contract.stages, *around]
    return {config.model_name(manifest.category, stage): stage for stage in stages}.get(model)


def record_of(model: Any) -> ServingRecord:
    """The serving record in a model's parameters."""
    text = model.parameters[RECORD_PARAMETER].string_value
    return ServingRecord.from_json(text, f"parameter `{RECORD_PARAMETER}` of model `{model.name}`", ADVICE)
