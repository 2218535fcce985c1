"""Inspect one frame over HTTP with NVIDIA's tritonclient alone: http_client.py HOST:PORT CATEGORY RGB XYZ [THRESHOLD].

pip install 'tritonclient[http]' pillow tifffile
"""

import json
import sys
from pathlib import Path

import tritonclient.http as triton
from frame import VERDICTS, read_frame
from tritonclient.utils import InferenceServerException, np_to_triton_dtype


def main(url: str, category: str, rgb: str, xyz: str, threshold: str | None = None) -> None:
    """Print score, verdict and defects as one line of JSON; a refused frame is a sentence and exit code 1."""
    inputs = []
    for name, array in read_frame(Path(rgb), Path(xyz)).items():
        entry = triton.InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
        entry.set_data_from_numpy(array, binary_data=True)  # as JSON a frame is ten times as large
        inputs.append(entry)
    outputs = [
        triton.InferRequestedOutput(name, binary_data=True) for name in ("score", "verdict", "defects")
    ]
    # Over HTTP a number with a fraction is a text: older Tritons take no other as a parameter.
    parameters = {"threshold": threshold} if threshold else None
    with triton.InferenceServerClient(url, network_timeout=60) as client:
        try:
            answer = client.infer(category, inputs, outputs=outputs, parameters=parameters)
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
