"""An ONNX file in ONNX Runtime on the CPU."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy.typing as npt

from m3ad.errors import ArtifactError, MissingDependencyError

Arrays = Mapping[str, npt.NDArray[Any]]
TILE_ROWS = "m3ad_tile_rows"  # the property of head_rows.onnx that says how many rows to give it at a time


@cache
def _share_arena() -> None:
    """One memory arena for every graph of this process: the stages run in turn, so the largest sets the peak."""
    import onnxruntime as ort

    info = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(info, None)


class OnnxGraph:
    """An ONNX file, or a model's bytes, in ONNX Runtime on the CPU."""

    def __init__(self, model: Path | bytes, threads: int) -> None:
        try:
            import onnxruntime as ort
            from onnxruntime.capi.onnxruntime_pybind11_state import InvalidGraph
            from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel
        except ImportError as error:
            raise MissingDependencyError(
                "onnxruntime is not installed, the CPU runtime needs it: pip install 'm3ad[cpu]'"
            ) from error
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # Threads that spin between two graphs take the cores from the stage that has work, here or in another process.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        _share_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
        if isinstance(model, Path) and not model.is_file():
            raise ArtifactError(f"{model} is missing; export the bundle again: m3ad-export bundle")
        source, providers = str(model) if isinstance(model, Path) else model, ["CPUExecutionProvider"]
        try:
            self.session = ort.InferenceSession(source, options, providers=providers)
        except (InvalidGraph, NoKernel):
            # ONNX Runtime 1.31 fuses FP8 pairs into its INT8 kernels, which refuse them; as written, they run.
            options.add_session_config_entry("session.disable_quant_qdq", "1")
            try:
                self.session = ort.InferenceSession(source, options, providers=providers)
            except (InvalidGraph, NoKernel) as error:
                raise ArtifactError(
                    f"{model if isinstance(model, Path) else 'the graph'} cannot run on a CPU ({error}); "
                    "bf16 is for engines: m3ad-export build-engine"
                ) from error
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.inputs = [entry.name for entry in self.session.get_inputs()]

    @property
    def tile_rows(self) -> int:
        """Rows of a tile, of a graph that is run in tiles."""
        return int(self.session.get_modelmeta().custom_metadata_map[TILE_ROWS])

    def __call__(self, arrays: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Run the graph on the arrays it names as inputs."""
        results = self.session.run(self.outputs, {name: arrays[name] for name in self.inputs})
        return dict(zip(self.outputs, results, strict=True))

    def run_into(self, arrays: Arrays) -> None:
        """Run the graph from and to the arrays of its inputs' and outputs' names: nothing is allocated or copied."""
        binding = self.session.io_binding()
        for name in self.inputs:
            binding.bind_cpu_input(name, arrays[name])
        for name in self.outputs:
            array = arrays[name]
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self.session.run_with_iobinding(binding)
