"""Inspect one frame over gRPC with NVIDIA's tritonclient alone: grpc_client.py HOST:PORT CATEGORY RGB XYZ [THRESHOLD].

pip install 'tritonclient[grpc]' pillow tifffile
"""

import json
import sys
from pathlib import Path

import tritonclient.grpc as triton
from frame import VERDICTS, read_frame
from tritonclient.utils import InferenceServerException, np_to_triton_dtype


def main(url: str, category: str, rgb: str, xyz: str, threshold: str | None = None) -> None:
    """Print score, verdict and defects as one line of JSON; a refused frame is a sentence and exit code 1."""
    inputs = []
    for name, array in read_frame(Path(rgb), Path(xyz)).items():
        entry = triton.InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
        entry.set_data_from_numpy(array)
        inputs.append(entry)
    outputs = [triton.InferRequestedOutput(name) for name in ("score", "verdict", "defects")]
    parameters = {"threshold": float(threshold)} if threshold else None
    with triton.InferenceServerClient(url) as client:
        try:
            answer = client.infer(category, inputs, outputs=outputs, parameters=parameters, client_timeout=60)
        except InferenceServerException as error:
            sys.exit(f"{error.status()}: {error.message()}")
    found = {
        "score": float(answer.as_numpy("score")[0]),
        "verdict": VERDICTS[answer.as_numpy("verdict")[0]],
        "defects": json.loads(answer.as_numpy("defects")[0]),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
