"""The page and the interface for programs, over real HTTP: what is shown, what is taken, what is refused."""

import io
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from m3ad.errors import ArtifactError
from m3ad.frames import read_frame
from m3ad.holes import measured
from m3ad.ledger import Ledger
from m3ad.limits import Limits
from m3ad_client.station import histogram, parts_query
from m3ad_client.station.config import read_config
from m3ad_client.station.station import Station
from PIL import Image
from serving import make_frame, write_frame
from stations import PAGE, TOKEN

BEARER = {"Authorization": f"Bearer {TOKEN}"}


def test_pages_show_what_the_ledger_has(served: tuple[Station, httpx.Client]) -> None:
    station, client = served
    wall = client.get("/")
    assert wall.status_code == 200
    assert re.findall(r'class="dot (\w+)"', wall.text) == ["fault", "defect", "defect"]
    assert "expected at least 1024" in wall.text
    assert "default-src 'self'" in wall.headers["content-security-policy"]
    assert not re.search(r"https?://", wall.text)
    part = station.ledger.part(1)
    assert part is not None
    page = client.get("/parts/1").text
    assert f"score {part.score:.4g}" in page
    assert page.count('<td class="n">') == 5 * len(part.defects or ())
    assert "heat-anomaly.png" in page
    assert 'data-newer="2" data-older=""' in page
    assert client.get("/scores").text.count("<rect") == histogram.BARS
    assert client.get("/parts/99").status_code == 404
    assert client.get("/parts/1/heat-none.png").status_code == 404


def test_pictures_are_the_frame_and_its_map(served: tuple[Station, httpx.Client], tmp_path: Path) -> None:
    station, client = served
    part = station.ledger.part(1)
    assert part is not None
    frame = read_frame(tmp_path / "station" / part.rgb, tmp_path / "station" / part.xyz)
    with Image.open(io.BytesIO(client.get("/parts/1/rgb.png").content)) as shown:
        np.testing.assert_array_equal(np.asarray(shown), frame.rgb)
    with Image.open(io.BytesIO(client.get("/parts/1/heat-anomaly.png").content)) as heat:
        assert heat.mode == "RGBA"
        assert heat.size == frame.rgb.shape[1::-1]
    with Image.open(io.BytesIO(client.get("/parts/1/height.png").content)) as height:
        pixels = np.asarray(height)
    seen = measured(frame.xyz)
    assert {*map(tuple, pixels[~seen])} == {(30, 41, 99)}
    near, far = frame.xyz[seen][:, 2].argmin(), frame.xyz[seen][:, 2].argmax()
    assert pixels[seen][near][0] == 255
    assert pixels[seen][far][0] == 0
    with Image.open(io.BytesIO(client.get("/parts/1/overlay.png").content)) as overlay:
        assert overlay.format == "PNG"
    cloud = client.get("/parts/1/cloud.bin").content
    (count,) = np.frombuffer(cloud, "<u4", 1)
    assert count == seen.sum()
    points = np.frombuffer(cloud, "<f4", 3 * count, 4).reshape(-1, 3)
    own = frame.xyz[seen]
    np.testing.assert_allclose(points, own - np.median(own, axis=0), atol=1e-6)
    np.testing.assert_array_equal(
        np.frombuffer(cloud, np.uint8, 3 * count, 4 + 12 * count).reshape(-1, 3), frame.rgb[seen]
    )
    assert len(cloud) == 4 + 18 * count


def test_a_review_needs_the_token(served: tuple[Station, httpx.Client]) -> None:
    station, client = served
    assert client.post("/api/parts/1/review", json={"said": "good"}).status_code == 401
    wrong = client.post("/api/parts/1/review", json={"said": "good"}, headers={"Authorization": "Bearer x"})
    assert wrong.json() == {"detail": "the token is missing or wrong"}
    assert client.post("/api/parts/1/review", json={"said": "maybe"}, headers=BEARER).status_code == 422
    assert client.post("/api/parts/9/review", json={"said": "good"}, headers=BEARER).status_code == 404
    assert station.ledger.query("SELECT count(*) FROM review")[0][0] == 0
    told = client.post("/api/parts/1/review", json={"said": "good", "by": "ann"}, headers=BEARER)
    assert told.json()["said"] == "good"
    assert client.get("/api/parts/1").json() == told.json()
    assert [p["id"] for p in client.get("/api/parts?verdict=open").json()["parts"]] == [2]


