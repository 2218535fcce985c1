"""JSON that other people may have touched -> typed values: every field is checked for type and range as it is read.

NaN, Infinity, numbers beyond a float, `true` for a number and bottomless nesting are refused, as RFC 8259 has no word
for the first three and no field of ours wants the others.
"""

import json
import math
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from m3ad.errors import ArtifactError, one_line

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
        document = json.loads(text)
    except RecursionError as error:
        raise ArtifactError(f"{source} is not valid JSON (it is nested too deeply). {advice}") from error
    except ValueError as error:
        raise ArtifactError(f"{source} is not valid JSON ({error}). {advice}") from error
    if odd := _not_json(document):
        raise ArtifactError(f"{source} is not valid JSON ({odd}). {advice}")
    return document


def _not_json(document: Any) -> str | None:
    """What Python's reader lets through and JSON has no word for, with its place; None when there is nothing."""
    rest: list[tuple[str, Any]] = [("$", document)]
    while rest:
        place, value = rest.pop()
        if isinstance(value, float) and not math.isfinite(value):
            return f"{value} is not a finite number - at `{place}`"
        if isinstance(value, dict):
            rest += [(place, key) for key in value]
            rest += [(f"{place}.{ascii(key)[1:-1]}", v) for key, v in value.items()]
        elif isinstance(value, list):
            rest += [(f"{place}[{i}]", v) for i, v in enumerate(value)]
        elif isinstance(value, str) and any(0xD800 <= ord(c) <= 0xDFFF for c in value):
            return f"half of a surrogate pair - at `{place}`"
    return None


def typed(values: Any, kind: type[Typed], source: str, advice: str) -> Typed:
    """Check parsed JSON against a msgspec Struct or a dataclass and return it as one.

    Raises:
        ArtifactError: a field is missing, or is of another type or out of range; the message names it.
    """
    try:
        return msgspec.convert(values, kind, strict=True)
    except (msgspec.ValidationError, RecursionError) as error:
        raise ArtifactError(f"{source} is damaged: {one_line(error)}. {advice}") from error


def require_whole(
    values: dict[str, Any], whole: dict[str, Any], place: str, source: str, advice: str
) -> None:
    """Check that an object names exactly the fields of `whole`: a size that is left out must not become a default.

    Raises:
        ArtifactError: one is missing or unknown.
    """
    if odd := sorted(map(ascii, values.keys() ^ whole.keys())):
        raise ArtifactError(
            f"{source} is damaged: missing or unknown: {', '.join(odd)} - at `{place}`. {advice}"
        )
