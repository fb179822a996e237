"""report.html: all images that were judged, on one page that opens from the disk. Nothing comes from the network. And
corrections.json, which the page writes."""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from kit.draw import RED, heat_and_line, heat_colours
from kit.errors import InputError
from kit.files import OwnFiles, write_atomically, write_text
from kit.verdict import Thresholds, Verdict

PAGE = Path(__file__).with_name("report.html")  # the page with DATA in place of its data
THUMBNAIL = 192  # pixels of the longer side
VIEWS = ("outline", "photo", "heat", "mask")


@dataclass(frozen=True)
class Entry:
    """An image on the page; `anomalous` is the truth, None if nobody knows it; `is_trained_on`, as a good one."""

    name: str
    kind: str
    anomalous: bool | None
    score: float
    path: Path
    is_trained_on: bool = False


def picture(name: str, view: str) -> str:
    """Where a view of the image of this name lies, below the page's folder. File names have no limit to their letters,
    so they are hashed."""
    return f"report_files/{key(name)}.{view}.jpg"


def key(name: str) -> str:
    return hashlib.sha1(os.fsencode(name)).hexdigest()[:16]


def save_views(
    own: OwnFiles, name: str, photo: Image.Image, verdict: Verdict, limits: Thresholds, mask: np.ndarray | None = None
) -> None:
    """The pictures that the page shows of a `photograph`: itself, and outlined where a defect is found; the heat map;
    the true mask (H', W') bool, if there is any; a thumbnail."""
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

    write_atomically(path, write)


def write_page(own: OwnFiles, title: str, facts: dict[str, str], threshold: float, entries: list[Entry]) -> None:
    """report.html, of images whose views have been saved there; `facts` stand at its head."""
    images = []
    for entry in entries:
        views = [view for view in VIEWS if (own.folder / picture(entry.name, view)).exists()]
        shown = [readable(entry.name), readable(entry.kind), entry.anomalous, round(entry.score, 5), key(entry.name)]
        images.append([*shown, views, str(entry.path.resolve()), entry.is_trained_on])
    found = {"title": title, "facts": list(facts.items()), "threshold": threshold, "images": images}
    text = json.dumps(found, separators=(",", ":")).replace("<", "\\u003c")  # no name can end the script
    write_text(own.claim("report.html"), PAGE.read_text(encoding="utf-8").replace("DATA", text, 1))


def readable(name: str) -> str:
    """A file name that need not be UTF-8, as text."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


# ---------------------------------------------------------------- corrections.json: what a person ticked on the page


LISTS = {
    "missed": "defects that it took for normal",
    "false_alarms": "good images that it flagged",
    "not_good": "images that it was trained on as good ones, and should not be",
}


@dataclass(frozen=True)
class Corrections:
    """Files of images: defects that were `missed`, good ones that were flagged, and those among the good ones that are
    none."""

    missed: list[Path] = field(default_factory=list)
    false_alarms: list[Path] = field(default_factory=list)
    not_good: list[Path] = field(default_factory=list)

    def of_good(self, files: list[Path], defects: list[Path]) -> list[Path]:
        """The good images `files`, less those that are none, or are given as `defects`, and with the false alarms.
        Raises InputError if one of those that are `not_good` is not among them."""
        there = {path.resolve() for path in files}
        for path in self.not_good:
            if path.resolve() not in there:
                raise InputError(f"--corrections: {path}, which is not_good, is none of the good images of --data")
        out = {path.resolve() for path in [*self.not_good, *defects]}
        kept = [path for path in files if path.resolve() not in out]
        return kept + [path for path in self.false_alarms if path.resolve() not in there]


def read_corrections(file: Path) -> Corrections:
    """Raises InputError if the file is missing or is none of report.html's, if it has nothing in it, if an image is in
    two of its lists, or is not there any more."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--corrections {file}: cannot be read as JSON ({error})") from error
    if not isinstance(found, dict) or not set(found) <= set(LISTS) or not all(map(is_list_of_text, found.values())):
        raise InputError(f"--corrections {file}: is no corrections; give lists of paths, {', '.join(LISTS)}")
    paths = [path for name in LISTS for path in dict.fromkeys(found.get(name, []))]
    if not paths:
        raise InputError(f"--corrections {file}: has no image in it; tick some on the page")
    for path in paths:
        if paths.count(path) > 1:
            raise InputError(f"--corrections {file}: {path} is in two of its lists; leave it in one")
        if not Path(path).is_file():
            raise InputError(f"--corrections {file}: {path} is not there any more; leave it out")
    return Corrections(**{name: [Path(path) for path in dict.fromkeys(found.get(name, []))] for name in LISTS})


def is_list_of_text(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)
