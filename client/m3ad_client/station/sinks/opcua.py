"""Verdicts into variables of an OPC UA server, as a PLC has one: a verdict is told when the server took every value.

A camera has the variables part, verdict, score and state, which are written by one request, and then id by another: who
waits for id to change reads values of one part. Written again after a broken connection, id is the same.
"""

import asyncio
import logging
import math
import threading
from collections.abc import Coroutine
from typing import Any

from m3ad_client.station import sink_tables
from m3ad_client.station.needs import needed
from m3ad_client.station.sinks.answers import NotNow
from m3ad_client.station.sinks.webhook import read_secret

FIELDS = ("part", "verdict", "score", "state", "id")
# Of variables that are integers, for plants whose controllers do not compare texts.
CODES = {"good": 0, "review": 1, "defect": 2, "fault": 3}
STATES = {"judged": 0, "fault": 1}
FLOATS, TEXTS = ("Float", "Double"), ("String",)


class OpcUa:
    """A server; asyncua keeps the session alive in a thread of its own.

    Raises:
        ArtifactError: the password's file cannot be read.
        MissingDependencyError: asyncua is not installed.
    """

    def __init__(self, settings: sink_tables.OpcUa, station: str) -> None:
        self.settings, self.station = settings, station
        self.asyncua = needed("asyncua", "opcua")
        self.password = read_secret(settings.password_file).decode() if settings.password_file else None
        logging.getLogger("asyncua").setLevel(logging.CRITICAL)  # what goes wrong is told as a fault, once
        self.client: Any = None
        self.nodes: dict[str, list[tuple[Any, str]]] = {}  # of a camera: its variables and their types
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def send(self, event: dict[str, Any]) -> None:
        """Write one verdict.

        Raises:
            NotNow: the server is not there, lacks a variable, or does not take a value.
        """
        try:
            self._wait_for(self._send(event))
        except Exception as error:  # asyncua has many, and none of them may end the queue
            self._drop()
            raise NotNow(f"{self.settings.url}: {error or type(error).__name__}") from error

    def close(self) -> None:
        """Close the session."""
        self._drop()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    async def _send(self, event: dict[str, Any]) -> None:
        if self.client is None:
            self.client = await self._connected()
        camera = event["camera"]
        if camera not in self.nodes:
            self.nodes[camera] = [await self._variable(camera, field) for field in FIELDS]
        values = [
            self._value(field, told, kind)
            for field, told, (_, kind) in zip(FIELDS, told_of(event), self.nodes[camera], strict=True)
        ]
        nodes = [node for node, _ in self.nodes[camera]]
        await self.client.write_values(nodes[:-1], values[:-1])
        await self.client.write_values(nodes[-1:], values[-1:])

    async def _connected(self) -> Any:
        settings = self.settings
        client = self.asyncua.Client(settings.url, timeout=settings.timeout_s)
        client.application_uri = f"urn:m3ad:{self.station}"
        if settings.username is not None:
            client.set_user(settings.username)
            client.set_password(self.password or "")
        if settings.cert is not None:
            policies = needed("asyncua.crypto.security_policies", "opcua")
            await client.set_security(
                policies.SecurityPolicyBasic256Sha256,
                str(settings.cert),
                str(settings.key),
                server_certificate=str(settings.server_cert),
            )
        await client.connect()
        return client

    async def _variable(self, camera: str, field: str) -> tuple[Any, str]:
        name = self.settings.node.replace("{camera}", camera).replace("{field}", field)
        try:
            node = self.client.get_node(name)
            return node, (await node.read_data_type_as_variant_type()).name
        except (self.asyncua.ua.UaError, ValueError) as error:
            raise NotNow(f"there is no variable {name} ({error})") from error

    def _value(self, field: str, told: Any, kind: str) -> Any:
        """A value in the type that its variable has."""
        if kind in FLOATS:
            value: Any = float(told) if not isinstance(told, str) else None
        elif kind in TEXTS:
            value = str(told)
        elif isinstance(told, str):
            value = {"verdict": CODES, "state": STATES}.get(field, {}).get(told) if "Int" in kind else None
        else:
            value = int(told) if "Int" in kind and math.isfinite(told) else None
        if value is None:
            raise NotNow(f"variable `{field}` is {kind}, which cannot hold {told!r}")
        ua = self.asyncua.ua  # without a time of ours, which some controllers refuse
        return ua.DataValue(ua.Variant(value, ua.VariantType[kind]))

    def _wait_for(self, work: Coroutine[Any, Any, None]) -> None:
        limit = 3 * self.settings.timeout_s  # connecting takes several requests
        asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, limit), self.loop).result()

    def _drop(self) -> None:
        client, self.client, self.nodes = self.client, None, {}
        if client is None:
            return
        try:
            self._wait_for(client.disconnect())
        except Exception:  # asyncua has many, and the session is given up either way
            return


def told_of(event: dict[str, Any]) -> tuple[str, str, float, str, int]:
    """The values of an event in the order of `FIELDS`; a fault has no score: NaN."""
    verdict = event["verdict"] or "fault"
    score = math.nan if event["score"] is None else float(event["score"])
    return event["part"], verdict, score, "fault" if event["fault"] else "judged", event["id"]
