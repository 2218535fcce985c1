"""A category's repository is taken up by a running server while it goes on serving; also from another process.

The old stages answer until the new ones have answered the new golden frame as their bundle does.
"""

import contextlib
import json
import os
import socket
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from m3ad.errors import ArtifactError, M3adError, ServerError
from tritonclient.utils import InferenceServerException

from m3ad_triton.config import read_config
from m3ad_triton.line import Line
from m3ad_triton.repository import Repository
from m3ad_triton.served import CONFIG, ServedModels
from m3ad_triton.verify import doors, verify_repository

SOCKET = "control.sock"
PREFIX = "m3ad-triton-"  # of the folder of a server
LONGEST = 2**16


def reload_category(models: ServedModels, line: Line, path: Path, timeout_s: float) -> Repository:
    """Replace a category by its repository as it lies at `path` now.

    Args:
        models: of the server.
        line: to it.
        path: the repository.
        timeout_s: for each step: loading, the golden frame, the exchange.

    Raises:
        ArtifactError: the repository has problems, or is of a category or kind that is not served.
        ServerError: Triton does not load it, or its answer is not the bundle's; what was served is served on.
    """
    verify_repository(path, with_files=False)
    repository = Repository.open(path)
    manifest = repository.manifest
    served = models.categories.get(manifest.category)
    if served is None:
        raise ArtifactError(
            f"{path} is of category {manifest.category}, which is not served; served are "
            f"{', '.join(models.categories)}. Start a server with it: m3ad-triton serve"
        )
    for name in ("runtime", "frames", "plugins"):
        if getattr(manifest, name) != getattr(served.repository.manifest, name):
            raise ArtifactError(
                f"{path} has another `{name}` than the served repository of {manifest.category}; a reload keeps it: "
                "start the server again"
            )
    proposal = models.propose(repository)
    try:
        line.wait_until_ready((*proposal.names.values(), proposal.trial), timeout_s)
        try:
            problem = line.difference(proposal.golden, timeout_s, proposal.trial)
        except InferenceServerException as error:
            problem = f"the golden frame is not answered: {error.message()}"
        if problem:
            raise ServerError(f"{path} is not taken up, {problem}; {manifest.category} is served as before")
        models.accept(proposal)
        for door in doors(manifest):
            told = read_config(models.folder / door / CONFIG)
            line.wait_until_wired(door, [s.model_name for s in told.ensemble_scheduling.step], timeout_s)
    finally:
        models.sweep()
    return repository


class Control:
    """A socket in the server's private folder, on which `m3ad-triton reload` asks; one request at a time.

    Args:
        folder: of the server, for its owner alone.
        answer: what is done with a request.
    """

    def __init__(self, folder: Path, answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.answer = answer
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(folder / SOCKET))
        self.listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:  # closed
                return
            with connection, contextlib.suppress(OSError, ValueError):
                request = json.loads(connection.makefile().readline(LONGEST))
                try:
                    answer = self.answer(request)
                except M3adError as error:
                    answer = {"error": str(error)}
                connection.sendall(json.dumps(answer).encode() + b"\n")


def ask_server(path: Path, timeout_s: float) -> dict[str, Any]:
    """Let the server of this machine and user that serves the repository at `path` take it up.

    Raises:
        ServerError: none does, several do, or the server refuses; the message is its sentence.
    """
    wanted, found = str(path.absolute()), []
    for folder in {Path(tempfile.gettempdir()), Path("/tmp")}:
        for place in sorted(folder.glob(f"{PREFIX}*/{SOCKET}")):
            told = _request(place, {"do": "list"}, 5.0)
            if told and wanted in told.get("repositories", ()):
                found.append(place)
    if len(found) != 1:
        told_of = "several servers serve" if found else "no server of this machine and user serves"
        raise ServerError(f"{told_of} {path}; start one: m3ad-triton serve {path}")
    answer = _request(found[0], {"do": "reload", "repository": wanted}, timeout_s)
    if answer is None:
        raise ServerError(f"the server of {path} did not answer in {timeout_s:g} s; look at what it prints")
    if "error" in answer:
        raise ServerError(str(answer["error"]))
    return answer


def _request(place: Path, request: dict[str, Any], timeout_s: float) -> dict[str, Any] | None:
    """A server's answer; None when there is none, as of one that was killed."""
    with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(OSError, ValueError):
        if place.stat().st_uid == os.getuid():
            connection.settimeout(timeout_s)
            connection.connect(str(place))
            connection.sendall(json.dumps(request).encode() + b"\n")
            answer = json.loads(connection.makefile().readline())
            return answer if isinstance(answer, dict) else None
    return None
