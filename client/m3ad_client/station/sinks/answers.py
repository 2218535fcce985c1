"""What a sink answers when it does not take a verdict."""

from m3ad.errors import M3adError


class NotNow(M3adError):  # noqa: N818 - an answer of a sink, in its words
    """A sink cannot take a verdict at the moment; it waits and is sent again."""


class Refused(M3adError):  # noqa: N818
    """A sink will never take this verdict; it becomes a dead letter and the next one is sent."""
