"""The first step of a door in Triton's Python backend: it says at once that a frame may ask for a place in the queue.

The queue behind it may refuse then, which Triton 2.51 does not survive where an ensemble begins. It looks at nothing,
so one gate serves every category, and it imports little, so that it costs little memory.
"""

from typing import Any

import numpy as np


class TritonPythonModel:
    """What Triton calls: `execute` for every request."""

    def execute(self, requests: list[Any]) -> list[Any]:
        """A place for each request."""
        import triton_python_backend_utils as pb_utils  # exists only inside Triton

        place = np.zeros(1, np.int32)
        return [pb_utils.InferenceResponse([pb_utils.Tensor.from_dlpack("place", place)]) for _ in requests]
