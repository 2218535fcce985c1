"""CRD and TRD: each modality's levels of one frozen network, rebuilt by a student that leans on the other modality.

References:
    CRD  https://github.com/hito2448/CRD (no licence, its weights are unpublished); TRD by the same authors
Exported are the trained networks with every BatchNorm in the convolution before it: convolutions and ReLU alone.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from m3ad.bundle import sha256_of
from m3ad.errors import ArtifactError
from m3ad.methods.crd import METHODS, STAGES
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from m3ad_export.checkpoints import load_strictly, read_checkpoint, tensors_of
from m3ad_export.detector import Detector
from m3ad_export.heads.crd import MAPS, StandardisedSum, Student, new_student, raw_map
from m3ad_export.heads.fold import fold_convolutions
from m3ad_export.method import Fitted, Form, Implementation, Job, Networks
from m3ad_export.nets.configs import WideResNetConfig
from m3ad_export.nets.wide_resnet import PairTeacher, WideResNet
from m3ad_export.official_files import official_file
from m3ad_export.train.crd import CrdSettings, levels_of, standardised, train_students
from m3ad_export.train.features import FrameFeatures
from m3ad_export.weights import WeightsInfo

LICENCE = "none: all rights reserved"
STUDENTS = STAGES[1:3]


def fit(job: Job) -> Fitted:
    """Train both students on good frames, then scale their maps on frames that they never saw."""
    config: CrdSettings = job.settings
    teacher = job.teacher
    assert teacher
    students = {name: new_student(teacher.config, config.seed + k) for k, name in enumerate(STUDENTS)}
    losses = train_students(job.samples, job.extract, teacher, students, job.folder, config, job.track)
    vote = standardised(job.validation, job.extract, teacher, students, job.track)
    return Fitted({**students, "vote": vote}, {}, losses)


def build(record: Mapping[str, Any]) -> Networks:
    """Untrained networks of a record."""
    sizes = {k: v for k, v in record["encoders"]["teacher"].items() if k != "weights"}
    config = WideResNetConfig(**sizes)
    return {**{name: Student(config) for name in STUDENTS}, "vote": StandardisedSum()}


def parts_of(detector: Detector) -> tuple[WideResNet, dict[str, Student], StandardisedSum]:
    """Teacher, students by name, and vote of a detector."""
    teacher, vote = detector.teacher, detector.networks["vote"]
    assert teacher
    assert isinstance(vote, StandardisedSum)
    students = {name: detector.networks[name] for name in STUDENTS}
    found = {name: student for name, student in students.items() if isinstance(student, Student)}
    assert len(found) == len(students)
    return teacher, found, vote


def refit(detector: Detector, job: Job) -> Networks:
    """The same students, their maps scaled on other good frames."""
    teacher, students, _ = parts_of(detector)
    return {**students, "vote": standardised(job.validation, job.extract, teacher, students, job.track)}


def graphs(detector: Detector) -> Networks:
    """Every stage, its convolutions with their norms inside."""
    teacher, students, vote = parts_of(detector)
    folded: dict[str, nn.Module] = {name: fold_convolutions(student) for name, student in students.items()}
    return {"teacher": PairTeacher(fold_convolutions(teacher)), **folded, "vote": vote}


def predictor(detector: Detector) -> Callable[[FrameFeatures], tuple[Tensor, Tensor]]:
    """Anomaly map and score of a frame's images."""
    teacher, students, vote = parts_of(detector)

    @torch.inference_mode()
    def predict(frame: FrameFeatures) -> tuple[Tensor, Tensor]:
        x, y = levels_of(teacher, [frame], 0)
        rgb, cloud = students.values()
        voted: tuple[Tensor, Tensor, Tensor] = vote(*x, *y, *rgb(*x, *y), *cloud(*y, *x))
        return voted[:2]

    return predict


def dense(detector: Detector) -> Form:
    """As published: a pass of the teacher for each modality, maps upsampled, standardised and added, SciPy's filter."""
    teacher, students, vote = parts_of(detector)

    def run(image: Tensor, depth_image: Tensor, _point_pixel: Tensor) -> Tensor:
        levels = [teacher(image), teacher(depth_image)]
        total = torch.zeros(())
        for own, student in enumerate(students.values()):
            x, y = levels[own], levels[1 - own]
            raw = raw_map(x, student(*x, *y))[0].cpu()
            total = total + (raw - vote.mean[own].cpu()) / vote.std[own].cpu()
        return torch.from_numpy(gaussian_filter(total.numpy(), sigma=4))

    return run


def load_official(
    folder: Path, category: str, config: WideResNetConfig | None = None
) -> tuple[dict[str, Student], dict[str, WeightsInfo]]:
    """The one .pth of a category, {student_rgb, student_depth} or, of the Eyecandies script, {.., student_normals}.

    Returns:
        The students, frozen, and what the weights of each are.

    Raises:
        ArtifactError: the file is missing, there are several, or it is not CRD's; the message names the keys.
    """
    path = official_file(folder, category, "*.pth")
    document = read_checkpoint(path)
    expected = [{"student_rgb", f"student_{other}"} for other in ("depth", "normals")]
    if set(document) not in expected:
        raise ArtifactError(
            f"{path} holds {', '.join(sorted(map(str, document))[:5]) or 'nothing'}, expected student_rgb and "
            "student_depth (or student_normals)"
        )
    students, infos = {}, {}
    for name, key in zip(STUDENTS, ("student_rgb", *(set(document) - {"student_rgb"})), strict=True):
        students[name] = Student(config or WideResNetConfig())
        load_strictly(students[name], tensors_of(document[key], path), path)
        students[name].eval().requires_grad_(False)
        infos[name] = WeightsInfo(
            name=path.name, kind="pretrained", sha256=sha256_of(path), licence=LICENCE, note=key
        )
    return students, infos


def official(folder: Path, category: str, _settings: CrdSettings) -> tuple[Fitted, dict[str, WeightsInfo]]:
    """The authors' students of a category; their maps' scale is not in the file (`refit` finds it)."""
    students, infos = load_official(folder, category)
    return Fitted({**students, "vote": StandardisedSum().eval()}, {}, {}), infos


IMPLEMENTATION = Implementation(
    settings=CrdSettings,
    fit=fit,
    build=build,
    graphs=graphs,
    predictor=predictor,
    score_maps=lambda _record: MAPS,
    dense=dense,
    refit=refit,
    load_official=official,
)
IMPLEMENTATIONS = {method.name: IMPLEMENTATION for method in METHODS}
