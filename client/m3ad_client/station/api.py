"""The interface for programs: status, parts, reviews, and frames that come by HTTP instead of a folder."""

import asyncio
import hashlib
import time
from pathlib import Path
from typing import Annotated, Any

from fastapi import Body, FastAPI, File, Form, HTTPException, Request, Response, UploadFile
from m3ad.atomic import file_beside
from m3ad.frames import RGB_SUFFIXES
from m3ad.ledger import Part
from m3ad.xyz import DEPTH_SUFFIXES, XYZ_SUFFIXES

from m3ad_client.station import sink_tables
from m3ad_client.station.line import Line
from m3ad_client.station.parts_query import listed
from m3ad_client.station.view import View

LARGEST_FILE = 256 * 2**20
VERDICT_WAIT_S = 30.0  # how long a frame's answer waits for its verdict


def add_api(app: FastAPI, view: View) -> None:
    """Add the routes below /api."""
    ledger = view.ledger

    @app.get("/api/status")
    def status() -> dict[str, Any]:
        last = ledger.query("SELECT coalesce(max(id), 0) FROM part WHERE state != 'taken'")[0][0]
        return {**view.status(), "last": last}

    @app.get("/api/parts")
    def parts(request: Request) -> dict[str, Any]:
        found, more = listed(ledger, view.filters(request))
        return {"parts": [view.told(part) for part in found], "before": found[-1].id if more else None}

    @app.get("/api/parts/{number}")
    def part(number: int) -> dict[str, Any]:
        return view.told(view.part(number))

    @app.post("/api/parts/{number}/review")
    def review(
        request: Request,
        number: int,
        said: Annotated[str, Body()],
        by: Annotated[str, Body(max_length=64)] = "page",
    ) -> dict[str, Any]:
        view.require_token(request)
        if said not in ("good", "defect"):
            raise HTTPException(422, f"said is {said!r}, expected good or defect")
        ledger.say(view.part(number).id, "good" if said == "good" else "defect", by)
        return view.told(view.part(number))

    @app.post("/api/cameras/{camera}/frames")
    async def frame(
        request: Request,
        camera: str,
        rgb: Annotated[UploadFile, File()],
        xyz: Annotated[UploadFile, File()],
        name: Annotated[str, Form()] = "",
    ) -> Any:
        view.require_token(request)
        if camera not in view.lines:
            raise HTTPException(404, f"there is no camera {camera}; expected one of {', '.join(view.lines)}")
        name = name or Path(rgb.filename or "").stem
        if not sink_tables.NAME.match(name):
            raise HTTPException(
                422, f"{name!r} is no name of a frame: expected letters, digits, '.', '_' and '-'"
            )
        line = view.lines[camera]
        files = {
            kind: (Path(file.filename or "").suffix.lower(), await file.read(LARGEST_FILE))
            for kind, file in (("rgb", rgb), ("xyz", xyz))
        }
        hashes = await asyncio.to_thread(place_frame, line, name, files)
        line.wake.set()
        end = time.monotonic() + VERDICT_WAIT_S
        while time.monotonic() < end and not view.stop.is_set():
            if found := await asyncio.to_thread(_judged, view, camera, name, hashes):
                return view.told(found)
            await asyncio.sleep(0.02)
        return Response('{"state": "waiting"}', 202, media_type="application/json")


def _judged(view: View, camera: str, name: str, hashes: tuple[str, str]) -> Part | None:
    where = "camera = ? AND name = ? AND rgb_sha256 = ? AND xyz_sha256 = ? AND state != 'taken'"
    return next(iter(view.ledger.parts(where, camera, name, *hashes)), None)


def place_frame(line: Line, name: str, files: dict[str, tuple[str, bytes]]) -> tuple[str, str]:
    """Lay a frame's files into a camera's folder, each whole or not at all; their sha256.

    Args:
        line: of the camera.
        name: of the frame.
        files: `rgb` and `xyz`: the ending, and the content.

    Raises:
        HTTPException: 422, a file is of another kind or too large; 409, another frame of this name waits; 507, there
            is no room.
    """
    folder = line.camera.folder
    is_apart = (folder / "rgb").is_dir()
    depth = is_apart and (folder / "depth").is_dir() and not (folder / "xyz").is_dir()
    for kind, known in (("rgb", RGB_SUFFIXES), ("xyz", DEPTH_SUFFIXES if depth else XYZ_SUFFIXES)):
        suffix, content = files[kind]
        if suffix not in known:
            raise HTTPException(422, f"{kind} ends in {suffix!r}, expected one of {', '.join(known)}")
        if not 0 < len(content) < LARGEST_FILE:
            raise HTTPException(422, f"{kind} is empty, or larger than {LARGEST_FILE >> 20} MiB")
    try:
        for kind in ("xyz", "rgb"):
            suffix, content = files[kind]
            place = folder / ("depth" if depth and kind == "xyz" else kind) if is_apart else folder
            place.mkdir(exist_ok=True)
            target = place / f"{name}{suffix}"
            if target.exists() and target.read_bytes() != content:
                raise HTTPException(
                    409, f"another frame {name} waits already; send this one again, or by another name"
                )
            with file_beside(target) as temporary:
                temporary.write_bytes(content)
        if line.camera.done_marker:
            (folder / f"{name}.done").touch()
    except OSError as error:
        raise HTTPException(507, f"camera {line.camera.name} takes no frame: {error.strerror}") from error
    return hashlib.sha256(files["rgb"][1]).hexdigest(), hashlib.sha256(files["xyz"][1]).hexdigest()
