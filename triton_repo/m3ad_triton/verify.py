"""Checks of a model repository without a server: what Triton's core checks of an ensemble, and what it does not.

Every problem is one sentence that names both sides; all are found in one go. Triton itself stops at the first.
Nothing of a repository is loaded or run for it.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

from m3ad.contract import Stage
from m3ad.errors import ArtifactError
from m3ad.frame_door import door_stages, door_steps, tensor_door, tensor_steps
from m3ad.method import Contract
from m3ad.serving import RECORD_PARAMETER

from m3ad_triton import config
from m3ad_triton.elf import library_problem
from m3ad_triton.engines import RUNTIME
from m3ad_triton.manifest import ADVICE, RepositoryManifest, file_problems
from m3ad_triton.repository import MODEL_PY, STEP_PY, VERSION, first_of, record_of, stage_of
from m3ad_triton.wiring import ensemble_problems, spell

CONFIG = "config.pbtxt"
OURS = ("model_warmup",)  # fields of a stage that were looked at already


def find_problems(path: Path, *, with_files: bool = True) -> list[str]:
    """Every problem of the repository at `path`, one sentence each; empty when it can be served.

    Args:
        path: the repository.
        with_files: hash every file too; not needed where they were hashed a moment ago, or are about to be.

    Raises:
        ArtifactError: the folder is not a repository of this contract version at all, or its manifest is wrong.
    """
    manifest = RepositoryManifest.read(path)
    problems = file_problems(path, manifest) if with_files else []
    configs, unreadable = read_configs(path)
    problems += unreadable
    for name, model in configs.items():
        if model.name != name:
            problems.append(f"folder `{name}` holds the configuration of a model named `{model.name}`")
        if model.platform == "ensemble":
            problems += ensemble_problems(model, configs)
        else:
            problems += _stage_problems(path / name, model, manifest)
    ensembles = [name for name, model in configs.items() if model.platform == "ensemble"]
    for door in doors(manifest):
        if door in ensembles:
            problems += _contract_problems(configs[door], manifest)
        else:
            problems.append(f"no ensemble is named `{door}`, a door of the category; found {ensembles}")
    problems = problems or _different_records(configs, manifest)
    used = {step.model_name for name in ensembles for step in configs[name].ensemble_scheduling.step}
    problems += [f"model `{name}` is used by no ensemble" for name in configs.keys() - used - {*ensembles}]
    return [*problems, *_plugin_problems(path, manifest)]


def doors(manifest: RepositoryManifest) -> list[str]:
    """The ensembles that a repository has, by name."""
    return [tensor_door(manifest.category), *([manifest.category] if manifest.frames else [])]


def verify_repository(path: Path, *, with_files: bool = True) -> None:
    """Check a repository; arguments as of `find_problems`.

    Raises:
        ArtifactError: it has problems; the first is told, and how to see all.
    """
    problems = find_problems(path, with_files=with_files)
    if problems:
        raise ArtifactError(first_of(path, problems))


def read_configs(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Every model's configuration by folder name, and what kept the others from being read."""
    configs, problems = {}, []
    for folder in sorted(p for p in path.iterdir() if p.is_dir()):
        if not (folder / CONFIG).is_file():
            problems.append(f"folder `{folder.name}` has no {CONFIG}, Triton would refuse it as a model")
            continue
        try:
            configs[folder.name] = config.read_config(folder / CONFIG)
        except ValueError as error:
            problems.append(f"{folder / CONFIG} is not a model configuration: {error}")
            continue
        versions = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name.isdigit())
        if not versions:
            problems.append(f"model `{folder.name}` has no version folder; expected {folder / VERSION}")
        elif versions != [VERSION]:
            problems.append(
                f"model `{folder.name}` has the version folders {', '.join(versions)}, Triton would serve the last; "
                f"expected {VERSION} alone"
            )
    return configs, problems


