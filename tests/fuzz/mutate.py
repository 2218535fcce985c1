"""Small damage to files and JSON, the same for the same generator."""

import copy
import json
import struct
import zlib
from random import Random
from typing import Any

ODD_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, 3.5, -0.0, 1e308, float("nan"), float("inf"), -float("inf"),
    "", "x", "1", "NaN", "../../x", "/etc/passwd", "a\x00b", "\ud800", "\x1b[2J", "x" * 3000, [], {}, [[]], [1, 2],
    {"a": 1},
]  # fmt: skip
ODD_DOCUMENTS = [
    b"", b"[]", b"null", b"1", b'"x"', b"{}", b"[" * 100_000, b'{"a":' * 50_000, b"\0" * 100, b"\xef\xbb\xbf{}",
    b'{"n":' + b"9" * 5000 + b"}", '{"a": 1}'.encode("utf-16"), b'{"a": 1, "a": 2}', b'{"format":"m3ad-bundle"}',
]  # fmt: skip
ODD_NUMBERS = (
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    16,
    127,
    128,
    255,
    256,
    1 << 15,
    (1 << 16) - 1,
    1 << 24,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
)


def damaged_json(rng: Random, document: Any) -> bytes:
    """The document with one or two values replaced or gone, or its text cut, flipped or another altogether."""
    kind = rng.random()
    if kind < 0.05:
        return rng.choice(ODD_DOCUMENTS)
    if kind < 0.15:
        return damaged_bytes(rng, json.dumps(document).encode())
    changed = copy.deepcopy(document)
    for _ in range(rng.choice((1, 1, 1, 2))):
        place: Any = changed
        while isinstance(place, dict | list) and place:
            key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
            below = place[key]
            if not isinstance(below, dict | list) or not below or rng.random() < 0.3:
                if rng.random() < 0.25:
                    del place[key]
                elif rng.random() < 0.1 and isinstance(place, dict):
                    place["unknown"] = rng.choice(ODD_VALUES)
                else:
                    place[key] = rng.choice(ODD_VALUES)
                break
            place = below
    return json.dumps(changed).encode("utf-8", "surrogatepass")


def damaged_bytes(rng: Random, content: bytes, other: bytes = b"") -> bytes:
    """One to eight edits: bytes and numbers replaced, pieces gone, doubled or of another file, the end cut off."""
    found = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        if not found:
            break
        at, kind = rng.randrange(len(found)), rng.random()
        if rng.random() < 0.5:
            at = rng.randrange(min(len(found), 200))  # headers decide
        if kind < 0.35:
            found[at] = rng.choice((rng.randrange(256), 0, 255, found[at] ^ (1 << rng.randrange(8))))
        elif kind < 0.65:
            size = rng.choice(("<H", ">H", "<I", ">I", "<Q"))
            number = rng.choice(ODD_NUMBERS) & ((1 << (8 * struct.calcsize(size))) - 1)
            found[at : at + struct.calcsize(size)] = struct.pack(size, number)
        elif kind < 0.75:
            del found[at : at + rng.randrange(1, 64)]
        elif kind < 0.85:
            found[at:at] = found[at : at + rng.randrange(1, 64)]
        elif kind < 0.92:
            found[at : at + rng.randrange(64)] = other[at : at + rng.randrange(64)]
        else:
            del found[at:]
    whole = bytes(found)
    return _with_checksums(whole) if whole.startswith(b"\x89PNG") and rng.random() < 0.7 else whole


def _with_checksums(png: bytes) -> bytes:
    """A PNG whose chunks have the checksums of what they hold, so that a decoder looks at it."""
    found, at = bytearray(png), 8
    while at + 12 <= len(found):
        (size,) = struct.unpack_from(">I", found, at)
        if at + 12 + size > len(found):
            break
        struct.pack_into(">I", found, at + 8 + size, zlib.crc32(found[at + 4 : at + 8 + size]))
        at += 12 + size
    return bytes(found)