def test_a_frame_comes_by_http_and_its_verdict_goes_back(
    served: tuple[Station, httpx.Client], tmp_path: Path
) -> None:
    station, client = served
    rgb, xyz = write_frame(tmp_path / "own", "007", make_frame(7))
    other, _ = write_frame(tmp_path / "other", "007", make_frame(8))

    def post(image: Path = rgb, cloud: Path = xyz, camera: str = "left", **form: str) -> httpx.Response:
        files = {"rgb": (image.name, image.read_bytes()), "xyz": (cloud.name, cloud.read_bytes())}
        return client.post(f"/api/cameras/{camera}/frames", files=files, data=form, headers=BEARER)

    answer = post()
    assert answer.status_code == 200
    told = answer.json()
    assert (told["part"], told["verdict"], told["camera"]) == ("007", "defect", "left")
    assert post().json() == told  # sent again: the same part
    assert post(other, name="008").json()["part"] == "008"
    assert post(camera="up").status_code == 404
    assert "is no name of a frame" in post(name="../x").json()["detail"]
    assert "xyz ends in '.png', expected one of" in post(cloud=rgb).json()["detail"]
    files = {"rgb": ("a.png", b"x"), "xyz": ("a.tiff", b"x")}
    assert client.post("/api/cameras/left/frames", files=files).status_code == 401
    assert [p.name for p in station.ledger.parts("id > 3")] == ["007", "008"]


def test_who_calls_it_by_another_name_is_refused(served: tuple[Station, httpx.Client]) -> None:
    _, client = served
    answer = client.get("/", headers={"Host": "evil.example"})
    assert answer.status_code == 421
    assert "is not called evil.example; name it in `hosts`" in answer.text


def test_a_fault_is_on_every_page(served: tuple[Station, httpx.Client]) -> None:
    station, client = served
    station.faults.set("sink plant", "it is down")
    told = client.get("/api/status").json()
    assert told["faults"]["sink plant"]["why"] == "it is down"
    assert told["last"] == 3


def test_filters_are_sql_and_pages_go_on(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with Ledger(tmp_path / "l", create=True) as ledger:
        setup = ledger.setup_id({"limits": {"reject": 0.5, "review": None}})
        for number in range(120):
            paths = (Path("a.png"), Path("a.tiff"))
            camera = "left" if number % 3 else "right"
            part = ledger.take(
                camera=camera, name=str(number), sources=paths, hashes=(f"{number:064}", ""), size=1
            )
            score = float(rng.random())
            verdict: Any = "defect" if score > 0.5 else "good"
            found = [{"area_mm2": 100 * score}] if score > 0.5 else []
            ledger.judged(part.id, setup=setup, score=score, verdict=verdict, defects=found, inspect_ms=1.0)
        everything = ledger.parts()
        filters = parts_query.Filters.read(
            {"camera": "left", "verdict": "defect", "least": "0.6", "mm2": "70", "x": "y"}
        )
        want = [p.id for p in everything if p.camera == "left" and (p.score or 0) >= 0.7][::-1]
        got, more = parts_query.listed(ledger, filters)
        assert [p.id for p in got] == want
        assert not more
        first, more = parts_query.listed(ledger, parts_query.Filters())
        assert [p.id for p in first] == list(range(120, 70, -1))
        assert more
        again = parts_query.Filters.read(
            dict(httpx.QueryParams(parts_query.Filters().query(before=first[-1].id)))
        )
        assert [p.id for p in parts_query.listed(ledger, again)[0]] == list(range(70, 20, -1))
        assert parts_query.beside(ledger, filters, want[1]) == {"newer": want[0], "older": want[2]}
        assert parts_query.beside(ledger, filters, want[-1])["older"] is None
    for query, told in (
        ({"least": "much"}, "least is 'much', expected a number"),
        ({"verdict": "fine"}, "verdict is 'fine'"),
    ):
        with pytest.raises(ValueError, match=told):
            parts_query.Filters.read(query)


def test_a_histogram_counts_every_score_and_shows_both_limits() -> None:
    scores = np.random.default_rng(0).normal(1, 0.2, 500).tolist()
    limits = Limits(1.5, 1.2)
    bars = histogram.bars(scores, limits)
    assert sum(int(str(bar["count"])) for bar in bars) == 500
    assert max(float(str(bar["height"])) for bar in bars) == histogram.HEIGHT
    order = [bar["verdict"] for bar in bars]
    assert order == sorted(order, key=["good", "review", "defect"].index)
    assert 0 < histogram.place(1.2, scores, limits) < histogram.place(1.5, scores, limits) <= histogram.WIDTH
    assert len(histogram.bars([1.0], Limits(1.0))) == histogram.BARS


def test_a_page_beyond_this_machine_needs_tls_or_a_proxy(
    settings: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(
        ArtifactError, match=r"line 23: `host` 0\.0\.0\.0 can be reached from other machines: give `cert`"
    ):
        read_config(settings(more='[page]\nhost = "0.0.0.0"\n'))
    proxy = read_config(
        settings(more='[page]\nhost = "0.0.0.0"\nbehind_proxy = true\nhosts = ["line3.plant"]\n')
    )
    assert proxy.page is not None
    assert proxy.page.names() >= {"line3.plant", "localhost"}
    (tmp_path / "token").write_text("abc")
    short = read_config(settings(more=PAGE))
    with pytest.raises(ArtifactError, match="holds 3 bytes, a secret needs 16"):
        Station(short, print)


def test_no_page_waits_for_an_acknowledgement(served: tuple[Station, httpx.Client]) -> None:
    """Linux hands the option on to every connection; without it each answer took 40 ms (delayed acknowledgement)."""
    station, _ = served
    assert station.web is not None
    assert station.web.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
