"""A bundle -> another one that scores a lattice of the pixels; which one, `lattice_probe` measures."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import onnx
from m3ad import bundle as artefact
from m3ad.bundle import Bundle
from m3ad.errors import M3adError
from m3ad.frames import Sample, read_sample
from m3ad.methods import contract_of
from m3ad.scored import Lattice
from m3ad_export.graphs.head import head_model, read_parts
from m3ad_export.graphs.verify import verify_interface
from m3ad_export.graphs.vote import with_coverage
from m3ad_export.train.samples import sample_evenly
from m3ad_runtime.pipeline import Inspector

from m3ad_calibrate.gate import onnx_digest
from m3ad_calibrate.lattice_probe import Trial, verify_source
from m3ad_calibrate.quantize import write_golden
from m3ad_calibrate.svm import refit_svm, svm_frames
from m3ad_calibrate.threshold import fit_threshold


def write_lattice(
    source: Bundle,
    out: Path,
    lattice: Lattice,
    train: Sequence[Sample],
    validation: Sequence[Sample],
    trials: Sequence[dict[str, Any]] = (),
    *,
    refine: bool = False,
) -> Bundle:
    """Write a bundle that scores a lattice, its one-class SVM and its threshold fitted on it; then it is to be gated.

    A per-pixel baseline stays the source's: it says what good frames show, whichever pixels are scored. With a second
    pass the scores are the source's, and so SVM, threshold and review limit stay too.

    Args:
        source: see `lattice_probe.verify_source`.
        out: the folder to write; an older bundle there is replaced.
        lattice: not `all`.
        train: good frames, for the one-class SVM.
        validation: good frames, for the threshold: the largest score. A review limit is dropped, it was for other
            scores.
        trials: what the manifest says of the lattices that were tried.
        refine: whether a CPU scores every pixel around the lattice's highest places in a second pass.

    Raises:
        M3adError: `out` is the source, or there is no lattice to write.
        ArtifactError: `out` is something else, or the source is none; see there.
    """
    verify_source(source)
    if lattice == "all" or out.resolve() == source.path.resolve():
        raise M3adError(
            f"name a lattice other than all, and another folder than {source.path} to write it to"
        )
    manifest = source.manifest
    contract = contract_of(manifest.method, manifest.dims, lattice)
    dropped = ("parity", "files", "gate")
    with artefact.new_folder(out, artefact.FORMAT) as folder:
        (folder / "onnx").mkdir()
        for file in (f for f in manifest.files if f.startswith("onnx/")):
            (folder / file).write_bytes(source.file(file).read_bytes())
        for graph in contract.method.graphs_of(manifest.layouts):
            if graph.axis == "map":
                path = folder / "onnx" / f"{graph.name}.onnx"
                onnx.save(with_coverage(onnx.load(path)), path)
        onnx.save(head_model(contract, read_parts(folder / "onnx")), folder / "onnx" / "head.onnx")
        for layout in manifest.layouts:
            last = contract.steps(layout)[-1].stage
            verify_interface(folder / "onnx" / f"{last}.onnx", contract.stages[last])
        write_golden(folder, source, contract, manifest.layouts)
        document = {
            **{k: v for k, v in source.document.items() if k not in dropped},
            "preprocessing": replace(source.preprocessing, lattice=lattice).to_json(),
            "lattice": {"source_onnx": onnx_digest(source), "refine": refine, "tried": list(trials)},
            "files": artefact.file_entries(folder),
        }
        artefact.write_json(folder / artefact.MANIFEST, document)
    written = Bundle.open(out)
    if refine:
        return written
    if manifest.voting is not None:
        written = _refit(written, train)
    return with_threshold(written, validation)


def with_threshold(bundle: Bundle, validation: Sequence[Sample]) -> Bundle:
    """Set the threshold to the largest score of good frames; a review limit is dropped, it was for other scores."""
    inspector, camera = Inspector(bundle), bundle.preprocessing.camera
    scores = [inspector.inspect(read_sample(sample, camera)).score for sample in validation]
    parts = [f"{sample.split}/{sample.defect}/{sample.name}" for sample in validation]
    fitted = asdict(fit_threshold(scores))
    return bundle.update(threshold={**fitted, "review": None, "validation_scores": scores, "parts": parts})


def report(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """The trials as JSON."""
    return [
        {
            "lattice": t.lattice,
            "share": round(t.share, 4),
            "loss": t.quality.loss,
            "rank_correlation": t.quality.rank_correlation,
            "metric_drop": t.quality.metric_drop,
        }
        for t in trials
    ]


def save_plot(trials: Sequence[Trial], chosen: Trial, path: Path) -> None:
    """The loss of each lattice against the share of the rows it scores, and the budget; the chosen one is filled."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    for trial in trials:
        fill = "#3070b0" if trial is chosen else "none"
        axes.plot(trial.share, trial.quality.loss, "o", color="#3070b0", markerfacecolor=fill)
        axes.annotate(
            str(trial.lattice), (trial.share, trial.quality.loss), (5, 4), textcoords="offset points"
        )
    axes.axhline(1, color="black", linewidth=1)
    axes.set(xlabel="share of the rows that are scored", ylabel="share of the loss budget", xlim=(0, 1))
    figure.savefig(path, dpi=120)


def _refit(bundle: Bundle, train: Sequence[Sample]) -> Bundle:
    """The one-class SVM fitted anew, as the source's was."""
    inspector, camera = Inspector(bundle), bundle.preprocessing.camera
    chosen = sample_evenly(train, svm_frames(bundle))
    maps = [inspector.inspect(read_sample(s, camera), with_maps=True).score_maps for s in chosen]
    return refit_svm(bundle, [m for m in maps if m is not None])
