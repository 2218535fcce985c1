"""Saved results of `eval --json` and `bench --json`, read again: every entry a table is made of is looked at first."""

import json
import math
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from m3ad.errors import ArtifactError

# A check of one value: it returns quietly, or raises ValueError with what was expected.
Check = Callable[[Any], None]


def read_result(path: Path) -> dict[str, Any]:
    """What `eval --json` or `bench --json` wrote to `path`: `rows` are in the latter alone, `metrics` in the former.

    Raises:
        ArtifactError: it cannot be read, is something else, or has an entry that no table can show.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ArtifactError(
            f"{path} cannot be read as JSON ({why}); write it with --json > {path}"
        ) from error
    kind = _kind(document)
    if kind is None:
        raise ArtifactError(
            f"{path} is no result of `m3ad-client eval --json` or `bench --json` of this m3ad"
        )
    try:
        (_bench if kind == "bench" else _evaluation)(document)
    except ValueError as error:
        raise ArtifactError(
            f"{path}, a result of `m3ad-client {kind} --json`, is damaged: entry {error}; write it again"
        ) from error
    other = "metrics" if kind == "bench" else "rows"
    return {name: value for name, value in document.items() if name != other}


def _kind(document: Any) -> str | None:
    if not isinstance(document, dict):
        return None
    if document.get("rows") and {"ratios", "paper"} <= document.keys():
        return "bench"
    return "eval" if "metrics" in document else None


def _number(value: Any) -> None:
    """A number that is printed: no NaN, no infinity, nothing beyond a float."""
    known = isinstance(value, int | float) and not isinstance(value, bool)
    if not known or not abs(value) < 1e300 or not math.isfinite(value):
        raise _wrong(value, "a finite number")


def _text(value: Any) -> None:
    if not isinstance(value, str) or any(unicodedata.category(c) in ("Cc", "Cs") for c in value):
        raise _wrong(value, "text")


def _plain(value: Any) -> None:
    """A cell that is printed as it stands."""
    (_text if isinstance(value, str) else _number)(value)


def _or_none(check: Check) -> Check:
    def look(value: Any) -> None:
        if value is not None:
            check(value)

    return look


def _list(check: Check) -> Check:
    def look(value: Any) -> None:
        if not isinstance(value, list):
            raise _wrong(value, "a list")
        for index, entry in enumerate(value):
            _at(str(index), check, entry)

    return look


def _map(check: Check) -> Check:
    def look(value: Any) -> None:
        if not isinstance(value, dict):
            raise _wrong(value, "an object")
        for name, entry in value.items():
            _text(name)
            _at(name, check, entry)

    return look


def _object(checks: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    def look(value: Any) -> None:
        if not isinstance(value, dict):
            raise _wrong(value, "an object")
        for name, check in checks.items():
            if name not in value:
                raise ValueError(f"`{name}` is missing")
            _at(name, check, value[name])
        for name, check in (optional or {}).items():
            if name in value:
                _at(name, check, value[name])

    return look


def _at(name: str, check: Check, value: Any) -> None:
    try:
        check(value)
    except ValueError as error:
        raise ValueError(f"`{name}` {error}") from error


def _wrong(value: Any, expected: str) -> ValueError:
    if isinstance(value, int) and abs(value) > 10**20:
        return ValueError(f"is a number of more than 20 digits, expected {expected}")
    shown = ascii(value)
    return ValueError(f"is {shown if len(shown) <= 60 else f'{shown[:57]}...'}, expected {expected}")


def _evaluation(document: dict[str, Any]) -> None:
    COUNTS(document)
    metrics = _object(dict.fromkeys(document["metrics"], _number))
    _at("per_defect", _map(metrics), document["per_defect"])


def _bench(document: dict[str, Any]) -> None:
    BENCH(document)
    for name in document["ratios"]:
        if name not in document["ratio_spread"]:
            raise ValueError(f"`ratio_spread` lacks `{name}`, which `ratios` has")
    paper = document["paper"]
    if any(len(row) != len(paper["columns"]) for row in paper["rows"]):
        raise ValueError(f"`paper` `rows` are not all of its {len(paper['columns'])} columns")


VERDICTS = _object(dict.fromkeys(("found", "missed", "false_alarms", "passed"), _number))
COUNTS = _object(
    {
        **dict.fromkeys(("category", "split", "weights"), _text),
        **dict.fromkeys(("frames", "threshold"), _number),
        "metrics": _map(_number),
        "per_defect": _map(_object({"frames": _number})),
        "verdicts": VERDICTS,
    },
    {"score_maps": _map(_object(dict.fromkeys(("image_auroc", "pixel_auroc"), _number)))},
)
ROW = _object(
    {
        **dict.fromkeys(
            ("name", "region", "how", "hardware", "device", "runtime", "precision", "weights"), _text
        ),
        **dict.fromkeys(("frames_per_second", "p50_ms", "p90_ms", "p99_ms", "load_before"), _number),
        **dict.fromkeys(("frames", "warmup_frames", "mean_points"), _number),
        **dict.fromkeys(("threads", "cold_start_ms", "map_max_error"), _or_none(_number)),
    }
)
STAGE = _object(
    {
        **dict.fromkeys(("run", "stage"), _text),
        **dict.fromkeys(("uses", "infer_ms", "queue_ms", "transfer_ms"), _number),
    }
)
MEMORY = _object(
    {
        **dict.fromkeys(("parameter_bytes", "device_bytes"), _or_none(_number)),
        "peak": _or_none(_map(_or_none(_number))),
    },
    {"growth": _or_none(_object({"frames": _number, "bytes": _number}))},
)
ARTEFACTS = _object(
    {
        **dict.fromkeys(("export_s", "onnx_bytes"), _number),
        "engines": _map(_object({"precision": _text, "build_s": _number, "bytes": _number})),
    }
)
PAPER = _object(
    {
        **dict.fromkeys(("source", "measured_on"), _text),
        "columns": _list(_text),
        "rows": _list(_list(_plain)),
        "caveats": _list(_text),
    }
)
BENCH = _object(
    {
        "rows": _list(ROW),
        "ratios": _map(_number),
        "ratio_spread": _map(_object({"low": _number, "high": _number})),
        "stages": _list(STAGE),
        "memory": _map(MEMORY),
        "paper": PAPER,
    },
    {"artefacts": ARTEFACTS},
)
