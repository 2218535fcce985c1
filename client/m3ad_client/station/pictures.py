"""Pictures of a kept part for the page: image, height, heat of a map, and the cloud with the map's colours."""

from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
from m3ad.camera import Camera
from m3ad.contract import Geometry
from m3ad.errors import FrameError
from m3ad.frames import Frame, read_frame
from m3ad.grid import to_frame
from m3ad.holes import measured
from m3ad.ledger import Part
from m3ad.overlay import coloured
from PIL import Image

SIDE_PX = 640  # the longer side of a picture on the page
MOST_POINTS = 60_000  # of the cloud on the page
USUAL = (2, 98)  # percentiles of heights between which the grey runs

Map = npt.NDArray[np.float32]


class Kept:
    """A part's files, read anew: a picture is asked for rarely, and not kept a second time.

    Args:
        folder: the station's.
        part: whose files are still there.
        camera: of depth images.
        geometry: how the map's grid lies on the frame.
        high: the limit, where the colours end.

    Raises:
        FrameError: the files are gone or cannot be read.
    """

    def __init__(
        self, folder: Path, part: Part, camera: Camera | None, geometry: Geometry, high: float | None
    ) -> None:
        self.frame: Frame = read_frame(folder / part.rgb, folder / part.xyz, part.name, camera)
        self.geometry, self.high = geometry, high
        self.maps: dict[str, Map] = {}
        if part.maps:
            with np.load(folder / part.maps) as saved:
                self.maps["anomaly"] = saved["anomaly_map"]
                if "names" in saved:
                    self.maps |= {
                        str(name): values.astype(np.float32)
                        for name, values in zip(saved["names"], saved["score_maps"], strict=True)
                    }

    def rgb(self) -> bytes:
        """The image."""
        return _png(self.frame.rgb)

    def height(self) -> bytes:
        """The distance from the sensor in grey, near ones bright, holes blue."""
        z, seen = self.frame.xyz[..., 2], measured(self.frame.xyz)
        if not seen.any():
            return _png(np.zeros((*z.shape, 3), np.uint8))
        far, near = np.percentile(z[seen], USUAL[::-1])
        grey = np.clip((far - np.where(seen, z, far)) / max(far - near, 1e-9), 0, 1) * 255
        pixels = np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)
        pixels[~seen] = (30, 41, 99)
        return _png(pixels)

    def heat(self, name: str) -> bytes:
        """A map in colours, transparent where it is low, on the frame's pixels.

        Raises:
            FrameError: there is no such map.
        """
        values, low, high = self._on_frame(name)
        alpha = np.clip((values - low) / (high - low) * 1.5, 0, 1) * 255
        return _png(np.dstack([coloured(values, low, high), alpha.astype(np.uint8)]))

    def cloud(self) -> bytes:
        """N uint32, then [N, 3] float32 metres around their middle, [N, 3] uint8 image colours, [N, 3] of the map."""
        seen = measured(self.frame.xyz)
        step = max(1, int(np.ceil(np.sqrt(seen.sum() / MOST_POINTS))))
        thin = np.zeros_like(seen)
        thin[::step, ::step] = seen[::step, ::step]
        points = self.frame.xyz[thin]
        if len(points):
            points = (points - np.median(points, axis=0)).astype(np.float32)
        heat = coloured(*self._on_frame("anomaly"))[thin] if self.maps else self.frame.rgb[thin]
        parts = (np.array([len(points)], "<u4"), points.astype("<f4"), self.frame.rgb[thin], heat)
        return b"".join(np.ascontiguousarray(values).tobytes() for values in parts)

    def _on_frame(self, name: str) -> tuple[Map, float, float]:
        if name not in self.maps:
            raise FrameError(f"there is no map {name!r}; expected one of {', '.join(self.maps) or 'none'}")
        height, width = self.frame.rgb.shape[:2]
        values = to_frame(self.maps[name], height, width, self.geometry)
        low, high = float(np.median(values)), float(values.max())
        if name == "anomaly" and self.high is not None:
            high = max(high, self.high)  # a good part is not painted as if it were none
        return values, low, max(high, low + 1e-9)


def _png(pixels: npt.NDArray[np.uint8]) -> bytes:
    picture, content = Image.fromarray(pixels), BytesIO()
    picture.thumbnail((SIDE_PX, SIDE_PX))
    picture.save(content, "PNG")
    return content.getvalue()
