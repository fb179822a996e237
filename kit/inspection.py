"""Judging new images: for each a row in scores.csv, its regions and a picture; report.html for all of them.

A row belongs to one image: a name, with the size and the time of its file. It replaces an earlier row on the same image
by the same detector. No other row is ever removed."""

import itertools
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from kit import InputError, camera, data, draw, folders, shapes
from kit.detector import Detector
from kit.draw import Entry, save_views, views_of, write_page
from kit.files import (
    FORMULA_GUARD,
    GrowingTable,
    OwnFiles,
    fitting,
    locked,
    move,
    plain_cell,
    refuse_inside,
    table_of,
    write_rows,
    write_text,
)
from kit.images import load_image, named, shape_of, to_tensor, turned
from kit.measuring import Inspection
from kit.processes import clear, counted
from kit.verdict import Thresholds, Verdict, basis
from kit.windows import at_once

# In both tables: size and time (ns) of the image's file, the fingerprint of the detector, and its threshold. The same
# name with another size or time is another image.
COMMON_COLUMNS = ["bytes", "changed", "detector", "threshold"]
SCORES_COLUMNS = ["file", "score", "anomalous", "x0", "y0", "x1", "y1", *COMMON_COLUMNS]
REGIONS_COLUMNS = ["file", "region", "x0", "y0", "x1", "y1", "area", "peak", *COMMON_COLUMNS]
TABLE = "scores.csv"
REGIONS = "regions.csv"
PAGE = "report.html"
ABOUT = "judged.json"  # says which images the results are about

Stamp = tuple[int, int]  # size in bytes, time of the last change in ns


# ---------------------------------------------------------------- where results go


def findings_folder(run: str, images: Path, detector: str, watch: bool) -> Path:
    """The default folder for results on these `images`: predictions/<run>/<their name>. If that contains results of
    another detector, or on other images, the detector's fingerprint is added, and a number if necessary. The folder of
    an earlier call of this kind is used again."""
    name = Path(os.path.abspath(images)).name or "images"
    folder = Path("predictions", run)
    root = str(root_of(images).resolve())
    for out in sorted(path.parent for path in folder.glob(f"*/{ABOUT}")):
        is_for_them = re.fullmatch(re.escape(name) + r"(-[0-9a-f]{12}(-\d+)?)?", out.name)
        if is_for_them and images_of(out) == root and not obstacle(out, images, detector, watch):
            return out
    further = (folder / f"{name}-{detector}-{number}" for number in itertools.count(2))
    candidates = itertools.chain((folder / name, folder / f"{name}-{detector}"), further)
    return next(out for out in candidates if not obstacle(out, images, detector, watch))


def check_findings(out: Path, images: Path, detector: str, watch: bool) -> None:
    """Raises InputError if results of this detector on these `images` must not be added to those in `out`."""
    if found := obstacle(out, images, detector, watch):
        raise InputError(f"--out {out}: {found}; give another --out")


def obstacle(out: Path, images: Path, detector: str, watch: bool) -> str | None:
    """The reason why results of this detector on these `images` must not be added to those in `out`; None if they may.
    With `watch`, results of another detector are no obstacle."""
    table = out / TABLE
    own = OwnFiles(out, "judged")
    for file in (TABLE, REGIONS, PAGE, ABOUT):
        own.refuse_foreign(file)
    header, *rows = table_of(table) or [None]
    if header is None:
        return None
    if header != SCORES_COLUMNS or not all(is_whole(row) for row in rows):
        return f"its {TABLE} was written by an earlier version, or changed by hand"
    other = images_of(out)
    if other != str(root_of(images).resolve()):
        return f"contains results for other images ({other})"
    others = {row[-2] for row in rows} - {detector}
    if others and not watch:
        return f"contains results of another detector ({', '.join(sorted(others))}; this one is {detector})"
    return None


def is_whole(row: list[str]) -> bool:
    """Whether a row of scores.csv has the form in which this version writes it."""
    if len(row) != len(SCORES_COLUMNS):
        return False
    cells = dict(zip(SCORES_COLUMNS, row, strict=True))
    try:
        float(cells["score"])
    except ValueError:
        return False
    return all(cells[name].removeprefix("-").isdecimal() for name in ("bytes", "changed"))


def images_of(out: Path) -> str | None:
    """The folder of the images that the results in `out` are about."""
    try:
        return json.loads((out / ABOUT).read_text(encoding="utf-8"))["images"]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def root_of(images: Path) -> Path:
    """The folder to which names of images are relative: `images` itself, or the folder of a single image."""
    return images if images.is_dir() else images.parent


# ---------------------------------------------------------------- what is written


