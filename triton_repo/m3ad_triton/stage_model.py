"""A stage of the contract as a model of Triton's Python backend; `<model>/1/model.py` imports this class.

A stage is the same function the in-process pipeline runs. A request it refuses is answered with a sentence and the
code INVALID_ARG, and the next request is served. Whatever else goes wrong stays what Triton makes of it, INTERNAL: a
client must not take a broken server for a bad frame.
"""

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from m3ad.contract import Dims, Stage
from m3ad.method import PIPELINE_OUTPUTS
from m3ad.methods import contract_of
from m3ad_runtime.stages import cpu_stage

from m3ad_triton.backend import Arrays, answer, cancelled


class TritonPythonModel:
    """What Triton calls: `initialize` once, `execute` for every batch of requests."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the stage that the model's parameters name from the model's version folder."""
        record = json.loads(json.loads(args["model_config"])["parameters"]["m3ad_stage"]["string_value"])
        contract = contract_of(record["method"], Dims(**record["dims"]), record.get("lattice", "all"))
        self.stage = contract.stages[record["stage"]]
        folder = Path(args["model_repository"]) / args["model_version"]
        threads = len(os.sched_getaffinity(0))
        self.function = cpu_stage(self.stage.name, folder, contract, threads, record.get("refine"))

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request with its tensors or with what is wrong with it; one that was given up is not computed."""
        return [self.given_up(r) if r.is_cancelled() else self.computed(r) for r in requests]

    def computed(self, request: Any) -> Any:
        """The answer to a request."""
        return answer(request, self.stage.inputs, self.function)

    def given_up(self, request: Any) -> Any:
        """CANCELLED of the last stage; of the others no error, but values that are none.

        Triton 2.51 dies when one of two steps that it begins side by side fails at once.
        """
        if any(tensor.name in PIPELINE_OUTPUTS for tensor in self.stage.outputs):
            return cancelled()
        return answer(request, self.stage.inputs, partial(nothing, self.stage))


def nothing(stage: Stage, arrays: Arrays) -> Arrays:
    """The outputs of a stage for these inputs, by size alone: NaN, or 0 where values are whole."""
    sizes = {
        dim: size
        for tensor in stage.inputs
        for dim, size in zip(tensor.dims, arrays[tensor.name].shape, strict=True)
        if isinstance(dim, str)
    }
    return {
        tensor.name: np.full(
            [sizes[dim] if isinstance(dim, str) else dim for dim in tensor.dims],
            np.nan if tensor.dtype == "float32" else 0,
            tensor.dtype,
        )
        for tensor in stage.outputs
    }
