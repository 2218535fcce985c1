"""Pictures for people: the flagged region over the frame, and a sheet of frames, maps and ground truth.

Pillow and NumPy only, because the line engineer's box has no plotting library.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from m3ad.atomic import file_beside
from m3ad.contract import Geometry
from m3ad.defects import Defect
from m3ad.frames import Frame
from m3ad.grid import to_frame
from m3ad.limits import Limits, verdict

SIDE_PX = 448  # the longer side of a drawn frame
BANNER_PX = 34
BAR_PX = 92
GAP_PX = 8
ROW_PX, MOST_ROWS = 20, 6  # of the list of defects
PAPER, INK, FAINT = (255, 255, 255), (24, 24, 27), (113, 113, 122)
GOOD, DOUBT, BAD = (21, 128, 61), (161, 98, 7), (190, 18, 60)
COLOURS = {"good": ("GOOD", GOOD), "review": ("REVIEW", DOUBT), "defect": ("DEFECT", BAD)}
IGNORED, REGION = (228, 228, 231), (14, 165, 233)
# Dark blue to yellow, rising in lightness so that it also reads in grey.
HEAT = np.array([(10, 12, 60), (86, 15, 109), (187, 55, 84), (249, 142, 8), (252, 255, 164)], np.float64)

Pixels = npt.NDArray[np.uint8]
Map = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Inspected:
    """A frame with its result.

    Args:
        anomaly_map: [S, S] float32.
        mask: [H, W] bool, where the truth is known.
        kept: [H, W] bool, the bundle's regions, where it has some.
        geometry: how the map's grid lies on the frame, see `grid.to_frame`.
    """

    frame: Frame
    anomaly_map: Map
    score: float
    mask: npt.NDArray[np.bool_] | None = None
    defects: Sequence[Defect] = ()
    kept: npt.NDArray[np.bool_] | None = None
    geometry: Geometry = "points"


def overlay(inspected: Inspected, limits: Limits) -> Image.Image:
    """Draw the frame with heat and a contour where the map is above the limit, verdict, score, colour bar and defects.

    Args:
        inspected: the frame and its result.
        limits: of the map and of the score; the picture marks what lies above the lower one.
    """
    threshold = limits.lowest
    low, high = _limits([inspected], threshold)
    picture = Image.fromarray(_heat_over_frame(inspected, threshold, low, high))
    shown = inspected.defects[:MOST_ROWS]
    _boxes(picture, shown, inspected.frame.rgb.shape[:2])
    rows = [*map(defect_line, shown), *_more(len(inspected.defects))]
    height = picture.height + BANNER_PX + (len(rows) * ROW_PX + GAP_PX if rows else 0)
    sheet = Image.new("RGB", (picture.width + BAR_PX, height), PAPER)
    sheet.paste(picture, (0, BANNER_PX))
    _bar(sheet, (picture.width + 14, BANNER_PX + 14, picture.height - 28), low, high, threshold)
    verdict_said = verdict(inspected.score, limits)
    word, colour = COLOURS[verdict_said]
    limit = limits.reject if verdict_said == "defect" else threshold
    _banner(sheet, inspected, word, colour, limit)
    draw, font = ImageDraw.Draw(sheet), _font(14)
    for row, text in enumerate(rows):
        top = picture.height + BANNER_PX + GAP_PX // 2 + row * ROW_PX
        draw.text((10, top), f"{row + 1}  {text}" if row < len(shown) else text, INK, font)
    return sheet


def defect_line(defect: Defect) -> str:
    """What is known of a defect in one line, lengths in mm."""
    parts = ["no area" if defect.area_mm2 is None else f"{defect.area_mm2:.4g} mm^2"]
    if defect.height_mm is not None:
        side = "out" if defect.height_mm > 0 else "deep"
        parts.append(f"{abs(defect.height_mm):.2f} mm {side}")
    parts += [f"{name} {share:.0%}" for name, share in (defect.shares or {}).items()]
    return ", ".join(parts)


def contact_sheet(inspected: Sequence[Inspected], threshold: float) -> Image.Image:
    """Draw one row a frame: frame, map, overlay, and the ground truth where at least one frame has it.

    All maps share one colour scale.
    """
    if not inspected:
        raise ValueError("a contact sheet needs at least one frame")
    low, high = _limits(inspected, threshold)
    titles = ["frame", "anomaly map", "above threshold"] + ["ground truth"] * any(
        i.mask is not None for i in inspected
    )
    cell = SIDE_PX // 2
    label = _font(15)
    row_height = cell + 26
    width = len(titles) * (cell + GAP_PX) + GAP_PX + BAR_PX
    sheet = Image.new("RGB", (width, len(inspected) * row_height + 30), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((GAP_PX + column * (cell + GAP_PX), 6), title, FAINT, label)
    for row, item in enumerate(inspected):
        top = 30 + row * row_height
        panels = [
            item.frame.rgb,
            coloured(_on_frame(item), low, high),
            _heat_over_frame(item, threshold, low, high),
        ]
        if item.mask is not None:
            panels.append(np.repeat(item.mask[..., None], 3, axis=2).astype(np.uint8) * 255)
        for column, panel in enumerate(panels):
            picture = _fit(panel, cell)
            left = GAP_PX + column * (cell + GAP_PX) + (cell - picture.width) // 2
            sheet.paste(picture, (left, top + (cell - picture.height) // 2))
        word, colour = _verdict(item, threshold)
        text = f"{item.frame.name}: {word}, score {item.score:.4g}"
        draw.text((GAP_PX, top + cell + 3), text, colour, label)
    _bar(sheet, (width - BAR_PX + 6, 40, cell - 20), low, high, threshold)
    return sheet


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG under a temporary name and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with file_beside(path) as temporary:
        image.save(temporary, format="PNG")


def _verdict(inspected: Inspected, threshold: float) -> tuple[str, tuple[int, int, int]]:
    return COLOURS["defect" if inspected.score > threshold else "good"]


def _limits(inspected: Sequence[Inspected], threshold: float) -> tuple[float, float]:
    """The colour scale: from the lowest value to the highest, the threshold always strictly inside."""
    low = min(float(i.anomaly_map.min()) for i in inspected)
    high = max(float(i.anomaly_map.max()) for i in inspected)
    margin = 0.05 * max(high - low, abs(threshold - low), abs(high - threshold), 1e-6)
    return min(low, threshold - margin), max(high, threshold + margin)


def _on_frame(inspected: Inspected) -> Map:
    height, width = inspected.frame.rgb.shape[:2]
    return to_frame(inspected.anomaly_map, height, width, inspected.geometry)


def coloured(values: Map, low: float, high: float) -> Pixels:
    """Colours of values [...], dark at `low` and bright at `high`: [..., 3] uint8."""
    position = np.clip((values - low) / (high - low), 0, 1) * (len(HEAT) - 1)
    steps = np.arange(len(HEAT))
    return np.stack([np.interp(position, steps, HEAT[:, c]) for c in range(3)], axis=-1).astype(np.uint8)


def _heat_over_frame(inspected: Inspected, threshold: float, low: float, high: float) -> Pixels:
    rgb = np.array(_fit(inspected.frame.rgb, SIDE_PX)).astype(np.float64)
    values = np.array(Image.fromarray(_on_frame(inspected)).resize((rgb.shape[1], rgb.shape[0])))
    flagged = values > threshold
    heat = coloured(values, low, high)
    rgb[flagged] += 0.55 * (heat[flagged] - rgb[flagged])
    contour = flagged & ~ndimage.binary_erosion(flagged, iterations=2, border_value=0)
    halo = ndimage.binary_dilation(contour) & ~contour
    rgb[halo], rgb[contour] = INK, PAPER
    if inspected.kept is not None:
        size = (rgb.shape[1], rgb.shape[0])
        kept = np.array(Image.fromarray(inspected.kept).resize(size, Image.Resampling.NEAREST))
        rgb[~kept] += 0.6 * (np.array(IGNORED) - rgb[~kept])
        rgb[kept & ~ndimage.binary_erosion(kept, iterations=2, border_value=1)] = REGION
    return rgb.astype(np.uint8)


def _fit(pixels: Pixels, side: int) -> Image.Image:
    """Scale so that the longer side has `side` pixels."""
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _boxes(picture: Image.Image, defects: Sequence[Defect], size: tuple[int, ...]) -> None:
    """A numbered box around each defect; `size` is the frame's height and width."""
    draw, font = ImageDraw.Draw(picture), _font(14)
    scale = picture.width / size[1], picture.height / size[0]
    for number, defect in enumerate(defects, 1):
        left, top, right, bottom = (round(v * scale[i % 2]) for i, v in enumerate(defect.box_px))
        draw.rectangle((left - 3, top - 3, right + 2, bottom + 2), outline=PAPER)
        draw.text((left - 2, max(0, top - 19)), str(number), PAPER, font, stroke_width=2, stroke_fill=INK)


