"""The portable C++ ops are compiled into the wheel: it is of one platform and any Python 3, and needs no compiler."""

import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT / room) for room in ("core", "trt_plugins")]

from m3ad.errors import M3adError  # noqa: E402  of this checkout, which is not installed yet
from m3ad_plugins.build import LIBRARY_NAME, build  # noqa: E402


class BuildWithOps(build_py):
    """Python files as ever, then the library; an editable install compiles it at first use."""

    def run(self) -> None:
        """Copy and compile."""
        super().run()
        if not self.editable_mode:
            try:
                build(Path(self.build_lib) / "m3ad_plugins" / LIBRARY_NAME)
            except M3adError as error:
                sys.exit(f"error: {error}")


class PlatformWheel(bdist_wheel):
    """py3-none-<platform>: the library is called through ctypes and knows no Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """The wheel's tag."""
        return "py3", "none", super().get_tag()[2]


class PlatformDistribution(Distribution):
    """A distribution that is not pure Python, without an extension module."""

    def has_ext_modules(self) -> bool:
        """True: its files belong where a platform's lie."""
        return True


setup(distclass=PlatformDistribution, cmdclass={"build_py": BuildWithOps, "bdist_wheel": PlatformWheel})
