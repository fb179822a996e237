"""Pictures: heat colours, the verdict on an image, charts, sheets; and report.html, the page that shows all images.
This file only draws; it decides nothing."""

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from kit.files import OwnFiles, write_atomically, write_text
from kit.images import in_eight_bits, turned
from kit.verdict import Thresholds, Verdict

WIDTH = 960  # pixels, of charts and sheets
LARGE = 900  # pixels: maximum of a photograph's longer side
GAP = 6  # pixels between panels
RED = (255, 25, 25)


def heat_colours(anomaly_map: np.ndarray, limit: float) -> np.ndarray:
    """(H, W) -> (H, W, 3) uint8: black at 0, red at `limit`, yellow at twice that, the same in all images."""
    stops = limit * np.array([0, 0.5, 1, 1.5, 2])
    colours = np.array([(0, 0, 0), (82, 18, 110), (186, 54, 84), (250, 140, 10), (252, 255, 164)])
    channels = [np.interp(anomaly_map, stops, channel) for channel in colours.T]
    return np.stack(channels, axis=-1).astype(np.uint8)


def outline(found: np.ndarray) -> np.ndarray:
    """The line around the regions of `found` (H, W) bool, half a percent of the height thick: (H, W, 1) bool."""
    line = ndimage.binary_dilation(found, iterations=math.ceil(len(found) / 200)) & ~found
    return line[..., None]


