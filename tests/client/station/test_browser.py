"""The page in a real Chromium over its debugging pipe: reviewing by keyboard, the slider, the turnable cloud."""

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from m3ad_client.station.config import read_config
from m3ad_client.station.station import Station
from stations import PAGE, TOKEN

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt-get install chromium"),
]


class Browser:
    """One tab of a headless Chromium; commands are of the Chrome DevTools Protocol."""

    def __init__(self, folder: Path) -> None:
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        # The browser reads its descriptor 3 and writes to 4.
        command = [
            *("bash", "-c", f'exec "$@" 3<&{to_browser} 4>&{from_browser}', "bash", str(CHROMIUM)),
            *("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"),
            *(
                "--disable-background-networking",
                "--no-proxy-server",
                f"--user-data-dir={folder}",
                "about:blank",
            ),
        ]
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(
            command, pass_fds=(to_browser, from_browser), stdout=quiet, stderr=quiet
        )
        os.close(to_browser)
        os.close(from_browser)
        self._left, self._number = b"", 0
        self._session: str | None = None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.ask("Page.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._left:
                block = os.read(self._read, 1 << 20)
                assert block, "chromium ended"
                self._left += block
            text, _, self._left = self._left.partition(b"\0")
            answer = json.loads(text)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def value(self, script: str) -> Any:
        told = self.ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def until(self, script: str) -> None:
        for _ in range(300):
            if self.value(script):
                return
            time.sleep(0.05)
        raise AssertionError(
            f"{script} did not come true in 15 s; the page: {self.value('document.body.innerText')}"
        )

    def go(self, url: str) -> None:
        self.ask("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def press(self, key: str) -> None:
        code = {
            "windowsVirtualKeyCode": {"ArrowLeft": 37, "Tab": 9, "Enter": 13}.get(key, ord(key[0].upper()))
        }
        text = {"text": "\r" if key == "Enter" else key} if len(key) == 1 or key == "Enter" else {}
        self.ask("Input.dispatchKeyEvent", type="keyDown", key=key, **code, **text)
        self.ask("Input.dispatchKeyEvent", type="keyUp", key=key, **code)

    def picture(self, path: Path, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(20)
        os.close(self._write)
        os.close(self._read)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    opened = Browser(tmp_path / "browser")
    yield opened
    opened.close()


def test_parts_are_reviewed_by_keyboard_alone(
    served: tuple[Station, httpx.Client], browser: Browser, tmp_path: Path
) -> None:
    station, _ = served
    assert station.web is not None
    browser.go(f"{station.web.url}parts/2?verdict=open")
    browser.value(f"sessionStorage.setItem('token', '{TOKEN}')")

    browser.until("document.getElementById('cloud')?.dataset.drawn")
    before = browser.value("document.getElementById('cloud').dataset.drawn")
    browser.value("document.getElementById('cloud').focus()")
    browser.press("ArrowLeft")
    browser.until(f"document.getElementById('cloud').dataset.drawn !== '{before}'")
    # Points in the map's colours and in the image's, not an empty canvas.
    colours = (
        "[...document.getElementById('cloud').getContext('2d').getImageData(0, 0, 480, 480).data].join()"
    )
    in_map = browser.value(colours)
    assert len({*in_map.split(",")}) > 20
    browser.press("c")
    assert browser.value(colours) != in_map

    browser.value("{ const s = document.getElementById('slider'); s.value = 80; s.oninput(); }")
    assert browser.value("document.querySelector('.heat').style.opacity") == "0.8"
    browser.until("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    for width, height in ((1280, 900), (820, 1180)):
        browser.picture(tmp_path / f"{width}.png", width, height)
        assert browser.value("document.documentElement.scrollWidth <= window.innerWidth"), f"at {width} px"

    browser.press("d")
    browser.until("location.pathname === '/parts/1' && document.readyState === 'complete'")
    browser.press("g")
    browser.until("document.getElementById('answer').textContent === 'written; that was the last one'")
    assert [part.said for part in station.ledger.parts()] == ["good", "defect", None]
    assert [tuple(row)[2:] for row in station.ledger.query("SELECT * FROM review ORDER BY at")] == [
        ("page", "defect"),
        ("page", "good"),
    ]
    browser.go(station.web.url)
    station.faults.set("sink plant", "it is down")
    browser.until("document.getElementById('faults').textContent === 'sink plant: it is down'")


def test_ten_parts_are_reviewed_from_the_list_with_the_keyboard_alone(
    settings: Callable[..., Path], put: Callable[..., Any], browser: Browser, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text(TOKEN + "\n")
    for seed in range(10):
        put(seed, part=0.5)
    station = Station(read_config(settings(camera="threshold = 0.0", more=PAGE)), lambda _: None)
    try:
        station.once()
        with station.running():
            assert station.web is not None
            browser.go(f"{station.web.url}parts?verdict=open")
            browser.value(f"sessionStorage.setItem('token', '{TOKEN}')")
            for _ in range(30):  # through the filters to the first part
                browser.press("Tab")
                if browser.value("document.activeElement.matches('tbody a')"):
                    break
            browser.press("Enter")
            for number in range(10, 0, -1):
                ready = f"location.pathname === '/parts/{number}' && document.readyState === 'complete'"
                browser.until(f"{ready} && document.getElementById('part') !== null")
                browser.press("d" if number % 3 == 0 else "g")
            browser.until(
                "document.getElementById('answer').textContent === 'written; that was the last one'"
            )
            browser.go(f"{station.web.url}parts?verdict=open")
            assert "no part like that" in browser.value("document.body.innerText")
        said = [part.said for part in station.ledger.parts()]
    finally:
        station.close()
    assert said == ["defect" if number % 3 == 0 else "good" for number in range(1, 11)]
