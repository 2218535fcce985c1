"""The station's page: a wall of cameras, a list with filters, one part, the histogram of scores.

Read-only without the token; frames and reviews need it, as `Authorization: Bearer TOKEN`, which no other site's page
can send. Everything comes from this process: no script, font or picture is loaded from anywhere else.
"""

import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import PlainTextResponse
from fastapi.staticfiles import StaticFiles
from fastapi.templating import Jinja2Templates
from m3ad.errors import FrameError, M3adError
from m3ad.limits import Limits

from m3ad_client.station import histogram
from m3ad_client.station.api import add_api
from m3ad_client.station.parts_query import WORDS, beside, listed
from m3ad_client.station.view import View

HERE = Path(__file__).parent
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
MOST_SCORES = 20_000  # of the histogram: the last ones
ON_WALL = 12


def create_app(view: View) -> FastAPI:
    """The application that serves the page, its pictures and the interface for programs."""
    app = FastAPI(title="m3ad station", docs_url=None, redoc_url=None, openapi_url=None)
    app.mount("/static", StaticFiles(directory=HERE / "static"))
    page = view.settings.page
    assert page is not None

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        # Another site's name that leads to this machine must not read the page through somebody's browser.
        host = request.url.hostname or ""
        if host not in page.names():
            return PlainTextResponse(
                f"this station is not called {host}; name it in `hosts` of [page]\n", 421
            )
        try:
            answer = await call_next(request)
        except M3adError as error:
            answer = PlainTextResponse(f"{error}\n", 503)
        answer.headers.update(HEADERS)
        return answer

    add_api(app, view)
    _add_pages(app, view)
    return app


def _add_pages(app: FastAPI, view: View) -> None:
    templates = Jinja2Templates(HERE / "templates")
    templates.env.filters |= {"when": _when, "number": _number}
    ledger = view.ledger

    def shown(request: Request, template: str, **values: Any) -> Response:
        values |= {"station": view.settings.store.name, "writable": view.token is not None}
        return templates.TemplateResponse(request, template, values)

    @app.get("/")
    def wall(request: Request) -> Response:
        cameras = [
            {
                "name": name,
                "last": ledger.parts("camera = ? AND state != 'taken'", name, order="id DESC", limit=ON_WALL),
            }
            for name in view.lines
        ]
        return shown(request, "wall.html", cameras=cameras, status=view.status())

    @app.get("/parts")
    def parts(request: Request) -> Response:
        filters = view.filters(request)
        found, more = listed(ledger, filters)
        return shown(
            request,
            "list.html",
            parts=found,
            more=more,
            filters=filters,
            cameras=list(view.lines),
            words=list(WORDS),
        )

    @app.get("/parts/{number}")
    def one(request: Request, number: int) -> Response:
        part, filters = view.part(number), view.filters(request)
        maps = list(view.kept(part).maps) if part.maps and part.pictures else []
        return shown(
            request,
            "part.html",
            part=part,
            setup=view.setup(part),
            maps=maps,
            beside=beside(ledger, filters, number),
            filters=filters,
        )

    @app.get("/scores")
    def scores(request: Request) -> Response:
        drawn = [entry for name in view.lines if (entry := _scores_of(view, name))]
        return shown(request, "scores.html", cameras=drawn, width=histogram.WIDTH, height=histogram.HEIGHT)

    @app.get("/parts/{number}/{picture}")
    def picture(number: int, picture: str) -> Response:
        part = view.part(number)
        private = {"Cache-Control": "private, max-age=3600"}
        if picture == "overlay.png" and part.overlay:
            try:
                content = (view.settings.store.folder / part.overlay).read_bytes()
            except OSError as error:
                raise HTTPException(404, f"{part.overlay}: {error.strerror}") from error
            return Response(content, media_type="image/png", headers=private)
        kept = view.kept(part)
        if picture == "cloud.bin":
            return Response(kept.cloud(), media_type="application/octet-stream", headers=private)
        drawn = {"rgb.png": kept.rgb, "height.png": kept.height}.get(picture)
        try:
            content = drawn() if drawn else kept.heat(picture.removeprefix("heat-").removesuffix(".png"))
        except FrameError as error:
            raise HTTPException(404, str(error)) from error
        return Response(content, media_type="image/png", headers=private)


def _scores_of(view: View, camera: str) -> dict[str, Any] | None:
    """A camera's histogram with the limits that its last part was held against; None without a score."""
    rows = view.ledger.query(
        "SELECT score, setup FROM part WHERE camera = ? AND state = 'judged' ORDER BY id DESC LIMIT ?",
        camera,
        MOST_SCORES,
    )
    if not rows:
        return None
    scores, told = [row["score"] for row in rows], view.ledger.setup(rows[0]["setup"])["limits"]
    limits = Limits(told["reject"], told["review"])
    lines = {n: (v, histogram.place(v, scores, limits)) for n, v in told.items() if v is not None}
    return {"name": camera, "bars": histogram.bars(scores, limits), "limits": lines, "count": len(scores)}


def _when(seconds: float | None) -> str:
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}g}"
