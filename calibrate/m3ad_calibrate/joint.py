"""The cheapest combination of a lattice and a precision plan within the budget, and the bundle that has both.

Either saves most where the other saves least: a plan shrinks the encoders, a lattice the head. Both are held against
the source at every pixel in fp32 at once, on good validation frames with and without synthetic defects.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3ad.bundle import Bundle
from m3ad.errors import M3adError
from m3ad.frames import Sample
from m3ad.scored import Lattice
from m3ad_export.graphs.plan import Plan

from m3ad_calibrate.lattice import with_threshold, write_lattice
from m3ad_calibrate.lattice_probe import LATTICES, LatticeProbe
from m3ad_calibrate.probe import QualityLoss
from m3ad_calibrate.quantize import Settings, quantize
from m3ad_calibrate.record import Feeds
from m3ad_calibrate.sensitivity import Search, Searcher

Say = Callable[[str], None]
# Of a floating-point product's time, in round figures (MEASUREMENTS.md: 0.4 to 0.8 by CPU, and 1.1 to 1.3).
EIGHT_BITS, WEIGHTS_ALONE = 0.5, 1.15


@dataclass(frozen=True, slots=True)
class Combination:
    """A lattice and a plan, and what they cost on the probed frames.

    Attributes:
        lattice: which.
        plan: None where the products stay as they are.
        promoted: how many promotions the plan has; None without a plan.
        share: of the rows that are scored.
        work: multiply-adds with weights, an eight-bit one counting `EIGHT_BITS`; 1 is the source's.
        quality: against the source at every pixel.
    """

    lattice: Lattice
    plan: Plan | None
    promoted: int | None
    share: float
    work: float
    quality: QualityLoss

    @property
    def told(self) -> str:
        """In a few words."""
        plan = f"{self.plan.precision}, {self.promoted} promoted" if self.plan else "floating point"
        return f"lattice {self.lattice}, {plan}"


def search(
    searcher: Searcher,
    lattices: LatticeProbe,
    wanted: Sequence[Lattice] | None = None,
    say: Say = lambda _: None,
) -> list[Combination]:
    """Try combinations, coarse lattices first; the cheapest that stays within the budget is `cheapest`'s.

    A plan alone may use `TARGET` of the budget in any layout, as in `sensitivity`; with it a lattice may use all of it,
    or the plan is promoted further until it does. A lattice on which even the least plan would cost more than what was
    found is left out.

    Args:
        searcher: for plans; its budget counts.
        lattices: the same frames at every pixel.
        wanted: which lattices; all pixels and `LATTICES` if left out.
        say: is told of each step.
    """
    found = searcher.search(say)
    chosen: list[Lattice] = list(wanted or ("all", *LATTICES))
    tried: list[Combination] = []

    def attempt(lattice: Lattice, promoted: int | None) -> Combination:
        plan = None if promoted is None else searcher.with_moves(found.moves[:promoted], found.findings)
        changed = {} if plan is None else searcher.changed(plan)
        quality = lattices.loss_of(lattice, searcher.budget, changed)
        share = lattices.share(lattice)
        made = Combination(lattice, plan, promoted, share, work(searcher, found, promoted, share), quality)
        tried.append(made)
        say(f"{made.told}: {made.work:.2f} of the work, {quality.loss:.2f} of the budget")
        return made

    for lattice in sorted(chosen, key=lattices.share):
        share, best = lattices.share(lattice), cheapest(tried)
        least = work(searcher, found, found.promoted, share)
        if best is not None and min(least, work(searcher, found, None, share)) >= best.work:
            say(f"lattice {lattice}: not tried, it cannot cost less than {best.told}")
            continue
        if attempt(lattice, None).quality.loss > 1 or found.promoted == len(found.moves):
            continue
        # The loss falls as groups are promoted; halving finds the smallest number that fits.
        low, high = found.promoted, len(found.moves)
        if attempt(lattice, low).quality.loss > 1:
            while high - low > 1:
                middle = (low + high) // 2
                if attempt(lattice, middle).quality.loss <= 1:
                    high = middle
                else:
                    low = middle
    return tried


def cheapest(tried: Sequence[Combination]) -> Combination | None:
    """The one of least work among those within the budget; None where none is."""
    fitting = [each for each in tried if each.quality.loss <= 1]
    return min(fitting, key=lambda each: each.work, default=None)


def work(searcher: Searcher, found: Search, promoted: int | None, share: float) -> float:
    """What is multiplied at this share of the rows with so many promotions, of the source's; None is no plan."""
    final = dict(found.moves[: promoted or 0])

    def price(name: str) -> float:
        if promoted is None:
            return 1.0
        return {"int8_weights": WEIGHTS_ALONE, "rest": 1.0}.get(name, EIGHT_BITS)

    return sum(
        price(final.get(group, "quantized")) * (group.share - group.row_share * (1 - share))
        for group in searcher.groups
    )


