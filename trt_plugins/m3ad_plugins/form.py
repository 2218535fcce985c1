"""Which form of the ops does the work in this process."""

from types import ModuleType

from m3ad_plugins import native, numpy_ops


def chosen() -> ModuleType:
    """The form that does the work: native when it is built."""
    return numpy_ops if native.library() is None else native
