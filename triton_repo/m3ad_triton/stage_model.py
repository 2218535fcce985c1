"""A stage of the contract as a model of Triton's Python backend; `<model>/1/model.py` imports this class.

A stage is the same function the in-process pipeline runs. A request it refuses is answered with a sentence and the
code INVALID_ARG, and the next request is served. Whatever else goes wrong stays what Triton makes of it, INTERNAL: a
client must not take a broken server for a bad frame.
"""

import json
import os
from pathlib import Path
from typing import Any

from m3ad.contract import Dims
from m3ad.methods import contract_of
from m3ad_runtime.stages import cpu_stage

from m3ad_triton.backend import answer


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
        """Answer each request with its tensors or with what is wrong with it."""
        return [answer(request, self.stage.inputs, self.function) for request in requests]
