"""The one-class SVM of a bundle fitted anew from good frames, and written into its voting graphs.

Only what follows `score_maps` in the graphs is replaced; how those maps are made stays the exporter's.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import torch
from m3ad import bundle as artefact
from m3ad.atomic import locked
from m3ad.bundle import Bundle
from m3ad.errors import ArtifactError, FrameError
from m3ad_export.graphs.head import head_model, read_parts
from m3ad_export.graphs.verify import verify_interface
from m3ad_export.graphs.vote import with_svm
from m3ad_export.heads.voting import OneClassSvm, SvmRows, VotingConfig, fit_one_class_svm
from torch import Tensor, nn

from m3ad_calibrate.threshold import Kernel, SvmInput

MAX_VECTORS = 64  # an rbf kernel costs one exponential per pixel and vector
RBF_NU = 0.1
REFIT_FRAMES = 8


class SvmVote(nn.Module):
    """score_maps [3 + n, 224, 224] -> anomaly_map [224, 224], score [1]; rows are divided by `unit` [D] first."""

    def __init__(self, config: VotingConfig, svm: OneClassSvm, unit: Tensor | None = None) -> None:
        super().__init__()
        self.config, self.rows, self.svm = config, SvmRows(config, unit), svm

    def forward(self, score_maps: Tensor) -> tuple[Tensor, Tensor]:
        decision: Tensor = self.svm(self.rows(score_maps))
        return decision.reshape(score_maps.shape[1:]), decision.amax(dim=0, keepdim=True)


def fit_svm(
    maps: Sequence[npt.NDArray[np.float32]], config: VotingConfig, kernel: Kernel, nu: float
) -> SvmVote:
    """Fit a one-class SVM to the pixels of good frames.

    linear: Alg. 1 of Mentor3AD (`fit_one_class_svm`).  rbf: decision = rho - sum_k alpha_k exp(-gamma |x - v_k|^2),
    with 1 / gamma the largest |x|^2 of a good pixel, so that defects beyond it still differ from one another   (ours)

    Args:
        maps: score_maps [3 + n, 224, 224] of each frame.
        config: the voting table and what the SVM sees of it.
        kernel: see above.
        nu: share of the good pixels left on the anomalous side.

    Raises:
        FrameError: there are no frames.
    """
    if not maps:
        raise FrameError(
            "there are no good frames to fit the one-class SVM to; add some to the training split"
        )
    seen = SvmRows(config)
    x = torch.cat([seen(torch.from_numpy(np.ascontiguousarray(m))) for m in maps])
    x = x[x.sum(dim=1) > 0]  # background far from the part has no score at all
    unit = x.mean(dim=0)
    if kernel == "linear":
        svm = OneClassSvm(config.svm_width)
        fit_one_class_svm(svm, x / unit, nu)
        svm.support_vectors = svm.support_vectors / unit  # v . (x / unit) = (v / unit) . x
        return SvmVote(config, svm)
    from sklearn.svm import OneClassSVM

    rows = x / unit
    picked = rows[torch.linspace(0, len(rows) - 1, int(MAX_VECTORS / nu * 0.9)).long()]
    gamma = 1 / float(rows.square().sum(dim=1).max())
    solver = OneClassSVM(kernel="rbf", nu=nu, gamma=gamma, tol=1e-6).fit(picked.double().numpy())
    svm = OneClassSvm(config.svm_width, len(solver.support_vectors_), "rbf")
    svm.gamma = gamma
    svm.support_vectors = torch.from_numpy(solver.support_vectors_).float()
    svm.coefficients = -torch.from_numpy(solver.dual_coef_[0]).float()
    svm.rho = torch.tensor([float(solver.intercept_[0])])
    return SvmVote(config, svm, unit)


def write_svm(bundle: Bundle, vote: SvmVote, kernel: Kernel, nu: float) -> Bundle:
    """Put another SVM into a bundle's voting graphs, its golden values and its manifest, all at once or not at all.

    Engines and recorded inputs are left out: they belong to the old graphs.

    Raises:
        ArtifactError: the bundle is quantized, so its gate would no longer speak of its graphs.
    """
    if bundle.manifest.precision is not None:
        raise ArtifactError(
            f"{bundle.path} is quantized; refit the SVM of the bundle it was made from, then quantize that one again"
        )
    table = bundle.contract.stages
    with locked(bundle.path), artefact.new_folder(bundle.path, artefact.FORMAT) as folder:
        document = bundle.current("files", "voting", "svm")
        for part in ("onnx", "golden"):
            shutil.copytree(bundle.path / part, folder / part, copy_function=os.link)
        for name in ("vm", "head_vote"):
            path = folder / "onnx" / f"{name}.onnx"
            if path.exists():
                _replace(path, with_svm(onnx.load(path), vote.rows, vote.svm))
        if "fused" in bundle.manifest.layouts:
            model = head_model(bundle.contract, read_parts(folder / "onnx"))
            _replace(folder / "onnx" / "head.onnx", model)
            verify_interface(folder / "onnx" / "head.onnx", table["head"])
        golden = torch.from_numpy(np.load(folder / "golden" / "score_maps.npy", allow_pickle=False))
        with torch.inference_mode():
            values = dict(zip(("anomaly_map", "score"), vote(golden), strict=True))
        for name, value in values.items():
            path = folder / "golden" / f"{name}.npy"
            path.unlink()
            np.save(path, value.numpy(), allow_pickle=False)
        voting = {**(document.get("voting") or {}), "svm_input": vote.config.svm_input}
        fitted = {"kernel": kernel, "nu": nu, "vectors": len(vote.svm.support_vectors)}
        changed = {"voting": voting, "svm": fitted, "files": artefact.file_entries(folder)}
        artefact.write_json(folder / artefact.MANIFEST, {**document, **changed})
    return Bundle.open(bundle.path)


def svm_frames(bundle: Bundle) -> int:
    """How many good frames the SVM of a bundle is fitted to."""
    told = bundle.document.get("svm")
    return REFIT_FRAMES if told else int(bundle.document.get("training", {}).get("svm_frames", 4))


def refit_svm(bundle: Bundle, maps: Sequence[npt.NDArray[np.float32]]) -> Bundle:
    """Fit the SVM anew as the bundle's was: as by training, or as by `m3ad-calibrate threshold --svm`.

    Args:
        bundle: is written to.
        maps: score_maps [3 + n, 224, 224] of each good frame.

    Raises:
        ArtifactError: see `write_svm` and `config_of`.
    """
    told, training = bundle.document.get("svm"), bundle.document.get("training", {})
    config = config_of(bundle, None)
    if told:
        vote = fit_svm(maps, config, told["kernel"], told["nu"])
        return write_svm(bundle, vote, told["kernel"], told["nu"])
    seen, svm = SvmRows(config), OneClassSvm(config.svm_width)
    nu = training.get("svm_nu", 0.5)
    fit_one_class_svm(svm, torch.cat([seen(torch.from_numpy(m)) for m in maps]), nu)
    return write_svm(bundle, SvmVote(config, svm), "linear", nu).update(svm=None)


def config_of(bundle: Bundle, svm_input: SvmInput | None) -> VotingConfig:
    """The voting of a bundle, its SVM looking at something else where asked.

    Raises:
        ArtifactError: its method votes without an SVM.
    """
    voting = bundle.manifest.voting
    if voting is None:
        raise ArtifactError(
            f"{bundle.path} has no one-class SVM, {bundle.contract.method.title} votes without one; set the threshold "
            "without --svm"
        )
    config = VotingConfig(exponents=tuple(voting.exponents), svm_input=voting.svm_input)
    return replace(config, svm_input=svm_input) if svm_input else config


def _replace(path: Path, model: onnx.ModelProto) -> None:
    path.unlink()  # a hard link: writing through it would change the bundle that is being replaced
    onnx.save(model, path)
