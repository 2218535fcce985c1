"""The tables `[[sink]]` of a station's configuration, a kind each."""

import re
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct

NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z")
Name = Annotated[str, Meta(pattern=NAME.pattern)]
Positive = Annotated[float, Meta(gt=0)]
AtLeastOne = Annotated[int, Meta(ge=1)]


class JsonLines(Struct, forbid_unknown_fields=True, kw_only=True, frozen=True, tag_field="kind", tag="jsonl"):
    """`[[sink]]` with `kind = "jsonl"`: a line of JSON a part, at the end of a file."""

    name: Name
    path: Path


class Csv(Struct, forbid_unknown_fields=True, kw_only=True, frozen=True, tag_field="kind", tag="csv"):
    """`[[sink]]` with `kind = "csv"`: a row a part, at the end of a file."""

    name: Name
    path: Path


class Webhook(Struct, forbid_unknown_fields=True, kw_only=True, frozen=True, tag_field="kind", tag="webhook"):
    """`[[sink]]` with `kind = "webhook"`: a signed POST a part.

    Attributes:
        secret_file: holds what is signed with, and is read by nobody else.
        attempts: how often a server may be in trouble (5xx) with one verdict before it becomes a dead letter; a server
            that does not answer is waited for.
        ca: certificate authority to trust instead of the system's.
    """

    name: Name
    url: Annotated[str, Meta(pattern=r"^https?://[^\s/]+")]
    secret_file: Path
    timeout_s: Positive = 10.0
    attempts: AtLeastOne = 12
    ca: Path | None = None


class Mqtt(Struct, forbid_unknown_fields=True, kw_only=True, frozen=True, tag_field="kind", tag="mqtt"):
    """`[[sink]]` with `kind = "mqtt"`: a broker that is told with quality of service 1."""

    name: Name
    host: str
    port: Annotated[int, Meta(ge=1, le=65535)] = 1883
    prefix: Annotated[str, Meta(pattern=r"^[^#+\s/][^#+\s]*[^#+\s/]\Z")] = "m3ad"
    username: str | None = None
    password_file: Path | None = None
    tls: bool = False
    ca: Path | None = None
    timeout_s: Positive = 10.0

    def __post_init__(self) -> None:
        if self.password_file is not None and self.username is None:
            raise ValueError("`password_file` goes with `username`")
        if self.ca is not None and not self.tls:
            raise ValueError("`ca` goes with `tls = true`")


class OpcUa(Struct, forbid_unknown_fields=True, kw_only=True, frozen=True, tag_field="kind", tag="opcua"):
    """`[[sink]]` with `kind = "opcua"`: variables of an OPC UA server that are written a part.

    Attributes:
        node: the identifier of a variable; `{camera}` and `{field}` stand for its camera and what it holds.
        cert, key, server_cert: what signs and encrypts (Basic256Sha256), and the certificate that the server must have.
    """

    name: Name
    url: Annotated[str, Meta(pattern=r"^opc\.tcp://[^\s/]+")]
    node: str = "ns=2;s=m3ad/{camera}/{field}"
    username: str | None = None
    password_file: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    server_cert: Path | None = None
    timeout_s: Positive = 10.0

    def __post_init__(self) -> None:
        if self.password_file is not None and self.username is None:
            raise ValueError("`password_file` goes with `username`")
        if len({self.cert is None, self.key is None, self.server_cert is None}) > 1:
            raise ValueError("`cert`, `key` and `server_cert` go together")
        if self.node.count("{camera}") != 1 or self.node.count("{field}") != 1:
            raise ValueError("`node` must have {camera} and {field} in it, once each")


Sink = JsonLines | Csv | Webhook | Mqtt | OpcUa
