"""The wheel and the sdist, built as `python -m build` builds them, and the wheel used where there is no compiler."""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
from m3ad.bundle import Bundle
from m3ad_export.sample_data import write_sample_data
from m3ad_plugins.build import LIBRARY_NAME, PACKAGE

ROOT = Path(__file__).parents[1]
SOURCES = {
    p.relative_to(PACKAGE.parent)
    for p in PACKAGE.rglob("*.[ch]*")
    if p.suffix in (".cpp", ".hpp", ".cu", ".cuh")
}

# Warnings are errors: the NumPy form announces itself by one.
INSPECT = """
import sys, warnings
warnings.simplefilter("error", RuntimeWarning)
from pathlib import Path
import numpy as np
import m3ad_plugins
from m3ad.fpfh import fpfh_cells
from m3ad.frames import find_samples, read_sample
from m3ad.preprocess import prepare
from m3ad_plugins import native
from m3ad_runtime.pipeline import Inspector
bundle, data, out = map(Path, sys.argv[1:])
inspector, frame = Inspector.open(bundle, threads=1), read_sample(find_samples(data, "test")[0])
seen = prepare(frame, inspector.preprocessing)
np.savez(out, map=inspector.inspect(frame).anomaly_map, histograms=fpfh_cells(seen.points, seen.point_pixel))
print(m3ad_plugins.__file__, native.library()._name, sep="\\n")
"""


def run(*command: object, **options: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both artefacts, from a copy of the files git knows, so that nothing a checkout has built gets in."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    names = run("git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source)
    return out


@pytest.mark.slow
def test_the_wheel_inspects_without_a_compiler(built: Path, tiny_bundle: Bundle, tmp_path: Path) -> None:
    """Outside the checkout, with the C++ ops it came with, and to the same bits as the checkout."""
    (wheel,) = built.glob("*.whl")
    assert "-py3-none-linux_" in wheel.name
    venv.create(tmp_path / "box", with_pip=False)
    python = tmp_path / "box" / "bin" / "python"
    (site,) = (tmp_path / "box" / "lib").glob("python3*/site-packages")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", site, wheel)
    # Third-party packages are those of this environment; m3ad itself lies before them.
    (site / "third_party.pth").write_text(f"{Path(np.__file__).parents[1]}\n")
    write_sample_data(tmp_path / "data", train=1, validation=1, test_per_kind=1)
    environment = {"PATH": "", "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    arguments = (tiny_bundle.path, tmp_path / "data")
    said = run(python, "-I", "-c", INSPECT, *arguments, tmp_path / "wheel.npz", cwd=tmp_path, env=environment)
    assert said.splitlines() == [str(site / "m3ad_plugins" / name) for name in ("__init__.py", LIBRARY_NAME)]
    assert not (tmp_path / "cache" / "m3ad").exists()  # nothing was compiled
    run(sys.executable, "-c", INSPECT, *arguments, tmp_path / "checkout.npz", env=os.environ)
    wheel, checkout = (np.load(tmp_path / f"{name}.npz") for name in ("wheel", "checkout"))
    for name in ("map", "histograms"):
        np.testing.assert_array_equal(wheel[name], checkout[name])
    said = run(site / "bin" / "m3ad-plugins", "--help", env={**environment, "PYTHONPATH": str(site)})
    assert "Compile kernels and plugins" in said


@pytest.mark.slow
def test_wheel_and_sdist_carry_the_sources_of_the_plugins(built: Path) -> None:
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    inside = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    assert inside >= {*SOURCES, Path("m3ad_plugins/CMakeLists.txt")}
    assert {p for p in inside if p.suffix == ".so"} == {Path("m3ad_plugins") / LIBRARY_NAME}
    with tarfile.open(sdist) as archive:
        packed = {Path(*Path(name).parts[1:]) for name in archive.getnames()}
    assert packed >= {"trt_plugins" / source for source in SOURCES}
    assert packed >= {Path("setup.py"), Path("pyproject.toml"), Path("README.md"), Path("LICENSE")}
    assert not {p for p in packed if p.suffix == ".so"}
