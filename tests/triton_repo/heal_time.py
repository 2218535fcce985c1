"""How long a served repository takes to heal: python heal_time.py REPO prints a line for each fault. Linux."""

import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import psutil

FAULTS = [
    ("_head", "SIGKILL"),
    ("_rgb_extractor", "SIGSTOP"),
    ("", "SIGKILL"),
    ("", "SIGSTOP"),
]  # "": the server


def is_well(url: str) -> bool:
    """Whether /health says so."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError:
        return False


def main(repository: str) -> None:
    """Serve it, and do to it what happens on a line."""
    ports = [word for port in ("http", "grpc", "metrics", "health") for word in (f"--{port}-port", "0")]
    command = ["m3ad-triton", "serve", repository, *ports, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as serve:
        try:
            assert serve.stdout is not None
            told = json.loads(serve.stdout.readline())
            for stage, sent in FAULTS:
                (server,) = psutil.Process(serve.pid).children()
                processes = [server, *server.children()]
                victim = next(p for p in processes if not stage or f"{stage}/1/" in " ".join(p.cmdline()))
                time.sleep(3)
                victim.send_signal(getattr(signal, sent))
                started = time.monotonic()
                while is_well(told["health_url"]):
                    time.sleep(0.02)
                noticed = time.monotonic() - started
                while not is_well(told["health_url"]):
                    time.sleep(0.02)
                healed = time.monotonic() - started
                print(f"{sent} of {stage or 'the server'}: noticed {noticed:.1f} s, healed {healed:.1f} s")
        finally:
            serve.terminate()
            serve.wait(30)


if __name__ == "__main__":
    main(sys.argv[1])