def _more(count: int) -> list[str]:
    return [f"and {count - MOST_ROWS} more"] if count > MOST_ROWS else []


def _banner(
    sheet: Image.Image, inspected: Inspected, word: str, colour: tuple[int, int, int], limit: float
) -> None:
    draw, font = ImageDraw.Draw(sheet), _font(17)
    draw.rectangle((0, 0, sheet.width, BANNER_PX - 1), colour)
    relation = ">" if inspected.score > limit else "<="
    text = f"{word}   score {inspected.score:.4g} {relation} {limit:.4g}"
    draw.text((10, 7), text, PAPER, font)
    room = sheet.width - 20 - draw.textlength(f"{text}   ", font)
    name = inspected.frame.name
    if draw.textlength(name, font) > room:
        while name and draw.textlength(f"...{name}", font) > room:
            name = name[1:]
        name = f"...{name}" if name else ""
    draw.text((sheet.width - 10 - draw.textlength(name, font), 7), name, PAPER, font)


def _bar(sheet: Image.Image, place: tuple[int, int, int], low: float, high: float, threshold: float) -> None:
    """Colour bar at (left, top) with the given height; a tick marks the threshold."""
    left, top, height = place
    ramp = np.linspace(high, low, height, dtype=np.float32)[:, None].repeat(16, axis=1)
    sheet.paste(Image.fromarray(coloured(ramp, low, high)), (left, top))
    draw, font = ImageDraw.Draw(sheet), _font(13)
    tick = top + round((high - threshold) / (high - low) * (height - 1))
    draw.line((left - 4, tick, left + 20, tick), INK, 2)
    # The ends give way when the threshold's label would cover them.
    for value, y in ((high, top), (low, top + height - 1)):
        if abs(y - tick) > 16:
            draw.text((left + 22, y - 8), f"{value:.3g}", FAINT, font)
    draw.text((left + 22, tick - 8), f"{threshold:.3g}", INK, font)