class Judgements:
    """Writes the results into `out`: scores.csv and regions.csv, row by row, a picture of each image, report.html.

    Results of earlier calls on the same `images` stay. `seen` are the images that any detector has judged, as names in
    the table with their stamps; `done` are those that this detector has judged at this threshold."""

    def __init__(self, work: Inspection, images: Path):
        self.work = work
        self.model = work.model
        self.limits = work.limits
        self.own = OwnFiles(work.out, "judged")
        self.images = images
        self.tail = [work.detector, f"{self.limits.score:.6f}"]  # of each row
        self.complaints: list[str] = []  # about pictures that could not be written
        about = {"images": str(root_of(images).resolve()), "checkpoint": str(work.checkpoint.resolve())}
        write_text(self.own.claim(ABOUT), json.dumps(about, indent=2) + "\n")
        rows = table_of(work.out / TABLE)[1:]
        self.keep_page(rows)
        self.seen = {stamped(row) for row in rows}
        self.done = {stamped(row) for row in rows if row[-2:] == self.tail}
        self.scores = GrowingTable(self.own.claim(TABLE), SCORES_COLUMNS, rows)
        # A kill may have left regions of an image without a row in scores.csv; it will be judged again.
        complete = {judged_as(row) for row in rows}
        regions = [row for row in table_of(work.out / REGIONS)[1:] if judged_as(row) in complete]
        self.regions = GrowingTable(self.own.claim(REGIONS), REGIONS_COLUMNS, regions)

    def keep_page(self, rows: list[list[str]]) -> None:
        """Keep the page of an earlier detector under another name: its scores have another scale."""
        earlier = rows[-1][-2] if rows else self.work.detector
        if earlier != self.work.detector and (self.own.folder / PAGE).exists():
            move(self.own.folder / PAGE, self.own.claim(f"report-{earlier}.html"))

    def has(self, name: str, stamp: Stamp) -> bool:
        """Whether this detector has judged this image, and its picture exists."""
        is_judged = (plain_cell(name), str(stamp[0]), str(stamp[1])) in self.done
        return is_judged and (self.own.folder / f"{fitting(name)}.png").exists()

    def add(self, name: str, photo: Image.Image, verdict: Verdict, stamp: Stamp) -> None:
        """Write the verdict on an image and its picture. If the picture cannot be written, the row still is."""
        try:
            picture = draw.verdict_picture(photo, name, verdict, self.limits)
            draw.save_picture(self.own.claim(f"{fitting(name)}.png"), picture)
            save_views(self.own, name, views_of(photo, verdict, self.limits))
        except InputError as error:
            self.complaints.append(str(error))
        for row in regions_rows(name, verdict):
            self.regions.add([*row, *stamp, *self.tail])
        self.scores.add([*scores_row(name, verdict), *stamp, *self.tail])  # last: with it the image is done
        clear()
        print(f"{name}: {sentence(verdict)}", flush=True)

    def write_page(self) -> list[Entry]:
        """Write report.html with all images in scores.csv that this detector judged; returns its entries."""
        entries = entries_of(self.own.folder, self.images, Path(self.model.settings.data), self.work.detector)
        facts = {"checkpoint": str(self.work.checkpoint.resolve()), "detector": self.work.detector}
        facts |= {"images": str(self.images.resolve()), "calibration": basis(self.limits)}
        if earlier := [name for name in self.own.names() if name.startswith("report-") and name.endswith(".html")]:
            facts["judged by earlier detectors"] = ", ".join(earlier)
        title = f"{self.model.settings.category}: {len(entries)} images"
        write_page(self.own, title, facts, self.limits.score, entries)
        return entries

    def close(self) -> None:
        """Close the tables. If there are several rows on one image by this detector, the last one stays."""
        self.scores.close()
        self.regions.close()
        rows, regions = (table_of(self.own.folder / name)[1:] for name in (TABLE, REGIONS))
        latest = {(*stamped(row), row[-2]): row for row in rows}
        if len(latest) < len(rows):
            kept = {judged_as(row) for row in latest.values()}
            write_rows(self.own.claim(TABLE), [SCORES_COLUMNS, *latest.values()])
            numbered = {(judged_as(row), row[1]): row for row in regions if judged_as(row) in kept}
            write_rows(self.own.claim(REGIONS), [REGIONS_COLUMNS, *numbered.values()])


def stamped(row: list[str]) -> tuple[str, str, str]:
    """The image that a row of either table belongs to: its name in the table, and its stamp."""
    return row[0], row[-4], row[-3]


def judged_as(row: list[str]) -> tuple[str, ...]:
    """The image that a row of either table belongs to, the detector, and its threshold."""
    return row[0], *row[-4:]


