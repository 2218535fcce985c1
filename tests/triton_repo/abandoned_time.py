"""`python tests/triton_repo/abandoned_time.py REPO`: how long a frame waits behind 100 that were given up."""

import sys
import time
from pathlib import Path
from typing import Any

import tritonclient.grpc as grpcclient
from m3ad_triton.repository import Repository
from m3ad_triton.server import LocalServer
from serving import make_frame
from tritonclient.utils import np_to_triton_dtype


def inputs(size: int, part: float) -> list[Any]:
    frame = make_frame(0, size, part)
    entries = []
    for name, array in (("rgb", frame.rgb), ("xyz", frame.xyz)):
        entries.append(grpcclient.InferInput(name, array.shape, np_to_triton_dtype(array.dtype)))
        entries[-1].set_data_from_numpy(array)
    return entries


def main(path: Path) -> None:
    big, small = inputs(640, 1.0), inputs(224, 0.3)
    category = Repository.open(path).manifest.category
    with LocalServer([path]) as server:
        client = grpcclient.InferenceServerClient(server.grpc_url)

        def timed(entries: list[Any]) -> float:
            started = time.perf_counter()
            client.infer(category, entries)
            return time.perf_counter() - started

        alone = [(timed(big), timed(small)) for _ in range(3)][-1]
        answers: list[Any] = []
        for _ in range(100):
            client.async_infer(category, big, lambda result, error: answers.append(error), client_timeout=0.5)
        time.sleep(3)
        waited = timed(small)
    print(
        f"alone: big {alone[0]:.2f} s, small {alone[1]:.2f} s; small after {len(answers)} that were given up: "
        f"{waited:.2f} s"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
