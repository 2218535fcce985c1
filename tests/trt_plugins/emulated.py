"""The CUDA kernels as C++ over cuda_emulator.hpp, and the launchers of that library.

`kernel<<<grid, block, shared, stream>>>(...)` becomes a call of the emulator, which runs each CUDA thread as a fiber.
It shows logic, barriers and indices, not speed. Two accesses that no barrier orders fail a row even where its result is
right (race_detector.cpp).
"""

import ctypes
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from m3ad_plugins.build import PACKAGE
from m3ad_plugins.gpu.cases import Launch
from m3ad_plugins.gpu.kernels import Kernels

HERE = Path(__file__).parent


def cuda_includes() -> list[str]:
    dry = subprocess.run(
        ["nvcc", "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=False
    ).stderr
    return re.findall(r'"(-I[^"]+)"', dry)


def compile_emulated(
    folder: Path, arch: int, without: Sequence[tuple[str, str, int]] = (), also: Sequence[str] = ()
) -> Path:
    """The kernels as C++ over the emulator; `without` (file, text, n) leaves out the file's n-th such text.

    `also`: more C++ files and options, which are not watched.
    """
    here = folder / str(arch)
    for path in (*PACKAGE.glob("*/*.cu*"), *PACKAGE.glob("common/*.hpp")):
        place = path.relative_to(PACKAGE)
        text = path.read_text()
        for unwanted, n in [(text, n) for file, text, n in without if file == str(place)]:
            before = [match.start() for match in re.finditer(re.escape(unwanted), text)][n]
            text = text[:before] + text[before + len(unwanted) :]
        text = re.sub(r"(\w+)<<<(.*?)>>>\(", r"emulator::launch(\1, \2)(", text, flags=re.DOTALL)
        text = re.sub(
            r"extern __shared__ ([\w ]+) (\w+)\[\];", r"auto* \2 = emulator::dynamicShared<\1>();", text
        )
        target = here / place
        if path.suffix == ".cu":
            target = target.with_suffix(".cpp")
            text = f'#include "cuda_emulator.hpp"\n#define __CUDA_ARCH__ {arch}\n{text}'
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    library = folder / f"libemulated_{arch}.so"
    options = ["-std=c++17", "-O2", "-g1", "-fPIC", "-ffp-contract=off", "-w", f"-I{HERE}", *cuda_includes()]
    # Only the compiler's half of ThreadSanitizer. What it calls is in race_detector.cpp, which must not be watched.
    commands = [["-fsanitize=thread", str(path)] for path in here.rglob("*.cpp")]
    flags = [each for each in also if each.startswith("-")]
    commands += [
        [*flags, str(path)] for path in (HERE / "race_detector.cpp", *also) if str(path) not in flags
    ]
    objects = [str(here / f"{n}.o") for n in range(len(commands))]
    compilers = [
        subprocess.Popen(["c++", *options, *command, "-c", "-o", made])
        for command, made in zip(commands, objects, strict=True)
    ]
    assert [compiler.wait() for compiler in compilers] == [0] * len(commands)
    subprocess.run(["c++", "-shared", *objects, "-o", str(library)], check=True)
    return library


class EmulatedKernels(Kernels):
    """A launch fails on a data race, too."""

    def launch(
        self,
        name: str,
        outputs: Sequence[np.ndarray],
        inputs: Sequence[np.ndarray],
        launch: Launch,
        workspace_of: str = "",
        repeats: int = 0,
    ) -> float:
        taken = super().launch(name, outputs, inputs, launch, workspace_of, repeats)
        race = self.race()
        assert not race, race
        return taken

    def race(self) -> str:
        """The first race of a kernel since it was last asked, its places as file:line; empty if none."""

        def line(offset: re.Match[str]) -> str:
            command = ["addr2line", "-s", "-e", str(self.path), offset[1]]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]

        self.library.raceFirst.restype = ctypes.c_char_p
        said = self.library.raceFirst().decode()
        self.library.raceForget()
        return re.sub(r"\+(0x[0-9a-f]+)", line, said)
