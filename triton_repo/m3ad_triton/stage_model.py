"""A stage of the contract as a model of Triton's Python backend; `<model>/1/model.py` imports this class.

A stage is the same function the in-process pipeline runs. A request it refuses is answered with a sentence and the
code INVALID_ARG, and the next request is served. Whatever else goes wrong stays what Triton makes of it, INTERNAL: a
client must not take a broken server for a bad frame.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from m3ad.contract import Dims
from m3ad.errors import FrameError
from m3ad.methods import contract_of
from m3ad_runtime.stages import cpu_stage


class TritonPythonModel:
    """What Triton calls: `initialize` once, `execute` for every batch of requests."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the stage that the model's parameters name from the model's version folder."""
        record = json.loads(json.loads(args["model_config"])["parameters"]["m3ad_stage"]["string_value"])
        contract = contract_of(record["method"], Dims(**record["dims"]))
        self.stage = contract.stages[record["stage"]]
        folder = Path(args["model_repository"]) / args["model_version"]
        threads = len(os.sched_getaffinity(0))
        self.function = cpu_stage(self.stage.name, folder, contract, threads)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request with its tensors or with what is wrong with it."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        import triton_python_backend_utils as pb_utils  # exists only inside Triton

        # DLPack both ways: the stub may be built for NumPy 1, and then misreads the element size of NumPy 2 arrays.
        arrays = {
            tensor.name: np.from_dlpack(pb_utils.get_input_tensor_by_name(request, tensor.name))
            for tensor in self.stage.inputs
        }
        try:
            results = self.function(arrays)
        except (FrameError, ValueError) as error:
            refusal = pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=refusal)
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor.from_dlpack(name, _exportable(array)) for name, array in results.items()]
        )


def _exportable(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array itself, or a copy when it is not contiguous or not writable, which DLPack cannot carry."""
    array = np.ascontiguousarray(array)
    return array if array.flags.writeable else array.copy()
