"""The process that `m3ad-client bench --baseline FORM` talks to."""

import argparse
from pathlib import Path

import torch
from m3ad_runtime.worker import serve

from m3ad_export.baselines import forms


def main() -> None:
    """Serve one form until stdin ends."""
    parser = argparse.ArgumentParser(prog="python -m m3ad_export.baselines", description=forms.__doc__)
    parser.add_argument("form", choices=forms.FORMS)
    parser.add_argument("detector", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    chosen = parser.parse_args()
    serve(lambda: forms.runner(chosen.form, chosen.detector, chosen.threads, chosen.device))


if __name__ == "__main__":
    main()