def _stage_problems(folder: Path, model: Any, manifest: RepositoryManifest) -> list[str]:
    name = stage_of(model.name, manifest)
    if name is None:
        return [f"model `{model.name}` is no stage of category {manifest.category}"]
    stage, problems = _stage(name, manifest), []
    for kind, tensors, entries in (
        ("input", stage.inputs, model.input),
        ("output", stage.outputs, model.output),
    ):
        expected = {t.name: (config.DTYPES[t.dtype], list(t.shape)) for t in tensors}
        found = {t.name: (t.data_type, list(t.dims)) for t in entries}
        problems += [
            f"{kind} `{tensor}` of model `{model.name}` is {spell(found.get(tensor))}, the contract's "
            f"{name} has {spell(expected.get(tensor))}"
            for tensor in sorted(expected.keys() | found.keys())
            if expected.get(tensor) != found.get(tensor)
        ]
    if name in STEP_PY:
        files, expected_code = {"model.py"}, STEP_PY[name]
    elif manifest.runtime == RUNTIME:
        files, expected_code = (
            {*model.cc_model_filenames.values(), model.default_model_filename or "model.plan"},
            "",
        )
    else:
        files, expected_code = {*manifest.contract.method.cpu[name].files, "model.py"}, MODEL_PY
    code = folder / VERSION / "model.py"
    if expected_code and code.is_file() and code.read_bytes() != expected_code.encode():
        problems.append(f"{code} is not the code that m3ad writes there. {ADVICE}")
    problems += [
        f"model `{model.name}` has no file {VERSION}/{file}. {ADVICE}"
        for file in sorted(files)
        if not _holds(folder, f"{VERSION}/{file}", manifest)
    ]
    for sample in model.model_warmup:
        for tensor, entry in sample.inputs.items():
            relative = f"{config.WARMUP_FOLDER}/{entry.input_data_file}"
            file, expected_size = folder / relative, _bytes(entry.dims)
            size = file.stat().st_size if _holds(folder, relative, manifest) else None
            if size != expected_size:
                problems.append(
                    f"warm-up of model `{model.name}` reads `{tensor}` from {file}, {size or 'no'} bytes, "
                    f"expected {expected_size}"
                )
    if name in STEP_PY and name not in config.GATES:
        problems += _record_problems(model, manifest)
    return problems or _odd_fields(model, _expected_stage(model, name, manifest), OURS)


def _stage(name: str, manifest: RepositoryManifest) -> Stage:
    return {**manifest.contract.stages, **door_stages(manifest.contract, manifest.depth)}[name]


def _expected_stage(model: Any, name: str, manifest: RepositoryManifest) -> Any:
    """A stage's configuration as it is written, without warm-up."""
    if name in config.GATES:
        return config.plain_step(model.name, _stage(name, manifest))
    if name in STEP_PY:
        queue = config.Queue(timeout_s=manifest.queue_timeout_s, frames=manifest.queue_frames)
        return config.frame_step(record_of(model), name, queue, on_cpu=manifest.on_cpu)
    stage = _stage(name, manifest)
    if manifest.runtime == RUNTIME:
        plans = {e["compute_capability"]: f"{e['target']}.plan" for e in manifest.engines}
        return config.tensorrt_stage(model.name, stage, plans, {})
    return config.python_stage(model.name, stage, manifest.contract, {}, manifest.refine)


def _odd_fields(model: Any, expected: Any, ours: tuple[str, ...]) -> list[str]:
    """Fields in which a configuration differs from what m3ad writes; `ours` were looked at already."""
    odd = [
        field.name
        for field in model.DESCRIPTOR.fields
        if field.name not in ours and getattr(model, field.name) != getattr(expected, field.name)
    ]
    told = ", ".join(f"`{name}`" for name in odd)
    return [f"model `{model.name}` differs from what m3ad writes in {told}. {ADVICE}"] if odd else []


