"""The errors m3ad raises on purpose: one sentence each (what is wrong, what was expected, what to do next)."""


class M3adError(Exception):
    """Something outside our code is not as it must be; the message is meant for the person at the terminal."""


class FrameError(M3adError):
    """A frame, an image file or a data set cannot be inspected as it is."""


class ArtifactError(M3adError):
    """A bundle, checkpoint, engine or model repository is missing, foreign, stale or tampered with."""


class MissingDependencyError(M3adError):
    """A package, library or program this command needs is not installed."""


class ServerError(M3adError):
    """A Triton server cannot be started, reached, or does not serve the model asked for."""


class BusyError(ServerError):
    """A server or a queue has no room for a further frame; it may have some a moment later."""


class DeviceError(M3adError):
    """The GPU cannot be reached, has too little memory, or failed."""


def one_line(error: BaseException | str) -> str:
    """What a file or a library said, in one printable line; a file's author may have put a terminal's commands in."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split()))
