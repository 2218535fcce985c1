"""What the page and the interface for programs share: parts out of the ledger, their pictures, the token."""

import hmac
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException, Request
from m3ad.errors import FrameError
from m3ad.ledger import Ledger, Part

from m3ad_client.station import config
from m3ad_client.station.line import Line
from m3ad_client.station.parts_query import Filters
from m3ad_client.station.pictures import Kept
from m3ad_client.station.sinks.event import event


@dataclass
class View:
    """A station as it is seen.

    Args:
        settings: its configuration.
        ledger: an own connection, so that reading holds no line up.
        lines: the cameras.
        status: faults and queues.
        stop: set when the station ends.
        token: what reviewing and sending frames needs; None where neither is allowed.
    """

    settings: config.Config
    ledger: Ledger
    lines: dict[str, Line]
    status: Callable[[], dict[str, Any]]
    stop: threading.Event
    token: bytes | None

    def require_token(self, request: Request) -> None:
        """Refuse who does not have the token: 403 where there is none, 401 else."""
        if self.token is None:
            raise HTTPException(403, "this station takes nothing: name a `token_file` in [page]")
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if not hmac.compare_digest(given, self.token):
            raise HTTPException(401, "the token is missing or wrong", {"WWW-Authenticate": "Bearer"})

    def filters(self, request: Request) -> Filters:
        """The filters of a request, 422 where they are none."""
        try:
            return Filters.read(dict(request.query_params))
        except ValueError as error:
            raise HTTPException(422, str(error)) from error

    def part(self, number: int) -> Part:
        """A part, 404 where there is none."""
        part = self.ledger.part(number) if 0 <= number < 2**63 else None
        if part is None:
            raise HTTPException(404, f"there is no part {number}")
        return part

    def setup(self, part: Part) -> dict[str, Any]:
        """What judged a part; empty where nothing did."""
        return {} if part.setup is None else self.ledger.setup(part.setup)

    def kept(self, part: Part) -> Kept:
        """A part's pictures, 410 where they are removed and 404 where they cannot be read."""
        if not part.pictures:
            raise HTTPException(
                410, "the pictures of this part are removed by age or size; its verdict stays"
            )
        setup, line = self.setup(part), self.lines.get(part.camera)
        limits = setup.get("limits") or {}
        high = limits.get("review") if limits.get("review") is not None else limits.get("reject")
        camera = line.inbox.depth_camera() if line else None
        try:
            return Kept(self.settings.store.folder, part, camera, setup.get("geometry", "points"), high)
        except (FrameError, OSError) as error:
            raise HTTPException(404, f"the pictures of part {part.id} cannot be read: {error}") from error

    def told(self, part: Part) -> dict[str, Any]:
        """A part for programs: what sinks are told, and what is known besides."""
        more = {
            "said": part.said,
            "state": part.state,
            "pictures": part.pictures,
            "not_saved": part.not_saved,
        }
        return {**event(part, self.setup(part)), **more}