def _holds(folder: Path, relative: str, manifest: RepositoryManifest) -> bool:
    """A file that a configuration names is there, and listed: a name may not lead out of the repository."""
    return f"{folder.name}/{relative}" in manifest.files and (folder / relative).is_file()


def _contract_problems(ensemble: Any, manifest: RepositoryManifest) -> list[str]:
    """Compare the ensemble's steps with the contract's wiring and read its parameters."""
    on_cpu = manifest.on_cpu
    steps = (tensor_steps if on_cpu else Contract.steps)(manifest.contract, manifest.layout)
    write = partial(config.tensor_ensemble, on_cpu=on_cpu)
    if ensemble.name == manifest.category:
        steps = door_steps(manifest.contract, manifest.layout, manifest.depth)
        write = partial(config.frame_ensemble)
    expected = [
        (config.model_name(manifest.category, s.stage), dict(s.inputs), dict(s.outputs)) for s in steps
    ]
    found = [(s.model_name, dict(s.input_map), dict(s.output_map)) for s in ensemble.ensemble_scheduling.step]
    problems = [
        f"ensemble `{ensemble.name}` wires {got[0]} {got[1]} -> {got[2]}, the contract's {manifest.layout} "
        f"layout {want[0]} {want[1]} -> {want[2]}"
        for got, want in zip(found, expected, strict=False)
        if got != want
    ]
    if len(found) != len(expected):
        problems.append(
            f"ensemble `{ensemble.name}` has {len(found)} steps, the contract's {manifest.layout} layout "
            f"{len(expected)}"
        )
    problems += _record_problems(ensemble, manifest)
    return problems or _odd_fields(ensemble, write(record_of(ensemble), {}), ("parameters",))


def _record_problems(model: Any, manifest: RepositoryManifest) -> list[str]:
    """What a model's record says otherwise than the manifest."""
    told, problems = f"parameter `{RECORD_PARAMETER}` of model `{model.name}`", []
    try:
        record = record_of(model)
        lattice = record.contract.lattice
    except ArtifactError as error:
        return [str(error)]
    for name in ("contract_version", "method", "category", "layout", "weights"):
        said, listed = getattr(record, name), getattr(manifest, name)
        if said != listed:
            problems.append(f"{told} says {name} {said!r}, the manifest {listed!r}")
    if record.depth_type != manifest.depth:
        problems.append(f"{told} says depth {record.depth_type!r}, the manifest {manifest.depth!r}")
    if record.dims != manifest.dims:
        problems.append(
            f"{told} says sizes {record.dims.to_json()!r}, the manifest {manifest.dims.to_json()}"
        )
    if lattice != manifest.lattice:
        problems.append(f"{told} says lattice {lattice}, the manifest {manifest.lattice}")
    return problems


def _different_records(configs: dict[str, Any], manifest: RepositoryManifest) -> list[str]:
    """Models whose record is not that of the door for tensors: client and server would prepare differently."""
    texts = {
        name: model.parameters[RECORD_PARAMETER].string_value
        for name, model in configs.items()
        if RECORD_PARAMETER in model.parameters
    }
    door = tensor_door(manifest.category)
    return [
        f"parameter `{RECORD_PARAMETER}` of model `{name}` differs from that of `{door}`. {ADVICE}"
        for name, text in texts.items()
        if text != texts.get(door, text)
    ]


def _plugin_problems(path: Path, manifest: RepositoryManifest) -> list[str]:
    if manifest.runtime != RUNTIME:
        return []
    plugins = manifest.plugins
    if plugins.library is None:
        why = plugins.missing or "the engines' manifest records no TensorRT version to choose a shim by"
        return [
            f"the engines need the plugin library and none lies in {path}: {why}; then: m3ad-triton write"
        ]
    # Triton would only log this and fail later with "creator not found".
    problem = library_problem(path / plugins.library)
    return [f"plugin library {path / plugins.library} cannot be loaded here: {problem}"] if problem else []


def _bytes(dims: Any) -> int:
    return config.VALUE_BYTES * int(math.prod(dims))
