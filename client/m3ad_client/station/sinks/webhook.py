"""Verdicts by HTTP POST, signed: who has the secret can tell that they are a station's, and when they were sent.

The signature is HMAC-SHA256 (RFC 2104) of `TIMESTAMP.BODY`, so that neither can be taken for another.
"""

import hashlib
import hmac
import json
import ssl
import time
from collections.abc import Callable
from typing import Any

from m3ad.errors import ArtifactError

from m3ad_client.station import sink_tables
from m3ad_client.station.needs import needed
from m3ad_client.station.sinks.answers import NotNow, Refused

TIMESTAMP, SIGNATURE, KEY = "X-M3ad-Timestamp", "X-M3ad-Signature", "Idempotency-Key"
LATER = (408, 425, 429)  # of the answers 4xx, those that ask for another try
LEAST_SECRET = 16  # bytes


def signature(secret: bytes, timestamp: str, body: bytes) -> str:
    """sha256=HMAC(secret, timestamp . body) in hexadecimal."""
    return "sha256=" + hmac.new(secret, timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()


class Webhook:
    """A server that is sent a POST a verdict.

    Args:
        settings: its table of the configuration.
        station: the station's name, for the idempotency key.
        clock: seconds since 1970.

    Raises:
        ArtifactError: the secret or the authority's certificate cannot be read, or the secret is too short.
        MissingDependencyError: httpx is not installed.
    """

    def __init__(
        self, settings: sink_tables.Webhook, station: str, clock: Callable[[], float] = time.time
    ) -> None:
        self.settings, self.station, self.clock = settings, station, clock
        self.secret = read_secret(settings.secret_file)
        self.httpx = needed("httpx")
        try:
            context = ssl.create_default_context(cafile=settings.ca)
        except (OSError, ssl.SSLError) as error:
            raise ArtifactError(f"sink {settings.name}: {settings.ca} is no certificate ({error})") from error
        self.client = self.httpx.Client(timeout=settings.timeout_s, verify=context)
        self._answers = (0, 0)  # the verdict that was answered with an error, and how often

    def send(self, event: dict[str, Any]) -> None:
        """Post one verdict.

        Raises:
            NotNow: nobody answers, or the server is in trouble.
            Refused: the server will not have it, or was in trouble with it `attempts` times.
        """
        body = json.dumps(event, allow_nan=False).encode()
        timestamp = str(int(self.clock()))
        headers = {
            "Content-Type": "application/json",
            TIMESTAMP: timestamp,
            SIGNATURE: signature(self.secret, timestamp, body),
            KEY: f"{self.station}/{event['id']}",
        }
        url = self.settings.url
        try:
            response = self.client.post(url, content=body, headers=headers)
        except self.httpx.HTTPError as error:
            raise NotNow(f"{url} does not answer ({error or type(error).__name__})") from error
        status = response.status_code
        if 200 <= status < 300:
            return
        if status < 500 and status not in LATER:
            raise Refused(f"{url} answered {status}")
        last, count = self._answers
        self._answers = (event["id"], count + 1 if last == event["id"] else 1)
        if self._answers[1] >= self.settings.attempts:
            raise Refused(f"{url} answered {status} to the last of {self.settings.attempts} attempts")
        raise NotNow(f"{url} answered {status}")

    def close(self) -> None:
        """Close the connection."""
        self.client.close()


def read_secret(path: Any) -> bytes:
    """A secret out of its file, without white space around it.

    Raises:
        ArtifactError: it cannot be read, or has fewer than 16 bytes.
    """
    try:
        secret = bytes(path.read_bytes()).strip()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror}); write a secret into it") from error
    if len(secret) < LEAST_SECRET:
        raise ArtifactError(
            f"{path} holds {len(secret)} bytes, a secret needs {LEAST_SECRET}: openssl rand -hex 32 >{path}"
        )
    return secret
