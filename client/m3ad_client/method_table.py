"""The table of methods: what was published of each, beside what its bundle does on this machine with these frames."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from m3ad.bundle import Bundle
from m3ad.errors import M3adError
from m3ad.frames import Sample
from m3ad.methods import METHODS, method_named
from m3ad_runtime.pipeline import Inspector
from m3ad_runtime.worker import END_TO_END, INFERENCE_ONLY

from m3ad_client.candidates import Candidates, distinct_names
from m3ad_client.evaluate import evaluate_samples
from m3ad_client.measure import REGIONS, efficiency_table, run_bench
from m3ad_client.prepare import prepare_bundle

FIGURES = ("frames_per_second", "memory_mb", "i_auroc", "aupro_30", "aupro_1")
METRICS = {"i_auroc": "image_auroc", "aupro_30": "aupro_30_mvtec99", "aupro_1": "aupro_1_mvtec99"}
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Entry:
    """A row before it is measured: a method and its bundle, or why there is none."""

    title: str
    bundle: Bundle | None = None
    why: str = ""


def published() -> dict[str, dict[str, float | None]]:
    """What papers say of each method, by its title: FIGURES, None where they say nothing."""
    more = json.loads(files("m3ad_client").joinpath("published.json").read_text(encoding="utf-8"))
    found: dict[str, dict[str, float | None]] = {}
    for table in (efficiency_table(), more):
        for row in table["rows"]:
            named = dict(zip(table["columns"], row, strict=True))
            found[row[0]] = {name: named[name] for name in FIGURES}
    return found


def sources() -> list[str]:
    """Where the published figures come from, and what must be known to compare with them."""
    more = json.loads(files("m3ad_client").joinpath("published.json").read_text(encoding="utf-8"))
    paper = efficiency_table()
    return [f"published: {more['source']}; {paper['measured_on']}", *paper["caveats"]]


def entries(
    names: Sequence[str], bundles: Sequence[Path], folder: Path | None, data: Path | None, say: Say
) -> list[Entry]:
    """The rows: bundles that are named, one of each method from `folder`, and methods of which there is none.

    Args:
        names: of methods; all of m3ad's, and those that are only published, when empty.
        bundles: measured whatever their method.
        folder: has METHOD/bundle of each method, or gets it.
        data: a category to train what is missing on; None not to.
        say: is told of each step.

    Raises:
        M3adError: there is no such method.
    """
    found = [_opened(path) for path in bundles]
    have = {entry.bundle.manifest.method for entry in found if entry.bundle}
    for name in names or METHODS:
        method = method_named(name)
        if name in have:
            continue
        place = folder / name / "bundle" if folder else None
        try:
            if place and not place.exists() and data:
                prepare_bundle(name, data, place.parent, say)
        except M3adError as error:
            found.append(Entry(method.title, why=str(error)))
            continue
        if place and place.exists():
            found.append(_opened(place, method.title))
        else:
            where = f"no bundle in {place}" if place else "no --bundle of it, no --bundles folder"
            found.append(Entry(method.title, why=f"{where}; --prepare makes one"))
    if not names:
        known = {method.title for method in METHODS.values()}
        found += [Entry(title, why="m3ad has no such method") for title in published() if title not in known]
    return found


def _opened(path: Path, title: str = "") -> Entry:
    try:
        bundle = Bundle.open(path)
    except M3adError as error:
        return Entry(title or path.name, why=str(error))
    return Entry(METHODS[bundle.manifest.method].title, bundle)


def method_table(
    rows: Sequence[Entry], samples: Sequence[Sample], frames: int, warmup: int, threads: int, say: Say
) -> dict[str, Any]:
    """Measure every bundle on the same frames, all taking turns frame by frame, then judge each where it can be.

    Args:
        rows: see `entries`.
        samples: frames; metrics are computed of all of them where some are good and some defective.
        frames: measured in each region.
        warmup: run before, unmeasured.
        threads: of each bundle.
        say: is told what is being done.

    Returns:
        `rows` in order, each `method` (its name, None of one that is only published), `title`, `published` (FIGURES) or
        None, `measured` or None, and `why` it is not measured; `sources` of the published figures; `judged`, why there
        are no metrics or None; `bench`, what `bench --json` has of the same run.

    Raises:
        M3adError: there is no bundle to measure.
    """
    with_bundle = [entry for entry in rows if entry.bundle]
    if not with_bundle:
        raise M3adError(
            f"there is no bundle to measure: {'; '.join(f'{entry.title}: {entry.why}' for entry in rows)}"
        )
    with Candidates() as candidates:
        for entry in with_bundle:
            assert entry.bundle
            candidates.add_bundle(
                entry.bundle.path,
                entry.bundle.layout(),
                threads,
                "onnxruntime",
                entry.bundle.manifest.method,
            )
        names = distinct_names(candidates.all)
        bench = run_bench(candidates.all, samples, frames, warmup, say=say)
    kinds = {sample.is_good for sample in samples}
    judged = None if kinds == {True, False} else "DATA has no good and defective frames to tell apart"
    names_left = iter(names)
    papers = published()
    document = []
    for entry in rows:
        measured = None
        if entry.bundle:
            measured = _measured(entry.bundle, next(names_left), bench)
            if judged is None:
                say(f"{entry.title}: metrics over {len(samples)} frames ...")
                measured["metrics"] = _metrics(entry.bundle, samples, threads)
        document.append(
            {
                "method": entry.bundle.manifest.method if entry.bundle else _name_of(entry.title),
                "title": entry.title,
                "published": papers.get(entry.title),
                "measured": measured,
                "why": entry.why or None,
            }
        )
    return {"rows": document, "sources": sources(), "judged": judged, "bench": bench}


def _name_of(title: str) -> str | None:
    return next((method.name for method in METHODS.values() if method.title == title), None)


def _measured(bundle: Bundle, name: str, bench: Mapping[str, Any]) -> dict[str, Any]:
    by_region = {row["region"].partition(":")[0]: row for row in bench["rows"] if row["name"] == name}
    assert by_region.keys() == REGIONS.keys()
    inside, memory = by_region[INFERENCE_ONLY], bench["memory"][name]
    loaded = memory["parameter_bytes"]
    return {
        "name": name,
        "frames_per_second": inside["frames_per_second"],
        "frames_per_second_end_to_end": by_region[END_TO_END]["frames_per_second"],
        "p50_ms": inside["p50_ms"],
        "p99_ms": inside["p99_ms"],
        "peak_bytes": memory["peak"] and memory["peak"]["pss_bytes"],
        "parameters": loaded // 4 if bundle.precision == "fp32" else None,
        "bundle_bytes": sum(entry.bytes for entry in bundle.manifest.files.values()),
        "layout": inside["layout"],
        "precision": inside["precision"],
        "weights": inside["weights"],
        "training": training_line(bundle),
        "metrics": None,
    }


def training_line(bundle: Bundle) -> str:
    """How the heads were trained: `reduced training, NAME=VALUE`, or how many frames, or whose files they are."""
    method, training = METHODS[bundle.manifest.method], bundle.document.get("training", {})
    if bundle.manifest.official:
        return "the authors' heads"
    if method.reduced and all(training.get(name) == value for name, value in method.reduced.items()):
        return f"reduced training ({', '.join(f'{name}={value}' for name, value in method.reduced.items())})"
    frames = training.get("train_frames")
    return f"trained on {frames} frames" if frames else "training not recorded"


def _metrics(bundle: Bundle, samples: Iterable[Sample], threads: int) -> dict[str, float]:
    found = evaluate_samples(Inspector(bundle, threads=threads), samples)["metrics"]
    return {name: found[key] for name, key in METRICS.items() if key in found}
