"""JSON that other people may have touched -> typed values: every field is checked for type and range as it is read.

NaN, Infinity, numbers beyond a float, `true` for a number and bottomless nesting are refused, as RFC 8259 has no word
for the first three and no field of ours wants the others.
"""

from pathlib import Path
from typing import Any, TypeVar

import msgspec

from m3ad.errors import ArtifactError

Typed = TypeVar("Typed")


def read_json(path: Path, advice: str) -> Any:
    """Read a JSON file.

    Args:
        path: the file, UTF-8.
        advice: what to do when it cannot be used, a sentence.

    Raises:
        ArtifactError: it cannot be read or is not valid JSON.
    """
    try:
        return parse_json(path.read_bytes(), str(path), advice)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror}). {advice}") from error


def parse_json(text: str | bytes, source: str, advice: str) -> Any:
    """Parse one JSON document; `source` names it in the error.

    Raises:
        ArtifactError: it is not valid JSON.
    """
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ArtifactError(f"{source} is not valid JSON ({error}). {advice}") from error


def typed(values: Any, kind: type[Typed], source: str, advice: str) -> Typed:
    """Check parsed JSON against a msgspec Struct or a dataclass and return it as one.

    Raises:
        ArtifactError: a field is missing, or is of another type or out of range; the message names it.
    """
    try:
        return msgspec.convert(values, kind, strict=True)
    except (msgspec.ValidationError, RecursionError) as error:
        raise ArtifactError(f"{source} is damaged: {error}. {advice}") from error
