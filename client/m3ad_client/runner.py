"""The in-process pipeline as a worker of the bench: `python -m m3ad_client.runner BUNDLE LAYOUT THREADS`."""

import sys
from pathlib import Path

from m3ad.contract import LAYOUTS
from m3ad.preprocess import ModelInput
from m3ad_runtime.pipeline import Inspector
from m3ad_runtime.worker import MapAndTimes, Runner, serve


def load(bundle: Path, layout: str, threads: int) -> Runner:
    """Open a bundle as the embedded default runs it: ONNX Runtime on the CPU."""
    import onnxruntime

    (known,) = (name for name in LAYOUTS if name == layout)
    inspector = Inspector.open(bundle, known, threads)

    def run(frame: ModelInput) -> MapAndTimes:
        inspection = inspector.inspect_prepared(frame)
        return inspection.anomaly_map, inspection.stage_ms

    cpu = inspector.record.contract.method.cpu
    used = {step.stage for step in inspector.pipeline.wiring}
    sizes = ((inspector.folder / file).stat().st_size for stage in used for file in cpu[stage].files)
    conditions = {
        "runtime": f"ONNX Runtime {onnxruntime.__version__}",
        "device": "cpu",
        "precision": inspector.precision,
        "lattice": inspector.preprocessing.lattice,
        "layout": layout,
        "method": inspector.record.method,
        "threads": inspector.threads,
        "weights": inspector.record.weights,
        "parameter_bytes": sum(sizes),
    }
    return Runner(run, inspector.preprocessing, conditions)


if __name__ == "__main__":
    serve(lambda: load(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
