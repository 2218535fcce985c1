"""What refits make of a line that shifted: brighter by a third, its image moved by 2 px against the cloud. A report.

usage: python tests/calibrate/shifted_line.py BUNDLE CATEGORY OUT [GOOD DEFECTS]

A station judges the shifted frames of CATEGORY (good validation and test parts, defects of every test folder), its
labels stand for a person's reviews, and each of threshold, svm and baseline is refitted.
"""

import sys
from pathlib import Path

import numpy as np
import tifffile
from m3ad.bundle import Bundle
from m3ad.errors import M3adError
from m3ad.frames import Sample, find_samples, read_sample
from m3ad.ledger import Ledger
from m3ad_calibrate.disturb import light, misregistration
from m3ad_calibrate.refit import Settings, What, refit
from m3ad_calibrate.refit_report import markdown, sentence
from m3ad_client.station.config import read_config
from m3ad_client.station.station import Station
from PIL import Image

BRIGHTER, MOVED_PX = 1.33, 2.0
STATION = '[station]\nfolder = "station"\n[[camera]]\nname = "line"\nfolder = "line"\nsettle_s = 0.02\nbundle = "{}"\n'
REFITS: tuple[What, ...] = ("threshold", "svm", "baseline")


def shifted(sample: Sample, folder: Path, name: str) -> None:
    """Write a shifted frame as rgb/NAME.png and xyz/NAME.tiff."""
    rng = np.random.default_rng(0)
    frame = misregistration(light(read_sample(sample), BRIGHTER, rng), MOVED_PX, rng)
    for kind in ("rgb", "xyz"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    Image.fromarray(frame.rgb).save(folder / "rgb" / f"{name}.png")
    tifffile.imwrite(folder / "xyz" / f"{name}.tiff", frame.xyz, photometric="minisblack")


def main(bundle: Path, category: Path, out: Path, most_good: int, most_defects: int) -> None:
    """Judge, review, refit, print."""
    samples = [*find_samples(category, "validation"), *find_samples(category, "test")]
    good = [s for s in samples if s.is_good][:most_good]
    defects = [s for s in samples if not s.is_good]
    defects = defects[:: max(1, len(defects) // most_defects)][:most_defects]
    if not (out / "station.toml").exists():
        for said, each in (("good", good), ("defect", defects)):
            for i, sample in enumerate(each):
                shifted(sample, out / "line", f"{said}_{i:03}")
        (out / "station.toml").write_text(STATION.format(bundle.resolve()))
    station = Station(read_config(out / "station.toml"), print)
    try:
        station.once()
        for part in station.ledger.parts("said IS NULL"):
            station.ledger.say(part.id, "good" if part.name.startswith("good") else "defect", "its label")
    finally:
        station.close()
    with Ledger(out / "station" / "ledger.sqlite") as ledger:
        for what in REFITS:
            try:
                target = out / f"{what}-refit"
                report = refit(Bundle.open(bundle), ledger, "line", target, Settings(what=what), print)
            except M3adError as error:
                print(f"{what}: {error}")
                continue
            print(f"{what}: {sentence(report)}\n{markdown(report)}", flush=True)


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[4:6]] or [30, 12]
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), *numbers)