def write(
    source: Bundle,
    out: Path,
    chosen: Combination,
    feeds: dict[str, Feeds],
    settings: Settings,
    origin: dict[str, Any] | None,
    train: Sequence[Sample],
    validation: Sequence[Sample],
    trials: Sequence[dict[str, Any]],
    say: Say = lambda _: None,
) -> Bundle:
    """Write a bundle with the lattice and the plan; the SVM is fitted on the lattice, the threshold to both.

    Args:
        source: fp32, at every pixel.
        out: the folder to write; an older bundle there is replaced.
        chosen: of `search`.
        feeds: recorded inputs by graph.
        settings: of the calibration.
        origin: what the manifest says of the recorded inputs.
        train: good frames, for the one-class SVM.
        validation: good frames, for the threshold.
        trials: what the manifest says of the combinations that were tried.
        say: is told of each graph.

    Raises:
        M3adError: the combination changes nothing, or `out` is the source.
        ArtifactError: see `write_lattice` and `quantize`.
    """
    if chosen.plan is None:
        if chosen.lattice == "all":
            raise M3adError(
                f"no lattice and no plan within the budget is cheaper; {source.path} stays as it is"
            )
        written = write_lattice(source, out, chosen.lattice, train, validation)
    else:
        with tempfile.TemporaryDirectory() as folder:
            fitted = source
            if chosen.lattice != "all":
                fitted = write_lattice(source, Path(folder) / "lattice", chosen.lattice, train, validation)
            written = quantize(fitted, out, chosen.plan, feeds, settings, origin, say=say)
        written = with_threshold(written, validation)
    return written.update(search=list(trials))


def report(tried: Sequence[Combination]) -> list[dict[str, Any]]:
    """The combinations as JSON."""
    return [
        {
            "lattice": each.lattice,
            "precision": each.plan.precision if each.plan else None,
            "promoted": each.promoted,
            "share": round(each.share, 4),
            "work": round(each.work, 4),
            "loss": each.quality.loss,
            "rank_correlation": each.quality.rank_correlation,
            "metric_drop": each.quality.metric_drop,
        }
        for each in tried
    ]


def save_plot(tried: Sequence[Combination], chosen: Combination, path: Path) -> None:
    """The loss of each combination against its work, and the budget; the chosen one is filled."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for each in tried:
        fill = "#3070b0" if each is chosen else "none"
        axes.plot(
            each.work, each.quality.loss, "s" if each.plan else "o", color="#3070b0", markerfacecolor=fill
        )
        axes.annotate(
            each.told, (each.work, each.quality.loss), (5, 4), textcoords="offset points", fontsize=7
        )
    axes.axhline(1, color="black", linewidth=1)
    axes.set(
        xlabel="multiply-adds with weights, an eight-bit one as a half", ylabel="share of the loss budget"
    )
    axes.set_xlim(0, 1.3)
    figure.savefig(path, dpi=120)