def stamp_of(path: Path) -> Stamp | None:
    """Size and time of a file; None if it is gone or cannot be reached now."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def judge_new(work: Inspection, images: Path) -> None:
    """Judge an image, or all images of a folder and its subfolders: for each a row in scores.csv, a row in regions.csv
    for each of its regions, and <file name>.png. Images that this detector has judged already keep their rows.

    Raises InputError at the end if images could not be read (unless `skip_bad`) or pictures could not be written; all
    other results are written by then."""
    out = work.out
    files = new_images(images, out)
    root = root_of(images)
    print(basis(work.limits))
    shapes.print_others(files, work.model.shape)
    complaints = []
    with locked(out):
        check_findings(out, images, work.detector, watch=False)
        judgements = Judgements(work, images)
        stamps = {path: stamp_of(path) or (0, 0) for path in files}
        todo = [path for path in files if not judgements.has(name_below(root, path), stamps[path])]
        if len(todo) < len(files):
            print(
                f"{len(files) - len(todo)} of {len(files)} images were judged by this detector before; they keep "
                "their results"
            )
        judged = judge_files(work.model, todo, work.limits, complaints)
        measures = []
        for image, verdict in counted(judged, "judging images", len(todo)):
            judgements.add(name_below(root, image.path), image.photo, verdict, stamps[image.path])
            measures.append(image.measures)
        judgements.close()
        entries = judgements.write_page()
    print(f"wrote {PAGE}, {TABLE} and {REGIONS} into {out}: {len(entries)} images, detector {work.detector}")
    print_camera(work.model, measures)
    now = {name_below(root, path) for path in files}
    print_drift(work.model, np.array([entry.score for entry in entries if entry.name in now]))
    if judgements.complaints:
        without = f"{len(judgements.complaints)} images were judged, but their pictures could not be written"
        raise InputError(f"{without}: {'; '.join([*judgements.complaints, *complaints])}")
    if complaints and not work.skip_bad:
        raise InputError(
            f"{len(complaints)} of {len(files)} images could not be judged; replace or remove them, or give "
            f"--skip-bad: {'; '.join(complaints)}"
        )
    folders.print_skipped(complaints, len(files))


def new_images(images: Path, out: Path) -> list[Path]:
    """The image `images`, or the images below that folder. Raises InputError if there are none, or if the next call
    would find the pictures of this call among them."""
    if not images.exists():
        raise InputError(f"--images {images}: no such file or folder")
    if not images.is_dir():
        return [images]
    refuse_inside(out, images)
    files = folders.list_images(images, subfolders=True)
    folders.print_unread(images, subfolders=True)
    if not files:
        raise InputError(f"--images {images}: no images in this folder")
    return files


def name_below(root: Path, path: Path) -> str:
    """The name of an image in the tables: its path relative to the folder that was given."""
    return path.relative_to(root).as_posix()


def entries_of(out: Path, images: Path, trained_on: Path, detector: str) -> list[Entry]:
    """The entries of report.html: the `images`, a file or a folder, that this detector judged, from the last row of
    each in scores.csv. Their kind is their folder. `trained_on` is the category of the detector."""
    root = root_of(images)
    folders_of_good = (trained_on, *folders.good_folders(trained_on / "train"))
    good_folders = {folder.resolve() for folder in folders_of_good}  # they may be links
    scores: dict[str, float] = {}
    for row in table_of(out / TABLE)[1:]:
        cells = dict(zip(SCORES_COLUMNS, row, strict=True))
        if cells["detector"] == detector:
            name = cells["file"].removeprefix(FORMULA_GUARD)
            scores.pop(name, None)  # ordered by the last time each was judged
            scores[name] = float(cells["score"])
    kind_of_root = root.resolve().name
    entries = []
    for name, score in scores.items():
        path = root / name
        kind = Path(name).parent.as_posix() if "/" in name else kind_of_root
        entries.append(Entry(name, kind, None, score, path, path.parent.resolve() in good_folders))
    return entries


@dataclass(frozen=True)
class Decoded:
    """An image file as the detector sees it, `pixels` (h, w, 3); as a person does; its shape (H, W); and `measures`
    (8,) of its camera."""

    path: Path
    pixels: np.ndarray
    photo: Image.Image
    shape: tuple[int, int]
    measures: np.ndarray


def decode(path: Path, model: Detector) -> Decoded:
    """Raises InputError, naming the file, if it cannot be read."""
    image = load_image(path)  # read once: later the file may have changed or vanished
    upright = turned(image)
    pixels = named(path, upright, model.shape)
    measures = camera.with_compression(model.measures(to_tensor(pixels[None])), camera.quantization_step(image))
    return Decoded(path, pixels, draw.photo_of(upright, model.roi), shape_of(upright), measures)


def decoded_batches(files: list[Path], model: Detector, complaints: list[str]) -> Iterator[list[Decoded]]:
    """The decoded files, up to eight at a time. For each unreadable file a line is added to `complaints` instead."""
    count = at_once(model.shape)
    for start in range(0, len(files), count):
        batch = []
        for path in files[start : start + count]:
            try:
                batch.append(decode(path, model))
            except InputError as error:
                complaints.append(str(error))
        if batch:
            yield batch


def judge_files(
    model: Detector, files: list[Path], limits: Thresholds, complaints: list[str]
) -> Iterator[tuple[Decoded, Verdict]]:
    """Each file, decoded, and the verdict on it. For each unreadable file a line is added to `complaints`, which is
    complete after the last file."""
    for batch in data.prefetched(decoded_batches(files, model, complaints)):
        images = to_tensor(np.stack([image.pixels for image in batch]))
        with torch.no_grad():
            maps, scores = model(images)
        for image, anomaly_map, score in zip(batch, maps.cpu().numpy(), scores.tolist(), strict=True):
            yield image, model.verdict(score, anomaly_map, image.shape, limits)


def scores_row(name: str, verdict: Verdict) -> list:
    """A row of scores.csv; the box is that of the region with the highest peak."""
    box = verdict.regions[0].box if verdict.regions else [""] * 4
    return [plain_cell(name), f"{verdict.score:.9g}", int(verdict.anomalous), *box]


def regions_rows(name: str, verdict: Verdict) -> list[list]:
    """Rows of regions.csv, highest peak first."""
    numbered = enumerate(verdict.regions, start=1)
    return [[plain_cell(name), number, *r.box, r.area, f"{r.peak:.6f}"] for number, r in numbered]


def print_camera(model: Detector, measures: list[np.ndarray]) -> None:
    """Print a line if light, noise, sharpness or compression of these images differ from those of the training images.

    `measures` (8,) of each image: see kit/camera.py."""
    if not measures:
        return
    words = differences(np.stack(measures), model.camera.cpu().numpy())
    if words:
        print(camera_line(words, len(measures)), flush=True)


def differences(measures: np.ndarray, normal: np.ndarray) -> list[str]:
    """How new images with these measures (n, 8) differ from what is `usual` (2, 8): words such as "blurrier".

    The median of n new images has to differ by `camera.DEVIATIONS` / sqrt(n) standard deviations of single images, n at
    most 4. What is not known (NaN) does not differ."""
    middle, deviation = normal
    change = np.median(measures, axis=0) - middle
    deviations = camera.DEVIATIONS / math.sqrt(min(len(measures), 4))
    words = []
    for (rise, fall, least), by, usual_deviation in zip(camera.MEASURES.values(), change, deviation, strict=True):
        if abs(by) > max(least, deviations * usual_deviation):
            words.append(rise if by > 0 else fall)
    return words


def camera_line(words: list[str], images: int) -> str:
    """A line on the `differences` of new images."""
    which = f"these {images} images are" if images > 1 else "this image is"
    listed = " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    return (
        f"{which} {listed} than the training images: expect more false alarms. Train again with some of them among the "
        "good images, or run --recalibrate with new good images"
    )


def print_drift(model: Detector, scores: np.ndarray) -> None:
    """Print a line if the scores of images that were judged together have shifted."""
    where = drift(scores, model.good_scores[0].cpu().numpy())
    if where:
        unless = "most of them are defective" if where == "higher" else "the detector was trained with them"
        print(
            f"drift: these {len(scores)} images score clearly {where} than the good images that set the threshold. "
            f"Unless {unless}, the light, the camera or the parts have changed: train again, or set a new threshold "
            "with --recalibrate FOLDER (a folder of new good images)"
        )


def drift(scores: np.ndarray, normal: np.ndarray) -> str:
    """Whether the scores of many images have shifted: "higher" or "lower", else "".

    They have if the middle halves of both (from the 25 % to the 75 % quantile) do not overlap. A folder with up to two
    thirds of defects does not trigger this. Fewer than ten images give ""."""
    if len(scores) < 10:
        return ""
    low, high = np.quantile(scores, (0.25, 0.75))
    normal_low, normal_high = np.quantile(normal, (0.25, 0.75))
    if low > normal_high:
        return "higher"
    return "lower" if high < normal_low else ""


def sentence(verdict: Verdict) -> str:
    if not verdict.anomalous:
        return f"normal, score {verdict.score:.3f}"
    return f"anomalous, box {verdict.regions[0].box}, score {verdict.score:.3f}"
