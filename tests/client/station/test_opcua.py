"""OPC UA against asyncua's own server: what is written, in which order, after which failures, signed and encrypted."""

import asyncio
import datetime
import ipaddress
import math
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from asyncua import Server, ua
from asyncua.common.callback import CallbackType
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from m3ad.errors import ArtifactError
from m3ad.ledger import Ledger
from m3ad_client.station import deliver, sink_tables
from m3ad_client.station.faults import Faults
from m3ad_client.station.sinks.answers import NotNow
from m3ad_client.station.sinks.opcua import OpcUa

Types = dict[str, ua.VariantType]
V = ua.VariantType
USUAL: Types = {"part": V.String, "verdict": V.String, "score": V.Double, "state": V.String, "id": V.Int64}
START = {V.String: "", V.Double: 0.0, V.Float: 0.0, V.Boolean: False}


class Plant:
    """A server with the variables of two cameras; `writes` are the values of each request in order."""

    def __init__(self, port: int, types: Types = USUAL, keys: Path | None = None) -> None:
        self.port, self.types, self.keys = port, types, keys
        self.writes: list[dict[str, Any]] = []
        self.after = 0.0  # seconds that a write takes
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.call(self._start())

    def call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    async def _start(self) -> None:
        self.server = Server()
        await self.server.init()
        self.server.set_endpoint(f"opc.tcp://127.0.0.1:{self.port}")
        if self.keys:
            self.server.set_security_policy([ua.SecurityPolicyType.Basic256Sha256_SignAndEncrypt])
            await self.server.load_certificate(str(self.keys / "server.der"))
            await self.server.load_private_key(str(self.keys / "server.pem"))
        else:
            self.server.set_security_policy([ua.SecurityPolicyType.NoSecurity])
        assert await self.server.register_namespace("urn:plant") == 2
        for camera in ("left", "right"):
            for field, kind in self.types.items():
                name = f"m3ad/{camera}/{field}"
                start = ua.Variant(START.get(kind, 0), kind)
                node = await self.server.nodes.objects.add_variable(ua.NodeId(name, 2), name, start)
                await node.set_writable()
        self.server.subscribe_server_callback(CallbackType.PostWrite, self._written)
        await self.server.start()

    async def _written(self, event: Any, _: Any) -> None:
        if event.is_external:
            nodes = event.request_params.NodesToWrite
            self.writes.append({each.NodeId.Identifier: each.Value.Value.Value for each in nodes})
            await asyncio.sleep(self.after)

    def value(self, name: str) -> Any:
        return self.call(self.server.get_node(ua.NodeId(f"m3ad/{name}", 2)).read_value())

    def ids(self) -> list[int]:
        return [next(iter(write.values())) for write in self.writes if len(write) == 1]

    def close(self) -> None:
        self.call(self.server.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@pytest.fixture
def plant(port: int) -> Iterator[Plant]:
    running = Plant(port)
    yield running
    running.close()


@pytest.fixture
def sink(port: int) -> Iterator[Callable[..., OpcUa]]:
    opened: list[OpcUa] = []

    def connect(**more: Any) -> OpcUa:
        settings = {"name": "plc", "url": f"opc.tcp://127.0.0.1:{port}", "timeout_s": 5.0, **more}
        opened.append(OpcUa(sink_tables.OpcUa(**settings), "station"))
        return opened[-1]

    yield connect
    for each in opened:
        each.close()


def told(
    number: int, camera: str = "left", verdict: str | None = "defect", score: float | None = 0.75
) -> dict[str, Any]:
    found = {"verdict": verdict, "score": score, "fault": None if verdict else "broken"}
    return {"id": number, "camera": camera, "part": f"p{number}", **found}


def test_a_camera_has_its_verdict_and_the_id_comes_last(plant: Plant, sink: Callable[..., OpcUa]) -> None:
    opened = sink()
    opened.send(told(7))
    opened.send(told(2**40, "right", None, None))
    assert {field: plant.value(f"left/{field}") for field in USUAL} == {
        "part": "p7",
        "verdict": "defect",
        "score": 0.75,
        "state": "judged",
        "id": 7,
    }
    assert plant.value("right/verdict") == plant.value("right/state") == "fault"
    assert math.isnan(plant.value("right/score"))
    assert plant.value("right/id") == 2**40
    assert [[*write] for write in plant.writes[:2]] == [
        ["m3ad/left/part", "m3ad/left/verdict", "m3ad/left/score", "m3ad/left/state"],
        ["m3ad/left/id"],
    ]


def test_a_queue_survives_a_server_that_goes_and_comes(
    port: int, sink: Callable[..., OpcUa], tmp_path: Path
) -> None:
    with Ledger(tmp_path / "l", create=True) as ledger:
        for name in "abcd":
            paths = (Path(f"{name}.png"), Path(f"{name}.tiff"))
            part = ledger.take(camera="left", name=name, sources=paths, hashes=(name * 64, name * 64), size=1)
            ledger.failed(part.id, "broken", ["plc"])
        queue = deliver.Deliverer(
            "plc", sink(timeout_s=1.0), ledger, Faults(lambda _: None), threading.Event()
        )
        assert queue.attempt() > 0  # nobody is there
        assert "verdicts wait and are sent again" in queue.faults.now()["sink plc"][0]
        first = Plant(port)
        for _ in range(2):
            assert queue.attempt() == 0
        first.close()
        assert queue.attempt() > 0
        assert ledger.queues() == {"plc": (2, 0)}
        second = Plant(port)
        for _ in range(6):
            queue.attempt()
        assert queue.faults.now() == {}
        assert ledger.queues() == {}
        assert first.ids() == [1, 2]
        assert second.ids() == [3, 4]
        second.close()


def test_an_answer_that_is_lost_is_told_again(plant: Plant, sink: Callable[..., OpcUa]) -> None:
    opened = sink(timeout_s=0.3)
    opened.send(told(1))
    plant.after = 3.0
    with pytest.raises(NotNow, match=r"opc\.tcp://127"):
        opened.send(told(2))
    plant.after = 0.0
    opened.send(told(2))
    assert plant.value("left/id") == 2
    assert plant.ids()[-1] == 2


def test_values_take_the_types_of_their_variables(port: int, sink: Callable[..., OpcUa]) -> None:
    types = {"part": V.String, "verdict": V.Int16, "score": V.Float, "state": V.UInt16, "id": V.UInt32}
    plant = Plant(port, types)
    try:
        opened = sink()
        for verdict, code in (("good", 0), ("review", 1), ("defect", 2), (None, 3)):
            opened.send(told(5 + code, verdict=verdict))
            assert plant.value("left/verdict") == code
            assert plant.value("left/state") == (0 if verdict else 1)
            assert plant.value("left/id") == 5 + code
        assert plant.value("left/score") == 0.75
    finally:
        plant.close()


@pytest.mark.parametrize(
    ("types", "why"),
    [
        ({**USUAL, "score": V.Boolean}, "variable `score` is Boolean, which cannot hold 0.75"),
        ({**USUAL, "part": V.Int32}, "variable `part` is Int32, which cannot hold 'p1'"),
        ({"part": V.String}, "there is no variable ns=2;s=m3ad/left/verdict"),
    ],
)
def test_a_variable_that_does_not_fit_is_named_and_verdicts_wait(
    types: Types, why: str, port: int, sink: Callable[..., OpcUa]
) -> None:
    plant = Plant(port, types)
    try:
        with pytest.raises(NotNow) as error:
            sink().send(told(1))
        assert why in str(error.value)
        assert plant.writes == []
    finally:
        plant.close()


def write_keys(folder: Path, name: str, uri: str) -> None:
    key = rsa.generate_private_key(65537, 2048)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime(2020, 1, 1)
    names = [x509.UniformResourceIdentifier(uri), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    usage = [x509.ExtendedKeyUsageOID.SERVER_AUTH, x509.ExtendedKeyUsageOID.CLIENT_AUTH]
    cert = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number(), now)
        .not_valid_after(datetime.datetime(2100, 1, 1))
        .add_extension(x509.SubjectAlternativeName(names), False)
        .add_extension(x509.ExtendedKeyUsage(usage), False)
        .sign(key, hashes.SHA256())
    )
    (folder / f"{name}.der").write_bytes(cert.public_bytes(serialization.Encoding.DER))
    (folder / f"{name}.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )


def test_signed_and_encrypted_to_the_server_that_is_meant(
    port: int, sink: Callable[..., OpcUa], tmp_path: Path
) -> None:
    for name, uri in (("server", "urn:plant"), ("own", "urn:m3ad:station"), ("other", "urn:other")):
        write_keys(tmp_path, name, uri)
    keys = {"cert": tmp_path / "own.der", "key": tmp_path / "own.pem"}
    plant = Plant(port, keys=tmp_path)
    try:
        sink(**keys, server_cert=tmp_path / "server.der").send(told(1))
        assert plant.value("left/verdict") == "defect"
        with pytest.raises(NotNow):
            sink(**keys, server_cert=tmp_path / "other.der", timeout_s=1.0).send(told(2))
        with pytest.raises(NotNow):  # not in the clear
            sink(timeout_s=1.0).send(told(2))
        assert plant.ids() == [1]
    finally:
        plant.close()


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"password_file": Path("p")}, "`password_file` goes with `username`"),
        ({"cert": Path("c"), "key": Path("k")}, "`cert`, `key` and `server_cert` go together"),
        ({"node": "ns=2;s=verdict"}, "`node` must have {camera} and {field} in it"),
    ],
)
def test_settings_that_do_not_go_together(more: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        sink_tables.OpcUa(name="plc", url="opc.tcp://a:4840", **more)


def test_a_password_that_cannot_be_read(tmp_path: Path) -> None:
    settings = sink_tables.OpcUa(
        name="plc", url="opc.tcp://a", username="m3ad", password_file=tmp_path / "absent"
    )
    with pytest.raises(ArtifactError, match="cannot be read"):
        OpcUa(settings, "station")
