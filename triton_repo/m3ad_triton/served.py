"""The models that one server holds, in a folder of its own: those of several repositories, equal stages once.

Triton polls that folder, so a category can be replaced while the others are served, and nobody can do so over the
network: with explicit model control whoever reaches a port may load code. The files are copies, so that nothing that
happens to a repository changes what is served: of a hard link, Triton takes a link more or less elsewhere (a second
server, the repository written anew) for a change, and loads that model again.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from m3ad.frame_door import tensor_door
from m3ad.serving import SERVING_PARAMETER, SHARED

from m3ad_triton import config
from m3ad_triton.frame_checks import FrameCheck, frame_checks
from m3ad_triton.golden import FOLDER, Golden
from m3ad_triton.repository import VERSION, Repository, stage_of

CONFIG = "config.pbtxt"


@dataclass(frozen=True, slots=True)
class Category:
    """A repository and under which names its stages are served.

    Attributes:
        names: a stage's model as its repository calls it -> as the server does.
        golden: the golden frame and its answer.
        checks: of the steps around the stages, for a category whose door takes frames.
        last: the model that every frame ends with, as it is served.
        trial: an ensemble of these stages that is no door, for a category that waits to be accepted.
    """

    repository: Repository
    names: dict[str, str]
    golden: Golden
    last: str
    checks: tuple[FrameCheck, ...] = ()
    trial: str = ""


class ServedModels:
    """The models of one server below `folder`.

    A stage's model is shared by all categories whose files and configurations of it are equal, whatever they warm up
    with; it is then named `shared_<stage>`.
    """

    def __init__(self, folder: Path, repositories: Sequence[Repository]) -> None:
        self.folder, self.parts = folder / "models", folder / "parts"
        self.folder.mkdir()
        self.parts.mkdir()
        self.places = [folder / "plugins" / r.manifest.category for r in repositories]
        self._names: dict[str, str] = {}  # what a stage's model is made of -> its name
        self._used: set[str] = set()
        for repository in repositories:
            self._used |= {*_doors(repository)}
        counted = Counter(made for repository in repositories for made in _stages(repository).values())
        self.categories = {r.manifest.category: self._name(r, counted) for r in repositories}
        for category, place in zip(self.categories.values(), self.places, strict=True):
            self._place_stages(category)
            for door in _doors(category.repository):
                self._place_door(category, door)
            for name in category.repository.manifest.files:
                if "/" not in name:
                    _take(category.repository.path / name, place / name)

    def propose(self, repository: Repository) -> Category:
        """Place those stages of a category's new repository that are not served yet, and a trial of all.

        The doors of the category stay as they are until `accept`.
        """
        category = self._name(repository, {})
        trial = self._unused(tensor_door(repository.manifest.category))
        proposal = replace(category, trial=trial)
        self._place_stages(proposal)
        self._place_door(proposal, tensor_door(repository.manifest.category), trial)
        return proposal

    def accept(self, proposal: Category) -> None:
        """Let the category's doors lead to the proposed stages. The old ones stay until `sweep`."""
        category = replace(proposal, trial="")
        self.categories[category.repository.manifest.category] = category
        for door in _doors(category.repository):
            self._place_door(category, door)

    def names(self) -> set[str]:
        """Every model that a category uses."""
        return {
            name
            for category in self.categories.values()
            for name in (*category.names.values(), *_doors(category.repository))
        }

    def sweep(self) -> None:
        """Remove what no category uses: old stages, trials, and proposals that were not accepted."""
        used = self.names()
        for path in [path for path in self.folder.iterdir() if path.name not in used]:
            gone = self.parts / path.name
            os.rename(path, gone)  # at once: a poll must not find half of a model
            shutil.rmtree(gone)
        self._names = {made: name for made, name in self._names.items() if name in used}

    def _name(self, repository: Repository, counted: Mapping[str, int]) -> Category:
        manifest, names = repository.manifest, {}
        golden = Golden.read(repository.path, manifest)
        last = config.model_name(manifest.category, manifest.contract.steps(manifest.layout)[-1].stage)
        for model, made in _stages(repository).items():
            if made not in self._names:
                stage = stage_of(model, repository.manifest)
                self._names[made] = self._unused(f"{SHARED}{stage}" if counted.get(made, 0) > 1 else model)
            names[model] = self._names[made]
        return Category(repository, names, golden, names[last], frame_checks(repository, golden))

    def _unused(self, wanted: str) -> str:
        """The name, or with a number where it was used before, as Triton may still be unloading that model."""
        name, number = wanted, 1
        while name in self._used:
            number += 1
            name = f"{wanted}.{number}"
        self._used.add(name)
        return name

    def _place_stages(self, category: Category) -> None:
        for model, name in category.names.items():
            if not (self.folder / name).exists():
                told = config.read_config(category.repository.path / model / CONFIG)
                told.name = name
                self._place(category.repository, model, told)

    def _place_door(self, category: Category, door: str, trial: str = "") -> None:
        told = config.read_config(category.repository.path / door / CONFIG)
        for step in told.ensemble_scheduling.step:
            step.model_name = category.names[step.model_name]
        if trial:
            told.name = trial
            del told.parameters[SERVING_PARAMETER]  # clients know a door by it
        self._place(category.repository, door, told)

    def _place(self, repository: Repository, model: str, told: Any) -> None:
        """Assemble a model aside and move it into place; of one that is there, the configuration alone changes."""
        part, target = self.parts / told.name, self.folder / told.name
        part.mkdir()
        (part / CONFIG).write_text(config.to_text(told), encoding="utf-8")
        if target.exists():
            os.replace(part / CONFIG, target / CONFIG)
            part.rmdir()
            return
        for name in _files(repository, model):
            if name != CONFIG and not name.startswith(f"{FOLDER}/"):
                _take(repository.path / model / name, part / name)
        if (part / VERSION / "model.py").exists():
            # Python then writes no byte code, which a poll would take for a change of the model.
            (part / VERSION / "__pycache__").touch()
        os.rename(part, target)


def _take(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _doors(repository: Repository) -> list[str]:
    category = repository.manifest.category
    return [tensor_door(category), *([category] if repository.manifest.frames else [])]


def _stages(repository: Repository) -> dict[str, str]:
    """The models of a repository besides its doors -> what each is made of, as a hash."""
    models = dict.fromkeys(name.partition("/")[0] for name in repository.manifest.files if "/" in name)
    return {model: _made_of(repository, model) for model in models if model not in _doors(repository)}


def _made_of(repository: Repository, model: str) -> str:
    told = config.read_config(repository.path / model / CONFIG)
    told.name = ""
    del told.model_warmup[:]
    contract, stage = repository.manifest.contract, stage_of(model, repository.manifest)
    form = contract.method.cpu.get(str(stage))
    if form is not None and form.kind == "graph":
        # One graph and nothing else: the method and sizes of the head behind it do not matter.
        told.parameters.pop(config.STAGE_PARAMETER, None)
    files = {
        name: repository.manifest.files[f"{model}/{name}"].sha256
        for name in _files(repository, model)
        if name.startswith(f"{VERSION}/")
    }
    made = [repr(contract.stages.get(str(stage))), config.to_text(told), files]
    return hashlib.sha256(json.dumps(made).encode()).hexdigest()


def _files(repository: Repository, model: str) -> Iterable[str]:
    """A model's files, by path below its folder."""
    listed = sorted(repository.manifest.files)
    return [name.partition("/")[2] for name in listed if name.startswith(f"{model}/")]
