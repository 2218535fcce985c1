"""Inspect one frame that lies in system shared memory: shared_memory_client.py HOST:PORT CATEGORY RGB XYZ.

For a client on the server's machine: the frame is written where the server reads it, and nothing of it is sent.
pip install 'tritonclient[grpc]' pillow tifffile
"""

import json
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton
import tritonclient.utils.shared_memory as system_memory
from frame import VERDICTS, read_frame
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

GONE = "StatusCode.UNAVAILABLE"


def unregister(client: triton.InferenceServerClient, key: str, patience_s: float = 10) -> None:
    """Take a region back from the server, once it has let go of it.

    Triton answers a request before it counts its regions as free, and in between says that a region is in use. A server
    that is gone holds nothing.
    """
    deadline = time.monotonic() + patience_s
    held = True
    while held:
        try:
            client.unregister_system_shared_memory(key)
            held = False
        except InferenceServerException as error:
            if error.status() == GONE:
                return
            if "in use" not in error.message() or time.monotonic() > deadline:
                sys.exit(f"the Triton does not give back the shared memory {key}: {error.message()}")
            time.sleep(0.01)


def main(url: str, category: str, rgb: str, xyz: str) -> None:
    """Print score, verdict, defects and the size of the map as one line of JSON."""
    frame = read_frame(Path(rgb), Path(xyz))
    height, width, _ = frame["rgb"].shape
    sizes = {**{name: array.nbytes for name, array in frame.items()}, "frame_map": height * width * 4}
    with ExitStack() as stack:
        client = stack.enter_context(triton.InferenceServerClient(url))
        regions = {}
        for name, size in sizes.items():
            key = f"m3ad_example_{os.getpid()}_{name}"  # a region's name on the server; its file is /dev/shm/<key>
            regions[name] = system_memory.create_shared_memory_region(key, f"/{key}", size)
            stack.callback(system_memory.destroy_shared_memory_region, regions[name])
            try:
                client.register_system_shared_memory(key, f"/{key}", size)
            except InferenceServerException as error:
                if error.status() == GONE:
                    sys.exit(
                        f"no Triton answers at {url} ({error.message()}); start one, and give its gRPC port"
                    )
                sys.exit(
                    f"the Triton at {url} does not read this machine's shared memory ({error.message()}); it runs on "
                    "another machine or in a container without --ipc=host, or its API is restricted: send the frame in "
                    "the request, as grpc_client.py does"
                )
            stack.callback(unregister, client, key)
        inputs = []
        for name, array in frame.items():
            system_memory.set_shared_memory_region(regions[name], [array])
            entry = triton.InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
            entry.set_shared_memory(f"m3ad_example_{os.getpid()}_{name}", array.nbytes)
            inputs.append(entry)
        outputs = [triton.InferRequestedOutput(name) for name in ("score", "verdict", "defects", "frame_map")]
        outputs[-1].set_shared_memory(f"m3ad_example_{os.getpid()}_frame_map", sizes["frame_map"])
        try:
            answer = client.infer(category, inputs, outputs=outputs, client_timeout=60)
        except InferenceServerException as error:
            sys.exit(f"{error.status()}: {error.message()}")
        frame_map = system_memory.get_contents_as_numpy(regions["frame_map"], np.float32, [height, width])
        found = {
            "score": float(answer.as_numpy("score")[0]),
            "verdict": VERDICTS[answer.as_numpy("verdict")[0]],
            "defects": json.loads(answer.as_numpy("defects")[0]),
            "largest": float(frame_map.max()),
        }
        print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
