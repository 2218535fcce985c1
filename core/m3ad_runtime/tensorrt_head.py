"""The fused head where its engine could not be built whole: four plans, and the rows between them formed here.

TensorRT-RTX 1.7 cannot build the head's loop over tiles. Its tokens come back to the host, which spreads them over the
scored pixels a tile at a time, into pinned memory that the plans of rows and scores read from; two sets of it, so that
a tile is formed while the one before is computed.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from m3ad.contract import MAX_POINTS, Step
from m3ad.errors import ArtifactError
from m3ad.method import Contract
from m3ad_plugins.ops import SparseRows

from m3ad_runtime.cuda import Array, Gpu
from m3ad_runtime.device_values import DeviceValues
from m3ad_runtime.stages import modality_of, operators
from m3ad_runtime.tensorrt_plan import Plan, PlanTensor

SETS = 2  # of pinned memory for tiles
HOST_INPUTS = ("rgb_tokens", "xyz_tokens", "centers", "points", "point_pixel", "scored_pixel")


def tile_rows(rows: Plan) -> int:
    """How many rows the plan of rows takes.

    Raises:
        ArtifactError: any number of them, so that it was not built by `build-engine`.
    """
    (size, *_) = rows.inputs[0].shape
    if size < 1:
        raise ArtifactError(f"plan {rows.name} takes rows by the frame, expected tiles; {rows.advice}")
    return size


class TiledHeadPlans:
    """The stage `head` as four plans; every tensor of theirs has device memory of its own, once.

    Args:
        gpu: its context is current.
        parts: head_tokens, head_rows, head_scores, head_vote, with their contexts.
        step: the stage's use.
        values: of the frame.
        contract: of the bundle.
        threads: that form rows, every core if None.
    """

    def __init__(
        self,
        gpu: Gpu,
        parts: tuple[Plan, ...],
        step: Step,
        values: DeviceValues,
        contract: Contract,
        threads: int | None,
    ) -> None:
        self._gpu, self._step, self._values, self._threads = gpu, step, values, threads
        self._dims = contract.dims
        self._tokens, self._rows, self._scores, self._vote = parts
        self._tile = tile_rows(self._rows)
        self.bytes = 0
        self._projected = {t.name: self._device(t) for t in self._tokens.outputs}
        made = {t.name for t in self._rows.outputs}
        read = {t.name: t for plan in (self._rows, self._scores) for t in plan.inputs if t.name not in made}
        stage = contract.stages[step.stage]
        self._given = {t.name for t in stage.inputs if t.dims[0] == "R" and t.name in read}
        self._spread = {name: t for name, t in read.items() if name not in self._given}
        (scores,) = self._scores.outputs
        self._in_tile = {
            t.name: self._device(t) for t in (*self._spread.values(), *self._rows.outputs, scores)
        }
        self._pinned_projected = {t.name: self._pinned(t) for t in self._tokens.outputs}
        self._sets = [{n: self._pinned(t) for n, t in self._spread.items()} for _ in range(SETS)]
        for each in self._sets:
            for array in each.values():
                array[...] = 0  # the last tile's end is computed, too
        pairs, tiles = scores.shape[0], -(-MAX_POINTS // self._tile)
        self._name, self._pairs = scores.name, pairs
        self._of_tiles = gpu.pinned(tiles * pairs * self._tile, np.float32).reshape(tiles, pairs, self._tile)
        self._all_scores = gpu.pinned(pairs * MAX_POINTS, np.float32)
        self._all_scores_address = gpu.allocate(self._all_scores.nbytes, "the scores")
        self.bytes += self._all_scores.nbytes

    def _device(self, tensor: PlanTensor) -> int:
        size = math.prod(tensor.shape) * 4
        self.bytes += size
        return self._gpu.allocate(size, f"the tensor {tensor.name} of the head")

    def _pinned(self, tensor: PlanTensor) -> Array:
        return self._gpu.pinned(math.prod(tensor.shape), np.float32).reshape(tensor.shape)

    def enqueue(self) -> None:
        """Run the head; its outputs are on the stream when this returns, its tiles have been read."""
        gpu, values, step = self._gpu, self._values, self._step
        addresses = values.of_stage({**step.inputs, **step.outputs})
        shapes = {tensor: values.shape(value) for tensor, value in step.inputs.items()}
        self._tokens.enqueue(addresses | self._projected, shapes, gpu.stream)
        fetched = [n for n in HOST_INPUTS if n in step.inputs and values.tensors[n].dims[0] not in ("N", "R")]
        values.fetch(step.inputs[name] for name in fetched)
        for name, array in self._pinned_projected.items():
            gpu.copy_out(array, self._projected[name])
        gpu.synchronize()
        arrays = {name: values.host(step.inputs[name]) for name in HOST_INPUTS if name in step.inputs}
        spread = operators(arrays, self._dims)
        rows = self._interpolated(spread, {**arrays, **self._pinned_projected})
        count = len(arrays["scored_pixel"])
        scores = self._run_tiles(rows, count, addresses)
        gpu.copy_in(self._all_scores_address, scores)
        self._vote.enqueue(
            addresses | {self._name: self._all_scores_address},
            shapes | {self._name: scores.shape},
            gpu.stream,
        )

    def _interpolated(self, spread: Mapping[str, SparseRows], tokens: Mapping[str, Array]) -> dict[str, Any]:
        return {name: spread[modality_of(name)].interpolated(tokens[name]) for name in self._spread}

    def _run_tiles(self, rows: Mapping[str, Any], count: int, addresses: Mapping[str, int]) -> Array:
        """Scores [pairs, R] of all rows, in pinned memory."""
        gpu, tile = self._gpu, self._tile
        read: list[Any] = [None] * SETS
        starts = range(0, count, tile)
        for number, start in enumerate(starts):
            at = number % SETS
            if read[at] is not None:
                gpu.wait(read[at])
            for name, each in rows.items():
                pinned = self._sets[at][name]
                each.write(start, pinned[: min(tile, count - start)], self._threads)
                gpu.copy_in(self._in_tile[name], pinned)
            read[at] = gpu.event()
            given = {name: addresses[name] + start * self._row_bytes(name) for name in self._given}
            for plan in (self._rows, self._scores):
                plan.enqueue(self._in_tile | given, {t.name: t.shape for t in plan.inputs}, gpu.stream)
            gpu.copy_out(self._of_tiles[number], self._in_tile[self._name])
        gpu.synchronize()
        scores = self._all_scores[: self._pairs * count].reshape(self._pairs, count)
        for number, start in enumerate(starts):
            part = scores[:, start : start + tile]
            part[...] = self._of_tiles[number, :, : part.shape[1]]
        return scores

    def _row_bytes(self, name: str) -> int:
        return 4 * math.prod(self._values.shape(self._step.inputs[name])[1:])
