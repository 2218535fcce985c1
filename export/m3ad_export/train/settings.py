"""Ranges of a method's training settings: what is out of range is refused before a frame is read."""

import math
from dataclasses import fields
from typing import Any


def require_ranges(settings: Any, may_be_zero: tuple[str, ...] = ()) -> None:
    """Check the numbers of a settings dataclass: counts from 1 on, or from 0 where named, others positive and finite.

    Raises:
        ValueError: one is out of range; the message names it.
    """
    for field in fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if isinstance(value, int):
            least = 0 if field.name in may_be_zero else 1
            if value < least:
                raise ValueError(f"{field.name} must be at least {least}, got {value}")
        elif not 0 < value < math.inf:
            raise ValueError(f"{field.name} must be a positive number, got {value}")
