"""How a frame lies on the grid of the map, and back: padded to a square for clouds of points, stretched for images."""

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from m3ad.contract import GRID_SIZE, IMAGE_SIZE, PADDED, Geometry

EIGHT = np.ones((3, 3), np.bool_)  # a pixel's neighbours


def grid_source(height: int, width: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Source row and column [224] of each grid row and column; outside the frame where the square is padding."""
    side = max(height, width)
    source = np.arange(IMAGE_SIZE) * side // IMAGE_SIZE
    return source - (side - height) // 2, source - (side - width) // 2


def squared(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """An image [H, W, ...] edge-replicated to a square of its longer side."""
    height, width = image.shape[:2]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    pad = ((top, side - height - top), (left, side - width - left), (0, 0))[: image.ndim]
    return np.pad(image, pad, mode="edge") if height != width else image


def prepare_mask(mask: npt.NDArray[np.bool_], geometry: Geometry = "points") -> npt.NDArray[np.bool_]:
    """Bring a mask [H, W] onto the map's grid.

    224 x 224: edge-replicated to a square, nearest centre (CFM). A region that falls between the grid's centres keeps
    the pixel that its own middle lies in.   (ours)
    256 x 256: stretched, bilinear, more than half (CRD).
    """
    if geometry not in PADDED:
        levels = Image.fromarray(mask.astype(np.uint8) * 255)
        size = GRID_SIZE[geometry]
        return np.array(levels.resize((size, size), Image.Resampling.BILINEAR)) > 127
    square = squared(mask.astype(np.uint8)) > 0
    labels, count = ndimage.label(square, EIGHT)
    resized = Image.fromarray(labels.astype(np.int32)).resize(
        (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.NEAREST
    )
    grid = np.array(resized)
    corner = (len(square) - np.array(mask.shape)) // 2
    missing = sorted({*range(1, count + 1)} - {*np.unique(grid).tolist()})
    boxes = ndimage.find_objects(labels)
    for region in missing:
        pixels = np.argwhere(labels[boxes[region - 1]] == region) + [s.start for s in boxes[region - 1]]
        pixels = pixels[
            ((pixels >= corner) & (pixels < corner + mask.shape)).all(axis=1)
        ]  # not in the padding
        middle = pixels[np.square(pixels - pixels.mean(axis=0)).sum(axis=1).argmin()]
        grid[tuple(middle * IMAGE_SIZE // len(square))] = region
    return grid > 0


def to_frame(
    grid: npt.NDArray[np.float32], height: int, width: int, geometry: Geometry = "points"
) -> npt.NDArray[np.float32]:
    """Bring a map back to the frame's pixels, [H, W]: bilinear, padding cut off or the stretch undone."""
    if geometry not in PADDED:
        return np.array(
            Image.fromarray(grid.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
        )
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    square = Image.fromarray(grid.astype(np.float32)).resize((side, side), Image.Resampling.BILINEAR)
    return np.array(square)[top : top + height, left : left + width]
