"""An ONNX file in ONNX Runtime on the CPU."""

import ctypes
import threading
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from m3ad.errors import ArtifactError, MissingDependencyError

Arrays = Mapping[str, npt.NDArray[Any]]
TILE_ROWS = "m3ad_tile_rows"  # the property of head_rows.onnx that says how many rows to give it at a time
# The property of a graph with convolutions in INT8. ONNX Runtime runs some of those as integers, most in floating point
# with weights that it dequantizes for each frame; as written, in floating point with weights dequantized once.
RUN_AS_WRITTEN = "m3ad_run_as_written"
# An INT8 bundle gives the same map on every CPU: ONNX Runtime may fuse what is exact, and nothing else.
EXACT = {
    # A product with weights alone in INT8 would round the activation to INT8 too, block by block, if left to itself.
    "session.qdq_matmulnbits_accuracy_level": "1",
    "session.qdq_matmulnbits_block_size": "256",  # of 512 x 1088 x 1088 in fp32, 1.13 of the time; 1.41 with its 32
}
# Kernels whose pairs of products saturate at 16 bits are kept from INT8 weights by turning those to UINT8.
UNSIGNED_WEIGHTS = {"session.x64quantprecision": "1"}
AS_WRITTEN = {"session.disable_quant_qdq": "1"}
INEXACT_REWRITES = [
    "QDQPropagationTransformer"
]  # it moves FP8 pairs past other nodes and breaks their values
# y = a b in ONNX, `MatMulInteger` of a [M, K] uint8 and b [K, N] int8.
INTEGER_PRODUCT = bytes.fromhex(
    "08073a500a180a01610a0162120179220d4d61744d756c496e74656765721201675a0f0a0161120a0a08080212040a000a00"
    "5a0f0a0162120a0a08080312040a000a00620f0a0179120a0a08080612040a000a0042040a00100a"
)

_ONCE = threading.Lock()  # graphs are loaded side by side; `cache` alone would let two of them do it twice


@cache
def _share_arena() -> None:
    """One memory arena for every graph of this process: the stages run in turn, so the largest sets the peak."""
    import onnxruntime as ort

    info = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(info, None)


@cache
def sums_saturate() -> bool:
    """Whether this CPU's kernels for uint8 x int8 saturate: x86 with AVX2 or AVX-512 and no VNNI. Asked of them."""
    import onnxruntime as ort

    session = ort.InferenceSession(INTEGER_PRODUCT, providers=["CPUExecutionProvider"])
    rows, columns = np.full((5, 16), 255, np.uint8), np.full((16, 16), 127, np.int8)
    (found,) = session.run(None, {"a": rows, "b": columns})
    return bool((found != 16 * 255 * 127).any())


def _give_back_freed() -> None:
    """Hand memory that was freed back to the system: of a graph just read, half is its file's bytes."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc keeps it otherwise
        trim(0)


def version() -> str:
    """ONNX Runtime's version."""
    import onnxruntime

    return str(onnxruntime.__version__)


class OnnxGraph:
    """An ONNX file, or a model's bytes, in ONNX Runtime on the CPU; INT8 products are exact on every CPU."""

    def __init__(self, model: Path | bytes, threads: int) -> None:
        try:
            import onnxruntime as ort
            from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidGraph
            from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel
        except ImportError as error:
            raise MissingDependencyError(
                "onnxruntime is not installed, the CPU runtime needs it: pip install 'm3ad[cpu]'"
            ) from error
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # what goes wrong is raised, and the first try below may
        # Threads that spin between two graphs take the cores from the stage that has work, here or in another process.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        with _ONCE:
            _share_arena()
            exact = EXACT | (UNSIGNED_WEIGHTS if sums_saturate() else {})
        options.add_session_config_entry("session.use_env_allocators", "1")
        if isinstance(model, Path) and not model.is_file():
            raise ArtifactError(f"{model} is missing; export the bundle again: m3ad-export bundle")
        source: str | bytes = str(model) if isinstance(model, Path) else model

        def opened(entries: Mapping[str, str]) -> ort.InferenceSession:
            for key, value in entries.items():
                options.add_session_config_entry(key, value)
            return ort.InferenceSession(
                source, options, providers=["CPUExecutionProvider"], disabled_optimizers=INEXACT_REWRITES
            )

        try:
            self.session = opened(exact)
            if RUN_AS_WRITTEN in self.session.get_modelmeta().custom_metadata_map:
                del self.session  # its memory, before the other's is taken
                self.session = opened(AS_WRITTEN)
        except (InvalidGraph, NoKernel, Fail):
            # ONNX Runtime 1.31 fuses FP8 pairs into its INT8 kernels, which refuse them, and turns a weight to unsigned
            # once for each product that reads it, which fails at the second (an older bundle's tied layers).
            # As written, in floating point, both run, and as exactly.
            try:
                self.session = opened(AS_WRITTEN)
            except (InvalidGraph, NoKernel) as error:
                raise ArtifactError(
                    f"{model if isinstance(model, Path) else 'the graph'} cannot run on a CPU ({error}); "
                    "bf16 is for engines: m3ad-export build-engine"
                ) from error
        _give_back_freed()
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
