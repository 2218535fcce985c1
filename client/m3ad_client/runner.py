"""The in-process pipeline as a worker of the bench: `python -m m3ad_client.runner BUNDLE LAYOUT THREADS RUNTIME`."""

import sys
from pathlib import Path
from typing import Any

from m3ad.contract import LAYOUTS
from m3ad.preprocess import ModelInput
from m3ad_runtime.engine_choice import RUNTIMES
from m3ad_runtime.pipeline import Inspector
from m3ad_runtime.worker import MapAndTimes, Runner, serve


def load(bundle: Path, layout: str, threads: int, runtime: str) -> Runner:
    """Open a bundle in the runtime asked for."""
    inspector = opened_inspector(bundle, layout, threads, runtime)
    device_bytes = inspector.device_bytes

    def run(frame: ModelInput) -> MapAndTimes:
        inspection = inspector.inspect_prepared(frame)
        return inspection.anomaly_map, inspection.stage_ms

    told = None if device_bytes is None else lambda: device_bytes
    return Runner(run, inspector.preprocessing, conditions_of(inspector), told)


def opened_inspector(bundle: Path, layout: str, threads: int, runtime: str) -> Inspector:
    """A bundle in the runtime asked for; it is verified while it is loaded."""
    (known,) = (name for name in LAYOUTS if name == layout)
    (asked,) = (name for name in RUNTIMES if name == runtime)
    return Inspector.open(bundle, known, threads, runtime=asked)


def conditions_of(inspector: Inspector) -> dict[str, Any]:
    """What a figure measured on an inspector stands on."""
    return {
        "runtime": inspector.runtime,
        "device": inspector.device,
        "precision": inspector.precision,
        "lattice": inspector.preprocessing.lattice,
        "refined": inspector.refined,
        "layout": inspector.record.layout,
        "method": inspector.record.method,
        "threads": inspector.threads,
        "weights": inspector.record.weights,
        "parameter_bytes": sum(path.stat().st_size for path in inspector.model_files),
    }


if __name__ == "__main__":
    serve(lambda: load(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]))
