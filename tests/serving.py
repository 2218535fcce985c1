"""Fixtures of the serving rooms: repositories of the tiny bundle, a real Triton that serves them, frames on disk."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile
from m3ad.bundle import Bundle, file_entries, read_manifest, write_json
from m3ad.contract import CONTRACT_VERSION
from m3ad.frames import Frame
from m3ad_triton.manifest import FORMAT
from m3ad_triton.repository import write_repository
from m3ad_triton.server import LocalServer
from PIL import Image


def renamed(bundle: Bundle, category: str, folder: Path) -> Path:
    """A copy of a bundle for another category."""
    path = folder / category
    shutil.copytree(bundle.path, path)
    Bundle.open(path).update(category=category)
    return path


def rehash(repository: Path) -> None:
    """List a changed repository's files as they are now, so that only the change itself is wrong."""
    manifest = read_manifest(repository, FORMAT, "")
    write_json(repository / "manifest.json", {**manifest, "files": file_entries(repository)})


def make_frame(seed: int = 0, size: int = 120, part: float = 0.8) -> Frame:
    """A bumpy plate that fills `part` of the frame's side, with a few holes in its cloud."""
    rng = np.random.default_rng(seed)
    edge = round(size * (1 - part) / 2)
    inside = slice(edge, size - edge)
    y, x = np.meshgrid(*[np.linspace(-0.1, 0.1, size)] * 2, indexing="ij")
    z = 0.5 + 0.002 * np.sin(40 * x + seed)
    xyz = np.zeros((size, size, 3), np.float32)
    xyz[inside, inside] = np.stack([x, y, z], axis=-1)[inside, inside]
    xyz[rng.random((size, size)) < 0.01] = np.nan
    rgb = np.kron(rng.integers(60, 200, (size // 8, size // 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    return Frame(rgb, xyz, f"frame {seed}")


def write_frame(folder: Path, name: str, frame: Frame) -> tuple[Path, Path]:
    """Write a frame as rgb/NAME.png and xyz/NAME.tiff."""
    paths = folder / "rgb" / f"{name}.png", folder / "xyz" / f"{name}.tiff"
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(frame.rgb).save(paths[0])
    tifffile.imwrite(paths[1], frame.xyz, photometric="minisblack")
    return paths


@pytest.fixture(scope="session")
def category(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A test split of three good frames and two with a raised, painted square."""
    root = tmp_path_factory.mktemp("data") / "plate"
    for kind, count in (("good", 3), ("bump", 2)):
        for number in range(count):
            frame = make_frame(number + 10 * (kind == "bump"))
            mask = np.zeros(frame.rgb.shape[:2], np.uint8)
            if kind == "bump":
                mask[50:70, 40:60] = 255
                frame.rgb[mask > 0] = (255, 0, 0)
                frame.xyz[mask > 0, 2] -= 0.02
            folder = root / "test" / kind
            write_frame(folder, f"{number:03}", frame)
            (folder / "gt").mkdir(exist_ok=True)
            Image.fromarray(mask).save(folder / "gt" / f"{number:03}.png")
    return root


@pytest.fixture(scope="session")
def chain_repository(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Category `tiny` in the chain layout; tests that change it copy it first."""
    path = tmp_path_factory.mktemp("repositories") / "tiny"
    write_repository(tiny_bundle.path, path, "onnxruntime", "chain")
    return path


@pytest.fixture(scope="session")
def fused_repository(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same networks as category `other` in the fused layout."""
    folder = tmp_path_factory.mktemp("repositories")
    path = folder / "repository"
    write_repository(renamed(tiny_bundle, "other", folder), path, "onnxruntime", "fused")
    return path


@pytest.fixture(scope="session")
def server(
    tiny_bundle: Bundle,
    chain_repository: Path,
    fused_repository: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[LocalServer]:
    """A real Triton with three categories: tiny (chain), other (fused), stale (written for another contract)."""
    folder = tmp_path_factory.mktemp("repositories")
    stale = folder / "repository"
    write_repository(renamed(tiny_bundle, "stale", folder), stale, "onnxruntime", "fused")
    current = f'\\"contract_version\\": {CONTRACT_VERSION},'
    for name in ("stale", "stale_tensors"):
        config = stale / name / "config.pbtxt"
        text = config.read_text()
        assert current in text
        config.write_text(text.replace(current, '\\"contract_version\\": 999,'))
    rehash(stale)
    with LocalServer([chain_repository, fused_repository, stale]) as running:
        yield running


@pytest.fixture
def certificates(tmp_path: Path) -> dict[str, Path]:
    """A certificate authority and a certificate of localhost signed by it."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl makes the certificates of this test and is not installed")
    files = {name: tmp_path / f"{name}.pem" for name in ("ca", "ca_key", "cert", "key", "request", "names")}
    files["names"].write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
    new_key = ["-newkey", "rsa:2048", "-nodes"]
    for arguments in (
        ["req", "-x509", *new_key, "-subj", "/CN=ca", "-keyout", files["ca_key"], "-out", files["ca"]],
        ["req", *new_key, "-subj", "/CN=localhost", "-keyout", files["key"], "-out", files["request"]],
        [
            *("x509", "-req", "-in", files["request"], "-extfile", files["names"], "-out", files["cert"]),
            *("-CA", files["ca"], "-CAkey", files["ca_key"], "-CAcreateserial"),
        ],
    ):
        subprocess.run([openssl, *map(str, arguments)], check=True, capture_output=True)
    return files
