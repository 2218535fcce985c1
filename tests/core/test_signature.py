"""A signature says who made a bundle or repository; openssl makes and checks the same keys and signatures."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from m3ad.bundle import Bundle, file_entries, write_json
from m3ad.errors import ArtifactError, MissingDependencyError
from m3ad.signature import SIGNATURE, sign, verify_signature
from m3ad_client.cli import app as client
from m3ad_export.cli import app as export
from m3ad_triton.cli import app as triton
from m3ad_triton.repository import Repository
from serving import rehash
from typer.testing import CliRunner


def openssl(*words: object) -> None:
    subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """line.key and line.pub, other.key and other.pub, by openssl."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("line", "other"):
        openssl("genpkey", "-algorithm", "ed25519", "-out", folder / f"{name}.key")
        openssl("pkey", "-in", folder / f"{name}.key", "-pubout", "-out", folder / f"{name}.pub")
    return folder


@pytest.fixture
def signed(tiny_bundle: Bundle, keys: Path, tmp_path: Path) -> Path:
    """A signed bundle with a folder of engines."""
    path = tmp_path / "bundle"
    shutil.copytree(tiny_bundle.path, path)
    engines = path / "engines" / "native"
    engines.mkdir(parents=True)
    (engines / "vm.plan").write_bytes(b"plan")
    about = {"format": "m3ad-engines", "target": "native", "compute_capability": "8.9"}
    write_json(engines / "manifest.json", {**about, "files": file_entries(engines)})
    sign(path, keys / "line.key")
    verify_signature(path, keys / "line.pub")
    return path


