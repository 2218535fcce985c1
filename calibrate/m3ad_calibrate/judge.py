"""The gate as a command's last step: measured, written into the bundle, told, and an error when it fails."""

from collections.abc import Sequence

from m3ad.bundle import Bundle
from m3ad.cli import print_json, print_text, talk
from m3ad.errors import M3adError
from m3ad.frames import Sample

from m3ad_calibrate.gate import failures, gate, summary


def judge(bundle: Bundle, source: Bundle, test: Sequence[Sample], budget: float, as_json: bool) -> None:
    """Gate a bundle, write what was found into its manifest and print it.

    Raises:
        M3adError: it fails; the manifest says so, too.
    """
    found = gate(bundle, source, test, budget, talk.print)
    bundle = bundle.update(gate=found)
    precision, lattice = bundle.document.get("precision"), bundle.document.get("lattice")
    if as_json:
        print_json({"precision": precision, "lattice": lattice, "gate": found})
    else:
        verdict = "passed its gate" if found["passed"] else "FAILED its gate"
        parts = [precision["type"]] if precision else []
        parts += [f"lattice {bundle.preprocessing.lattice}"] if lattice else []
        print_text(summary(found, ", ".join(parts)))
        if found["limits_kept"] and any(values["verdicts_changed"] for values in found["figures"].values()):
            print_text(
                f"its limits are still those of {source.path}'s scores; set them anew: "
                f"m3ad-calibrate threshold {bundle.path} --data DATA"
            )
        if precision:
            weights = precision["weight_bytes"]
            print_text(
                f"weights: {weights['quantized'] / 1e6:.1f} MB, {weights['ratio']:.1%} of the source's"
            )
        print_text(f"{bundle.path}: {verdict}")
    if failed := failures(found["figures"], budget):
        advice = (
            "Find a plan: m3ad-calibrate sensitivity"
            if precision
            else "Take a finer lattice: m3ad-calibrate lattice --lattice"
        )
        raise M3adError(f"{bundle.path} is not usable: {'; '.join(failed)}. {advice}")
