"""report.html: all judged images on one page that opens from the disk. It loads nothing from the network."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from kit.draw import RED, heat_and_line, heat_colours
from kit.files import OwnFiles, write_atomically, write_text
from kit.verdict import Thresholds, Verdict

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


def save_views(
    own: OwnFiles, name: str, photo: Image.Image, verdict: Verdict, limits: Thresholds, mask: np.ndarray | None = None
) -> None:
    """Save the pictures of an image for the page: the `photograph`, the same with the regions outlined, the heat map,
    the true mask (H', W') bool, if there is one, and a thumbnail."""
    heat, line = heat_and_line(verdict, photo.size)
    views = {"photo": photo, "heat": Image.fromarray(heat_colours(heat, limits.heat))}
    thumbnail = photo.copy()
    if verdict.found.any():
        views["outline"] = Image.fromarray(np.where(line, np.uint8(RED), np.asarray(photo)))
        thumbnail = views["outline"].copy()
    if mask is not None and mask.any():
        views["mask"] = Image.fromarray(mask).convert("L").resize(photo.size)
    thumbnail.thumbnail((THUMBNAIL, THUMBNAIL))
    own.remove([picture(name, view) for view in VIEWS if view not in views])  # of an earlier image of this name
    for view, shown in (views | {"thumb": thumbnail}).items():
        save_jpeg(own.claim(picture(name, view)), shown)


def save_jpeg(path: Path, shown: Image.Image) -> None:
    def write(temporary: Path) -> None:
        shown.save(temporary, "JPEG", quality=85)

    write_atomically(path, write, durable=False)


def write_page(own: OwnFiles, title: str, facts: dict[str, str], threshold: float, entries: list[Entry]) -> None:
    """Write report.html, with `facts` at its top. The views of the images have been saved in the same folder before."""
    images = []
    for entry in entries:
        views = [view for view in VIEWS if (own.folder / picture(entry.name, view)).exists()]
        shown = [readable(entry.name), readable(entry.kind), entry.anomalous, round(entry.score, 5), key(entry.name)]
        images.append([*shown, views, str(entry.path.resolve()), entry.is_trained_on])
    found = {"title": title, "facts": list(facts.items()), "threshold": threshold, "images": images}
    text = json.dumps(found, separators=(",", ":")).replace("<", "\\u003c")  # no name can end the script
    write_text(own.claim("report.html"), PAGE.read_text(encoding="utf-8").replace("DATA", text, 1))


def readable(name: str) -> str:
    """A file name, which may not be UTF-8, as text."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