def test_openssl_finds_the_signature_genuine(signed: Path, keys: Path, tmp_path: Path) -> None:
    document = json.loads((signed / SIGNATURE).read_text())
    done = subprocess.run(
        ["sha256sum", "engines/native/manifest.json", "manifest.json"],
        cwd=signed, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (tmp_path / "message").write_text(f"m3ad-signature\n{done.stdout}")
    (tmp_path / "raw").write_bytes(bytes.fromhex(document["signature"]))
    check = (
        "pkeyutl",
        "-verify",
        "-pubin",
        "-inkey",
        keys / "line.pub",
        "-rawin",
        "-in",
        tmp_path / "message",
    )
    openssl(*check, "-sigfile", tmp_path / "raw")


def threshold(bundle: Path) -> None:
    Bundle.open(bundle).update(threshold={"value": 9.0})


def another_engine(bundle: Path) -> None:
    shutil.copytree(bundle / "engines/native", bundle / "engines/sm86")


def plan_and_hash(bundle: Path) -> None:
    folder = bundle / "engines/native"
    (folder / "vm.plan").write_bytes(b"other")
    document = json.loads((folder / "manifest.json").read_text())
    write_json(folder / "manifest.json", {**document, "files": file_entries(folder)})


def edit(**changes: object) -> Callable[[Path], None]:
    def change(bundle: Path) -> None:
        document = json.loads((bundle / SIGNATURE).read_text())
        write_json(bundle / SIGNATURE, {**document, **changes})

    return change


CHANGES: list[tuple[Callable[[Path], None], str]] = [
    (threshold, r"manifest\.json was changed after it was signed\. Have it signed again by who made it"),
    (another_engine, r"engines/sm86/manifest\.json was added after .* was signed"),
    (plan_and_hash, r"engines/native/manifest\.json was changed after it was signed"),
    (lambda b: (b / SIGNATURE).unlink(), "is not signed, .*line.pub was asked for"),
    (edit(signature="0" * 128), "is forged or damaged"),
    (edit(signed={"manifest.json": "0" * 64}), "is forged or damaged"),
    (edit(public_key="0" * 64), "is signed by the key 0000000000000000..., not by that of .*line.pub"),
    (edit(signature="0"), "is damaged: Expected `str` matching regex"),
    (lambda b: (b / SIGNATURE).write_text("[" * 100_000), "is not valid JSON"),
]


@pytest.mark.parametrize(("change", "words"), CHANGES)
def test_what_was_not_signed_is_refused(
    signed: Path, keys: Path, change: Callable[[Path], None], words: str
) -> None:
    change(signed)
    with pytest.raises(ArtifactError, match=words):
        verify_signature(signed, keys / "line.pub")


def test_a_key_that_is_none_is_named(signed: Path, keys: Path, tmp_path: Path) -> None:
    rsa, locked = tmp_path / "rsa.key", tmp_path / "locked.key"
    openssl("genpkey", "-algorithm", "rsa", "-pkeyopt", "rsa_keygen_bits:2048", "-out", rsa)
    openssl("pkey", "-in", keys / "line.key", "-aes128", "-passout", "pass:secret", "-out", locked)
    for key, words in (
        (rsa, "is a key of another kind, expected Ed25519; make one: openssl genpkey"),
        (locked, "has a password; give a key without one"),
        (keys / "line.pub", "is no private key in PEM"),
        (tmp_path / "none", "cannot be read .No such file"),
    ):
        with pytest.raises(ArtifactError, match=words):
            sign(signed, key)
    with pytest.raises(ArtifactError, match="is no public key in PEM; write it from the private one"):
        verify_signature(signed, keys / "line.key")
    with pytest.raises(ArtifactError, match=r"is signed by the key .*other\.pub"):
        verify_signature(signed, keys / "other.pub")


def test_nothing_damaged_is_signed(signed: Path, keys: Path, tmp_path: Path) -> None:
    (signed / "engines/native/vm.plan").write_bytes(b"other")
    with pytest.raises(ArtifactError, match=r"vm\.plan was changed after it was written"):
        sign(signed, keys / "line.key")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="name a bundle or a repository"):
        sign(tmp_path / "empty", keys / "line.key")
    write_json(tmp_path / "empty" / "manifest.json", {"format": "m3ad-rig"})
    with pytest.raises(ArtifactError, match="describes 'm3ad-rig', expected one of m3ad-bundle"):
        sign(tmp_path / "empty", keys / "line.key")


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_no_changed_byte_of_a_manifest_passes(
    tmp_path_factory: pytest.TempPathFactory, keys: Path, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "one"
    folder.mkdir(exist_ok=True)
    (folder / "file").write_bytes(b"x")
    write_json(
        folder / "manifest.json",
        {"format": "m3ad-repository", "files": {"file": file_entries(folder)["file"]}},
    )
    sign(folder, keys / "line.key")
    content = bytearray((folder / "manifest.json").read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(ArtifactError, match="was changed after it was signed"):
        verify_signature(folder, keys / "line.pub")
    (folder / SIGNATURE).unlink()


def test_the_commands_take_what_was_signed_and_nothing_else(
    tiny_bundle: Bundle, fused_repository: Path, category: Path, keys: Path, tmp_path: Path
) -> None:
    bundle, repository = tmp_path / "bundle", tmp_path / "repository"
    shutil.copytree(tiny_bundle.path, bundle)
    shutil.copytree(fused_repository, repository)
    frames, required = str(category / "test/bump"), ["--require-signature", str(keys / "line.pub")]

    def outcome(app: object, *arguments: str) -> str:
        done = CliRunner().invoke(app, arguments)  # type: ignore[arg-type]
        return (
            str(done.exception)
            if isinstance(done.exception, ArtifactError)
            else f"{done.exit_code} {done.output}"
        )

    commands = (
        (triton, "write", str(bundle), str(tmp_path / "written")),
        (triton, "serve", str(repository)),
        (client, "infer", frames, "--bundle", str(bundle)),
    )
    for app, *arguments in commands:
        assert "is not signed" in outcome(app, *arguments, *required)
    assert not (tmp_path / "written").exists()
    for path in (bundle, repository):
        assert outcome(export, "sign", str(path), "--key", str(keys / "line.key")).startswith("0 ")
    assert outcome(triton, "write", str(bundle), str(tmp_path / "written"), *required).startswith("0 ")
    assert outcome(client, "infer", frames, "--bundle", str(bundle), *required).startswith("0 ")
    verify_signature(repository, keys / "line.pub")
    Repository.open(repository)  # the signature is no foreign file
    (repository / "other_head/1/model.py").write_text("print('mine')")
    rehash(repository)
    assert "manifest.json was changed after it was signed" in outcome(
        triton, "serve", str(repository), *required
    )
    assert "2 " in outcome(client, "infer", frames, *required)[:2]


def test_the_package_that_is_missing_is_named(
    signed: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    for use in (lambda: sign(signed, keys / "line.key"), lambda: verify_signature(signed, keys / "line.pub")):
        with pytest.raises(MissingDependencyError, match=r"pip install 'm3ad\[sign\]'"):
            use()