def heat_and_line(verdict: Verdict, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A verdict's anomaly map (H, W) and the outline of its regions (H, W, 1) bool, for pictures of this size (W, H),
    which may be smaller than the image."""
    anomaly_map = np.asarray(Image.fromarray(verdict.anomaly_map.astype(np.float32)).resize(size))
    found = Image.fromarray(verdict.found.astype(np.float32)).resize(size, Image.Resampling.BOX)
    return anomaly_map, outline(np.asarray(found) > 0)  # a region of few pixels stays visible


def photograph(image: Image.Image, longest: int) -> Image.Image:
    """An image for display: 8-bit RGB, rotated by its EXIF tag, with sides of at most `longest` pixels. Raises
    InputError for values outside their range."""
    shown = in_eight_bits(turned(image))  # a copy, which may shrink
    shown.thumbnail((longest, longest))
    return shown


def photo_of(image: Image.Image, roi: torch.Tensor) -> Image.Image:
    """The `photograph` of an image, for its pictures: darker outside the region of interest (H, W) bool."""
    return dimmed(photograph(image, LARGE), roi)


def dimmed(photo: Image.Image, roi: torch.Tensor) -> Image.Image:
    """A photograph, darker outside the region of interest (H, W) bool."""
    if roi.all():
        return photo
    inside = np.asarray(Image.fromarray(roi.cpu().numpy()).resize(photo.size))[..., None]
    return Image.fromarray(np.where(inside, photo, np.uint8(np.asarray(photo) // 3)))


def verdict_picture(
    photo: Image.Image, name: str, verdict: Verdict, limits: Thresholds, mask: np.ndarray | None = None
) -> Image.Image:
    """A `photograph` and its anomaly map, both with outlines of the regions; the true mask, if known; a colour bar; a
    line of text."""
    width, height = photo.size
    anomaly_map, line = heat_and_line(verdict, photo.size)
    panels = {
        "input": np.where(line, np.uint8(RED), np.asarray(photo)),
        "anomaly map": np.where(line, np.uint8(255), heat_colours(anomaly_map, limits.anomaly_map)),
    }
    if mask is not None:
        panels["true mask"] = np.asarray(Image.fromarray(mask).resize((width, height)).convert("RGB"))
    unit = max(20, width // (40 if is_wide(photo) else 16))  # of text, and of the colour bar
    if is_wide(photo):  # below each other
        places = [(0, unit + i * (height + unit)) for i in range(len(panels))]
        right, bottom = width, len(panels) * (height + unit)
    else:
        places = [(i * (width + GAP), unit) for i in range(len(panels))]
        right, bottom = len(panels) * (width + GAP) - GAP, unit + height
    font = ImageFont.load_default(0.65 * unit)
    said = "anomalous" if verdict.anomalous else "normal"
    title = f"{name}: {said}, score {verdict.score:.3f} (threshold {verdict.threshold:.3f})"
    sheet = Image.new("RGB", (max(right + GAP + 5 * unit, int(font.getlength(title)) + 6), bottom + unit), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((3, unit // 10), title, "black", font)
    for (left, top), (label, panel) in zip(places, panels.items(), strict=True):
        sheet.paste(Image.fromarray(panel), (left, top))
        draw.text((left + 3, top + height + unit // 10), label, "black", font)
    highest = 2 * limits.anomaly_map  # of the colour bar
    falling = np.linspace(highest, 0, bottom - unit)[:, None].repeat(unit, axis=1)
    sheet.paste(Image.fromarray(heat_colours(falling, limits.anomaly_map)), (right + GAP, unit))
    for share, label in ((0, f"{highest:.2f}"), (0.5, f"{limits.anomaly_map:.2f} limit"), (1, "0")):
        # Whole pixels: between them, decimal points vanish.
        place = right + GAP + round(1.2 * unit), unit + round(share * (bottom - 2 * unit))
        draw.text(place, label, "black", font)
    return sheet


def is_wide(photo: Image.Image) -> bool:
    """Whether the panels of this photograph are stacked."""
    return photo.width > 2 * photo.height


def as_bytes(panel: np.ndarray) -> np.ndarray:
    """A panel (H, W, 3) in [0, 1], or (H, W) bool, as (H, W, 3) uint8."""
    grey = panel[..., None] if panel.ndim == 2 else panel
    return np.broadcast_to(np.uint8(255 * grey), (*panel.shape[:2], 3))


def beside_each_other(panels: list[np.ndarray]) -> Image.Image:
    """Panels (H, W, 3) uint8 of the same height in a row, with a white gap after each."""
    padded = [np.pad(panel, ((0, 0), (0, GAP), (0, 0)), constant_values=255) for panel in panels]
    return Image.fromarray(np.hstack(padded))


def below_each_other(pictures: list[Image.Image]) -> Image.Image:
    """Pictures in a column, each scaled to the same width."""
    scaled = [picture.resize((WIDTH, round(picture.height * WIDTH / picture.width))) for picture in pictures]
    return Image.fromarray(np.vstack([np.asarray(picture) for picture in scaled]))


def line_chart(title: str, lines: dict[str, list[tuple[float, float]]]) -> Image.Image:
    """Lines through (x, y) points, with grid and legend."""
    left, bottom, width, height = 90, 360, 600, 310  # of the plotting area, in pixels
    points = np.concatenate([np.array(line, dtype=float) for line in lines.values()])
    low, high = points.min(axis=0), points.max(axis=0)
    extent = np.where(high > low, high - low, 1)
    scale = np.array([width, -height]) / extent  # pixels per unit

    def place(x: float, y: float) -> tuple[float, float]:
        return tuple((left, bottom) + ((x, y) - low) * scale)

    sheet = Image.new("RGB", (WIDTH, 420), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(15)
    draw.text((left, 10), title, "black", ImageFont.load_default(20))
    for x, y in np.linspace(low, high, 6):
        if high[0] - low[0] >= 2:
            x = round(x)  # whole epochs
        across, down = place(x, y)
        draw.line((left, down, left + width, down), "#dddddd")
        draw.text((left - 10, down), f"{y:.3g}", "black", font, anchor="rm")
        draw.text((across, bottom + 10), f"{x:.3g}", "black", font, anchor="mt")
    for i, (name, line) in enumerate(lines.items()):
        colour = f"hsl({(220 + 140 * i) % 360}, 75%, 42%)"
        draw.line([place(x, y) for x, y in line], colour, 3)
        for x, y in line:  # a line of one point would be invisible
            draw.circle(place(x, y), 4, colour)
        draw.text((left + width + 15, 50 + 20 * i), name, colour, font)
    return sheet


def save_picture(path: Path, picture: Image.Image) -> None:
    """Write a picture as PNG, whatever suffix the name has."""
    # Level 4 takes a third of the time of level 6, with 2 % more bytes.
    write_atomically(path, lambda file: picture.save(file, "PNG", compress_level=4), durable=False)


# ---------------------------------------------------------------- report.html: opens from the disk, loads nothing


PAGE = Path(__file__).with_name("report.html")  # the page with DATA in place of its data
THUMBNAIL = 192  # pixels; the longer side
VIEWS = ("outline", "photo", "heat", "mask")


@dataclass(frozen=True)
class Entry:
    """An image on the page. `anomalous` is its label, None if unknown; `is_trained_on` marks good training images."""

    name: str
    kind: str
    anomalous: bool | None
    score: float
    path: Path
    is_trained_on: bool = False


def picture(name: str, view: str) -> str:
    """The path, below the page's folder, of a view of the image with this name. The name is hashed, since a file name
    with a suffix added may be too long."""
    return f"report_files/{key(name)}.{view}.jpg"


def key(name: str) -> str:
    return hashlib.sha1(os.fsencode(name)).hexdigest()[:16]


def views_of(
    photo: Image.Image, verdict: Verdict, limits: Thresholds, mask: np.ndarray | None = None
) -> dict[str, Image.Image]:
    """The pictures of an image for the page, by name: the `photograph`, the same with the regions outlined, the heat
    map, the true mask (H', W') bool, if there is one, and a thumbnail."""
    anomaly_map, line = heat_and_line(verdict, photo.size)
    views = {"photo": photo, "heat": Image.fromarray(heat_colours(anomaly_map, limits.anomaly_map))}
    thumbnail = photo.copy()
    if verdict.found.any():
        views["outline"] = Image.fromarray(np.where(line, np.uint8(RED), np.asarray(photo)))
        thumbnail = views["outline"].copy()
    if mask is not None and mask.any():
        views["mask"] = Image.fromarray(mask).convert("L").resize(photo.size)
    thumbnail.thumbnail((THUMBNAIL, THUMBNAIL))
    return views | {"thumb": thumbnail}


def save_views(own: OwnFiles, name: str, views: dict[str, Image.Image]) -> None:
    """Save the `views_of` the image with this name."""
    own.remove([picture(name, view) for view in VIEWS if view not in views])  # of an earlier image of this name
    for view, shown in views.items():
        save_jpeg(own.claim(picture(name, view)), shown)


def save_jpeg(path: Path, shown: Image.Image) -> None:
    write_atomically(path, lambda file: shown.save(file, "JPEG", quality=85), durable=False)


def write_page(own: OwnFiles, title: str, facts: dict[str, str], threshold: float, entries: list[Entry]) -> None:
    """Write report.html, with `facts` at its top. The views of the images have been saved in the same folder before."""
    images = []
    for entry in entries:
        views = [view for view in VIEWS if (own.folder / picture(entry.name, view)).exists()]
        shown = [printable(entry.name), printable(entry.kind), entry.anomalous, entry.score, key(entry.name)]
        images.append([*shown, views, str(entry.path.resolve()), entry.is_trained_on])
    found = {"title": title, "facts": list(facts.items()), "threshold": threshold, "images": images}
    text = json.dumps(found, separators=(",", ":")).replace("<", "\\u003c")  # no name can end the script
    write_text(own.claim("report.html"), PAGE.read_text(encoding="utf-8").replace("DATA", text, 1))


def printable(name: str) -> str:
    """A file name, which may not be UTF-8, as text."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
