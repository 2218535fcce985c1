"""A station's configuration: one TOML file, every value checked, every error with its line."""

import importlib
import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from m3ad.contract import Layout
from m3ad.errors import ArtifactError
from m3ad.limits import Limits
from m3ad_runtime.engine_choice import Runtime
from msgspec import Meta, Struct

from m3ad_client.address import is_loopback
from m3ad_client.station.needs import needed
from m3ad_client.station.sink_tables import AtLeastOne, Name, Positive, Sink

Table = TypeVar("Table")

HEADER = re.compile(r"\s*(\[\[?)\s*([A-Za-z0-9_.-]+)\s*\]")
KEY = re.compile(r"\s*\"?([A-Za-z0-9_-]+)\"?\s*=")


class Store(Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """`[station]`: where ledger, frames, overlays and maps are kept, and for how long.

    Attributes:
        keep_days: after which frames, overlays and maps are removed; verdicts stay.
        keep_gib: how much room they may take; the oldest go first, those that somebody reviewed last.
    """

    folder: Path
    name: str = "station"
    keep_days: Positive = 30.0
    keep_gib: Positive = 50.0


class Camera(Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """`[[camera]]`: a folder that fills up, and what judges its frames.

    Attributes:
        folder: `rgb/` and `xyz/` (or `depth/`) in it, or images and clouds side by side.
        settle_s: a file whose size and time stayed the same for so long is whole.
        done_marker: a frame is whole when NAME.done lies beside its image or in `folder`; no time is waited.
        runtime: what runs a bundle: `auto`, engines where the bundle has some that run here, or else the CPU.
        require_signature: the public key (Ed25519, PEM) that must have signed the bundle.
        tls, ca, cert, key: with a url, for a server that speaks TLS.
        reference: with a url, the bundle that is served there, which says how calibration frames look.
    """

    name: Name
    folder: Path
    settle_s: Annotated[float, Meta(ge=0.02, le=3600)] = 0.5
    done_marker: bool = False
    bundle: Path | None = None
    url: str | None = None
    model: str | None = None
    layout: Layout | None = None
    threads: AtLeastOne | None = None
    runtime: Runtime | None = None
    require_signature: Path | None = None
    tls: bool = False
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    threshold: float | None = None
    review: float | None = None
    reference: Path | None = None

    def __post_init__(self) -> None:
        if (self.bundle is None) == (self.url is None):
            raise ValueError("expected `bundle`, a folder, or `url`, HOST:PORT of a Triton, and not both")
        for only, other in (
            *((name, "url") for name in ("layout", "threads", "runtime", "require_signature")),
            *((name, "bundle") for name in ("model", "reference", "tls", "ca", "cert", "key")),
        ):
            if getattr(self, only) not in (None, False) and getattr(self, other) is not None:
                raise ValueError(f"`{only}` goes with {'a bundle' if other == 'url' else 'a url'} alone")
        for name in ("ca", "cert", "key"):
            if getattr(self, name) is not None and not self.tls:
                raise ValueError(f"`{name}` goes with `tls = true`")
        if (self.cert is None) != (self.key is None):
            raise ValueError("`cert` and `key` go together")
        if self.threshold is not None:
            Limits(self.threshold, self.review)


class Page(Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """`[page]`: where the page and the interface for programs are.

    Attributes:
        host: the address to listen at; this machine alone unless it is another.
        token_file: what reviewing and sending frames needs; neither is possible without.
        cert, key: for TLS.
        behind_proxy: a reverse proxy before it speaks TLS.
        hosts: names by which browsers may call it besides `host`.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8480
    token_file: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    behind_proxy: bool = False
    hosts: list[str] = []

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ValueError("`cert` and `key` go together")
        if not (is_loopback(f"{self.host}:1") or self.cert or self.behind_proxy):
            raise ValueError(
                f"`host` {self.host} can be reached from other machines: give `cert` and `key`, or say "
                "`behind_proxy = true` where a reverse proxy speaks TLS"
            )

    def names(self) -> set[str]:
        """What a browser may call it."""
        return {self.host, *self.hosts, "localhost", "127.0.0.1", "::1"}


class Config(Struct, kw_only=True, frozen=True):
    """A whole configuration; relative paths are from the file's folder."""

    store: Store
    cameras: list[Camera]
    sinks: list[Sink]
    page: Page | None = None


def read_config(path: Path) -> Config:
    """Read a station's configuration.

    Raises:
        ArtifactError: it cannot be read, is no TOML, or a value is missing, unknown, of another type or out of range:
            every table's first mistake with its line.
        MissingDependencyError: Python is 3.10 and tomli is not installed.
    """
    try:
        tomllib: Any = importlib.import_module("tomllib")  # Python 3.11
    except ImportError:
        tomllib = needed("tomli")
    try:
        text = path.read_text(encoding="utf-8")
        document = tomllib.loads(text)
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be read ({error.strerror}); name a station's TOML file"
        ) from error
    except ValueError as error:
        raise ArtifactError(f"{path} is not valid TOML: {error}") from error
    reader = _Reader(path, _lines(text))
    reader.unknown(document, ("station", "page", "camera", "sink"))
    store = reader.table(document, "station", Store)
    page = reader.table(document, "page", Page) if "page" in document else None
    cameras = reader.tables(document, "camera", Camera)
    sinks = reader.tables(document, "sink", Sink)
    if not document.get("camera"):
        reader.wrong.append((1, "there is no [[camera]]; a station needs at least one"))
    for kind, named in (("camera", cameras), ("sink", sinks)):
        names = [entry.name for entry in named]
        reader.twice(kind, names)
    folders = [str(camera.folder) for camera in cameras]
    reader.twice("camera", folders, "folder")
    if reader.wrong:
        told = "; ".join(f"line {line}: {why}" for line, why in sorted(reader.wrong))
        raise ArtifactError(f"{path}, {told}")
    assert store is not None
    return Config(store=store, cameras=cameras, sinks=sinks, page=page)


class _Reader:
    """Tables of a document as values, with what is wrong in `wrong`."""

    def __init__(self, path: Path, lines: dict[str, int]) -> None:
        self.folder, self.lines = path.parent.absolute(), lines
        self.wrong: list[tuple[int, str]] = []

    def unknown(self, document: dict[str, Any], known: tuple[str, ...]) -> None:
        for name in document.keys() - {*known}:
            told = f"`{name}` is unknown; expected [station], [page], [[camera]] and [[sink]]"
            self.wrong.append((self._line(name, f"{name}[0]"), told))

    def table(self, document: dict[str, Any], place: str, kind: type[Table]) -> Table | None:
        if place not in document:
            self.wrong.append((1, f"there is no [{place}]"))
            return None
        return self._typed(document[place], kind, place)

    def tables(self, document: dict[str, Any], place: str, kind: Any) -> list[Any]:
        entries = document.get(place, [])
        if not isinstance(entries, list):
            self.wrong.append(
                (self._line(place), f"write [[{place}]], in double brackets: there may be several")
            )
            return []
        read = [self._typed(entry, kind, f"{place}[{i}]") for i, entry in enumerate(entries)]
        return [entry for entry in read if entry is not None]

    def twice(self, kind: str, values: list[str], key: str = "name") -> None:
        for i, value in enumerate(values):
            if value in values[:i]:
                self.wrong.append(
                    (self._line(f"{kind}[{i}].{key}"), f"another {kind} has the {key} {value!r}")
                )

    def _typed(self, values: Any, kind: type[Table], place: str) -> Table | None:
        try:
            return msgspec.convert(values, kind, dec_hook=self._path)
        except msgspec.ValidationError as error:
            why, _, at = str(error).partition(" - at `$")
            field = re.search(r"`(\w+)`", why)
            inside = f"{place}{at.rstrip('`')}"
            line = self._line(f"{inside}.{field[1]}" if field else inside, inside, place)
            self.wrong.append((line, f"{why}{f' in `{at[1:-1]}`' if at.startswith('.') else ''}"))
            return None

    def _path(self, kind: type, value: Any) -> Any:
        if kind is not Path or not isinstance(value, str) or not value:
            raise ValueError(f"expected a path, got {value!r}")
        return self.folder / Path(value).expanduser()

    def _line(self, *places: str) -> int:
        """Of the first of these places that the file has."""
        return next((self.lines[place] for place in places if place in self.lines), 1)


def _lines(text: str) -> dict[str, int]:
    """Where each table and key stands: `camera[1].folder` -> its line."""
    found: dict[str, int] = {}
    counts: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := HEADER.match(line):
            table = header[2]
            if header[1] == "[[":
                counts[table] = counts.get(table, -1) + 1
                table = f"{table}[{counts[table]}]"
            found.setdefault(table, number)
        elif key := KEY.match(line):
            found.setdefault(f"{table}.{key[1]}" if table else key[1], number)
    return found
