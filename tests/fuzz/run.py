"""Fuzz what m3ad reads: run.py [--cases N] [--seed S] [--only TARGET] [--case I].

Each case follows from the seed, its target and its number, so that --only and --case run a failed one again. A case
fails when anything but a sentence comes of it, when it takes 10 s, or when what was taken is not as the contract says.
"""

import argparse
import contextlib
import io
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

HERE = Path(__file__).parent
for folder in (HERE, HERE.parent, HERE.parent / "client"):
    sys.path.insert(0, str(folder))

import targets  # noqa: E402
from m3ad.bundle import Bundle  # noqa: E402
from m3ad.errors import M3adError  # noqa: E402

MEMORY = Path("/dev/shm")  # a million small files
SECONDS = 10
# Of each hundred cases; JSON shares its part among its kinds.
SHARES = {"pictures": 20, "clouds": 20, "JSON": 40, "requests": 17, "frames": 2.9, "detector": 0.1}


class Hang(BaseException):
    """A case took too long."""


@dataclass
class Outcome:
    """What came of a target's cases: how many were taken and refused, and each failure once, with a case of it."""

    cases: int = 0
    taken: int = 0
    seconds: float = 0.0
    failures: Counter[str] = field(default_factory=Counter)
    examples: dict[str, int] = field(default_factory=dict)

    def line(self, name: str) -> str:
        """What is printed of a target."""
        failed, rate = sum(self.failures.values()), self.cases / max(self.seconds, 1e-9)
        return f"{name}: {self.cases} cases, {self.taken} taken, {failed} failed, {rate:.0f} a second"


def all_targets(folder: Path, bundle: Bundle, repository: Path) -> dict[str, targets.Case]:
    """Every target by name."""
    from conftest import make_tiny_detector
    from test_saved import BENCH, EVALUATION

    places = [folder / name for name in ("pictures", "clouds", "json", "detector")]
    for place in places:
        place.mkdir()
    found = {
        kind: targets.files(place, kind) for kind, place in zip(("pictures", "clouds"), places, strict=False)
    }
    found |= targets.documents(places[2], bundle, repository, [BENCH, EVALUATION])
    record = make_tiny_detector().record
    return {
        **found,
        "requests": targets.requests(),
        "frames": targets.frames(bundle),
        "detector": targets.detector(places[3], record),
    }


def run(name: str, case: targets.Case, numbers: Iterator[int] | range, seed: int) -> Outcome:
    """Run cases of one target."""
    found, started = Outcome(), time.perf_counter()
    refusals = (
        (M3adError, ValueError) if name in ("requests", "frames", "request parameters") else (M3adError,)
    )
    before = signal.signal(signal.SIGALRM, _hang)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        for number in numbers:
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                case(Random(f"{seed} {name} {number}"))
                found.taken += 1
            except refusals as error:
                _require_sentence(error, found, number)
            except (Exception, Hang) as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                label = (
                    f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {str(error)[:80]}"
                )
                found.failures[label] += 1
                found.examples.setdefault(label, number)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            found.cases += 1
    signal.signal(signal.SIGALRM, before)
    found.seconds = time.perf_counter() - started
    return found


def _require_sentence(error: BaseException, found: Outcome, number: int) -> None:
    """A refusal is one printable line."""
    if isinstance(error, M3adError) and (not str(error) or not str(error).isprintable()):
        label = f"no printable sentence: {str(error)[:60]!r}"
        found.failures[label] += 1
        found.examples.setdefault(label, number)


def _hang(*_: object) -> None:
    raise Hang(f"longer than {SECONDS} s")


def cases_of(names: list[str], total: int) -> dict[str, int]:
    """How many cases each target gets."""
    kinds = [name for name in names if name not in SHARES]
    return {
        name: max(1, round(total * (SHARES[name] if name in SHARES else SHARES["JSON"] / len(kinds)) / 100))
        for name in names
    }


def peak_mib() -> float:
    """The largest resident memory of this process so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def main() -> int:
    """Run and print a line for each target; 1 when a case failed."""
    from conftest import make_input, make_tiny_detector
    from m3ad_export.bundle_writer import write_bundle
    from m3ad_triton.repository import write_repository

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only")
    parser.add_argument("--case", type=int)
    options = parser.parse_args()
    failed = total = 0
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as place:
        folder = Path(place)
        write_bundle(
            make_tiny_detector(),
            make_input(1100),
            folder / "bundle",
            layouts=("fused",),
            parity_points=(1024,),
        )
        write_repository(folder / "bundle", folder / "repository", "onnxruntime", "fused")
        (folder / "cases").mkdir()
        found = all_targets(folder / "cases", Bundle.open(folder / "bundle"), folder / "repository")
        before = peak_mib()
        for name, count in cases_of(list(found), options.cases).items():
            if options.only not in (None, name):
                continue
            if options.case is not None:
                found[name](Random(f"{options.seed} {name} {options.case}"))
                continue
            outcome = run(name, found[name], range(count), options.seed)
            total, failed = total + outcome.cases, failed + sum(outcome.failures.values())
            print(outcome.line(name), flush=True)
            for label, times in outcome.failures.most_common():
                again = f"--only '{name}' --case {outcome.examples[label]}"
                print(f"    {times} x {label}; again: {again}", flush=True)
    more = f"peak {peak_mib():.0f} MiB, {peak_mib() - before:.0f} of it by fuzzing"
    print(f"{total} cases, {failed} failed, {more} (seed {options.seed})")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
