"""Who made a bundle or a repository: an Ed25519 signature over its manifests, whose hashes cover every file.

Hashes in a manifest show damage; whoever changes a file can change its hash. `signature.json` names the sha256 of
`manifest.json` and of each `engines/TARGET/manifest.json`, signed by a key that the line trusts.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta, Struct, to_builtins

from m3ad.atomic import locked
from m3ad.bundle import FORMAT as BUNDLE_FORMAT
from m3ad.bundle import MANIFEST, Bundle, sha256_of, verify_files, write_json
from m3ad.errors import ArtifactError, MissingDependencyError
from m3ad.manifest import Sha256, is_inside
from m3ad.typed_json import read_json, typed

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNATURE = "signature.json"
FORMAT = "m3ad-signature"
SIGNED_FORMATS = (BUNDLE_FORMAT, "m3ad-repository", "m3ad-engines")
ENGINES = f"engines/*/{MANIFEST}"


class Signature(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `signature.json` holds: the signed manifests by path, and in hexadecimal the key and its signature."""

    format: Literal["m3ad-signature"] = "m3ad-signature"
    signed: dict[str, Sha256]
    public_key: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
    signature: Annotated[str, Meta(pattern=r"^[0-9a-f]{128}\Z")]


def sign(folder: Path, key: Path) -> Path:
    """Sign the manifests of a bundle or repository as they are now; an older signature is replaced.

    Args:
        folder: every file that a manifest of its lists is checked first.
        key: an Ed25519 private key, PEM without a password.

    Returns:
        The signature's file.

    Raises:
        ArtifactError: it is neither, a file was changed, or the key cannot be read or is another kind of key.
        MissingDependencyError: the package cryptography is not installed.
    """
    private = _private_key(key)
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder; name a bundle or a repository")
    with locked(folder):
        signed = {name: sha256_of(folder / name) for name in _manifests(folder)}
        for name in signed:
            _verify(folder / name)
        signature = Signature(
            signed=signed,
            public_key=private.public_key().public_bytes_raw().hex(),
            signature=private.sign(_message(signed)).hex(),
        )
        write_json(folder / SIGNATURE, to_builtins(signature))
    return folder / SIGNATURE


def verify_signature(folder: Path, key: Path) -> None:
    """Check that the manifests of a bundle or repository are what the owner of a key signed; nothing else is read.

    Args:
        folder: to open next; opening it checks its files against the manifests.
        key: the Ed25519 public key that is trusted, PEM.

    Raises:
        ArtifactError: there is no signature, it is of another key or of other manifests, or a key cannot be read.
        MissingDependencyError: the package cryptography is not installed.
    """
    public = _public_key(key)
    advice = f"Have it signed again by who made it: m3ad-export sign {folder} --key KEY"
    path = folder / SIGNATURE
    if not path.is_file():
        raise ArtifactError(f"{folder} is not signed, {key} was asked for. {advice}")
    found = typed(read_json(path, advice), Signature, str(path), advice)
    if found.public_key != public.public_bytes_raw().hex():
        raise ArtifactError(
            f"{folder} is signed by the key {found.public_key[:16]}..., not by that of {key}. {advice}"
        )
    if not _is_genuine(public, found):
        raise ArtifactError(
            f"{path} is forged or damaged: its signature is not by the key of {key}. {advice}"
        )
    for name in _manifests(folder):
        if name not in found.signed:
            raise ArtifactError(f"{folder / name} was added after {folder} was signed. {advice}")
        if sha256_of(folder / name) != found.signed[name]:
            raise ArtifactError(f"{folder / name} was changed after it was signed. {advice}")


def _manifests(folder: Path) -> list[str]:
    names = [MANIFEST, *sorted(path.relative_to(folder).as_posix() for path in folder.glob(ENGINES))]
    for name in names:
        if not (folder / name).is_file() or not is_inside(name) or "\n" in name:
            raise ArtifactError(f"{folder} has no {name!r} that can be signed; name a bundle or a repository")
    return names


def _verify(manifest: Path) -> None:
    """Check what a manifest lists; a bundle's every field too, which its signature would vouch for."""
    advice = "Write it again before it is signed"
    document = read_json(manifest, advice)
    found = document.get("format") if isinstance(document, dict) else None
    if found not in SIGNED_FORMATS:
        raise ArtifactError(
            f"{manifest} describes {found!r:.60}, expected one of {', '.join(SIGNED_FORMATS)}. {advice}"
        )
    if found == BUNDLE_FORMAT:
        Bundle.open(manifest.parent)
    else:
        verify_files(manifest.parent, document.get("files"), advice)


def _message(signed: dict[str, str]) -> bytes:
    """What is signed: a line that says for what, and a line for each manifest as sha256sum writes it."""
    lines = [FORMAT, *(f"{digest}  {name}" for name, digest in sorted(signed.items()))]
    return "".join(f"{line}\n" for line in lines).encode()


def _is_genuine(public: "Ed25519PublicKey", found: Signature) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        public.verify(bytes.fromhex(found.signature), _message(found.signed))
    except InvalidSignature:
        return False
    return True


def _private_key(path: Path) -> "Ed25519PrivateKey":
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    except ImportError as error:
        raise _missing() from error
    advice = f"make one: openssl genpkey -algorithm ed25519 -out {path}"
    content = _content(path, advice)
    try:
        key = load_pem_private_key(content, None)
    except TypeError as error:
        raise ArtifactError(
            f"{path} has a password; give a key without one: openssl pkey -in {path} -out KEY"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ArtifactError(f"{path} is no private key in PEM; {advice}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ArtifactError(f"{path} is a key of another kind, expected Ed25519; {advice}")
    return key


def _public_key(path: Path) -> "Ed25519PublicKey":
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ImportError as error:
        raise _missing() from error
    advice = f"write it from the private one: openssl pkey -in KEY -pubout -out {path}"
    content = _content(path, advice)
    try:
        key = load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ArtifactError(f"{path} is no public key in PEM; {advice}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ArtifactError(f"{path} is a key of another kind, expected Ed25519; {advice}")
    return key


def _content(path: Path, advice: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror}); {advice}") from error


def _missing() -> MissingDependencyError:
    return MissingDependencyError(
        "cryptography is not installed, signatures need it: pip install 'm3ad[sign]'"
    )
