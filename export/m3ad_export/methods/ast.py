"""AST: a normalising flow is the teacher, a plain network the student; a part is odd where their latents differ.

References:
    AST  https://github.com/marco-rudolph/AST (MIT; its trained weights are unpublished)
Exported are the trained networks with norms, gains and positions folded: `heads/ast_folds.py`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m3ad_export.detector import Detector
from m3ad_export.heads.ast import MAPS, SIZE, LatentError, Student, Teacher
from m3ad_export.heads.ast_folds import FoldedStudent, FoldedTeacher
from m3ad_export.heads.fold import fold_convolutions
from m3ad_export.method import Fitted, Form, Implementation, Job, Networks
from m3ad_export.nets.configs import EfficientNetConfig
from m3ad_export.nets.efficientnet import EfficientNet
from m3ad_export.official_files import load_frozen, official_file
from m3ad_export.train.ast import AstSettings, grids_of, train_pair
from m3ad_export.train.features import FrameFeatures
from m3ad_export.weights import WeightsInfo

LICENCE = "MIT"


def fit(job: Job) -> Fitted:
    """Train the flow, then the student, on good frames."""
    config: AstSettings = job.settings
    encoder = job.extract.efficientnet
    assert encoder
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        teacher = Teacher(encoder.config.channels)
        student = Student(encoder.config.channels, config.student_width)
    losses = train_pair(job.samples, job.extract, teacher, student, job.folder, config, job.track)
    networks = {"teacher": teacher, "student": student, "vote": LatentError().eval()}
    return Fitted(networks, {"heads": {"student_width": config.student_width}}, losses)


def build(record: Mapping[str, Any]) -> Networks:
    """Untrained networks of a record."""
    sizes = {k: v for k, v in record["encoders"]["efficientnet"].items() if k != "weights"}
    channels = EfficientNetConfig(**sizes).channels
    student = Student(channels, record["heads"]["student_width"])
    return {"teacher": Teacher(channels), "student": student, "vote": LatentError()}


def parts_of(detector: Detector) -> tuple[EfficientNet, Teacher, Student, LatentError]:
    """Encoder, teacher, student and vote of a detector."""
    encoder = detector.efficientnet
    teacher, student, vote = (detector.networks[name] for name in ("teacher", "student", "vote"))
    assert encoder
    assert isinstance(teacher, Teacher)
    assert isinstance(student, Student)
    assert isinstance(vote, LatentError)
    return encoder, teacher, student, vote


def graphs(detector: Detector) -> Networks:
    """Every stage, with what does not depend on a frame in its weights."""
    encoder, teacher, student, vote = parts_of(detector)
    return {
        "rgb_encoder": fold_convolutions(encoder),
        "teacher": FoldedTeacher(teacher),
        "student": FoldedStudent(student),
        "vote": vote,
    }


def predictor(detector: Detector) -> Callable[[FrameFeatures], tuple[Tensor, Tensor]]:
    """Anomaly map and score of a frame's grids."""
    _, teacher, student, vote = parts_of(detector)

    @torch.inference_mode()
    def predict(frame: FrameFeatures) -> tuple[Tensor, Tensor]:
        features, depth, mask = grids_of([frame])
        voted: tuple[Tensor, Tensor, Tensor] = vote(
            teacher(features, depth)[0], student(features, depth), mask
        )
        return voted[:2]

    return predict


def dense(detector: Detector) -> Form:
    """As published: norms, positions, gains and the log determinant computed each time, the map by bicubic resizing."""
    encoder, teacher, student, _ = parts_of(detector)

    def run(image: Tensor, depth: Tensor, depth_mask: Tensor) -> Tensor:
        features = encoder(image)
        latent, _ = teacher(features, depth)
        error = (depth_mask * (latent - student(features, depth)).square()).mean(dim=1, keepdim=True)
        return F.interpolate(error * depth_mask, (SIZE, SIZE), mode="bicubic")[0, 0]

    return run


def load_official(
    folder: Path, category: str, config: AstSettings, channels: int | None = None
) -> tuple[Fitted, dict[str, WeightsInfo]]:
    """The authors' `<name>_<category>_teacher.pth` and `.._student.pth` of a category.

    Raises:
        ArtifactError: a file is missing, there are several, or one is not AST's; the message names the keys.
    """
    width = channels or EfficientNetConfig().channels
    networks = {"teacher": Teacher(width), "student": Student(width, config.student_width)}
    infos = {
        name: load_frozen(network, official_file(folder, category, f"*_{name}.pth"), LICENCE)
        for name, network in networks.items()
    }
    record = {"heads": {"student_width": config.student_width}}
    return Fitted({**networks, "vote": LatentError().eval()}, record, {}), infos


IMPLEMENTATION = Implementation(
    settings=AstSettings,
    fit=fit,
    build=build,
    graphs=graphs,
    predictor=predictor,
    score_maps=lambda _record: MAPS,
    dense=dense,
    load_official=load_official,
)
