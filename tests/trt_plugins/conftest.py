"""The native library is built from the sources under test before the first test of this room."""

import warnings

import pytest
from m3ad_plugins import build, native


@pytest.fixture(scope="session", autouse=True)
def _native_library() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # not built yet, or of older sources
        stale = native.library() is None
    if stale:
        build.build()
        native.library.cache_clear()
        assert native.library() is not None
