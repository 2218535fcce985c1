"""What inspects a camera's frames: a bundle in this process, or a server."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from m3ad.bundle import MANIFEST, Bundle, sha256_of
from m3ad.errors import ArtifactError, ServerError
from m3ad.signature import verify_signature
from m3ad_runtime.pipeline import Inspector

from m3ad_client.infer import AnyInspector
from m3ad_client.station import config
from m3ad_client.triton import Tls, TritonInspector


class Judge:
    """What inspects for a camera, and what the ledger says of it; opened when it is first needed.

    Args:
        camera: its configuration.
        say: told why engines are not used.
    """

    def __init__(self, camera: config.Camera, say: Callable[[str], None]) -> None:
        self.camera, self.say = camera, say
        self.inspector: AnyInspector | None = None
        self.record: dict[str, Any] = {}

    @contextmanager
    def open(self) -> Iterator[AnyInspector]:
        """Yield the inspector; a server that failed is connected to anew the next time.

        Raises:
            ArtifactError: the bundle cannot be used.
            ServerError: the server does not answer.
        """
        if self.inspector is None:
            self.inspector, self.record = self._opened()
        try:
            yield self.inspector
        except ServerError:
            self.close()
            raise

    def close(self) -> None:
        """Close the connection, or give a GPU's memory back."""
        if isinstance(self.inspector, (TritonInspector, Inspector)):
            self.inspector.close()
        self.inspector = None

    def has_maps(self) -> bool:
        """Whether the inspector gives score maps: a server may have the door for frames alone."""
        return not isinstance(self.inspector, TritonInspector) or "tensors" in self.inspector.doors

    def _opened(self) -> tuple[AnyInspector, dict[str, Any]]:
        camera = self.camera
        told: dict[str, Any]
        inspector: AnyInspector
        if camera.bundle is not None:
            if camera.require_signature is not None:
                verify_signature(camera.bundle, camera.require_signature)
            bundle = Bundle.open(camera.bundle)
            bundle.verify_usable()
            inspector = Inspector(
                bundle, camera.layout, camera.threads, runtime=camera.runtime or "auto", say=self.say
            )
            told = {
                "bundle": str(camera.bundle),
                "bundle_sha256": sha256_of(bundle.path / MANIFEST),
                "threshold_card": bundle.document["threshold"],
                "runtime": f"{inspector.runtime}, {inspector.device}, {inspector.precision}",
            }
        else:
            tls = Tls(ca=camera.ca, key=camera.key, cert=camera.cert) if camera.tls else None
            inspector = TritonInspector(str(camera.url), camera.model, tls=tls)
            told = {"url": camera.url, "runtime": f"Triton, {inspector.serving}"}
        try:
            inspector.limits = inspector.limits.moved(camera.threshold, camera.review)
        except ValueError as error:
            raise ArtifactError(f"the limits of camera {camera.name} cannot be used: {error}") from error
        record = inspector.record
        same = {"category": record.category, "method": record.method, "layout": record.layout}
        same["geometry"] = inspector.preprocessing.geometry
        limits = {"reject": inspector.limits.reject, "review": inspector.limits.review}
        return inspector, {**told, **same, "weights": record.weights, "limits": limits}
