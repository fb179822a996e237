"""Judging new images: a row of scores.csv for each, its regions, its picture, and report.html over all."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from kit import data, draw, shapes
from kit.detector import Detector
from kit.errors import InputError
from kit.files import (
    FORMULA_GUARD,
    GrowingTable,
    OwnFiles,
    column,
    held,
    plain_cell,
    refuse_inside,
    write_text,
)
from kit.images import load_image, named, photograph, shape_of, turned
from kit.processes import ALONE, Processes, clear, counted
from kit.report import Entry, save_views, write_page
from kit.verdict import Thresholds, Verdict, basis, drift
from kit.windows import at_once

SCORES_COLUMNS = ["file", "score", "anomalous", "x0", "y0", "x1", "y1"]
REGIONS_COLUMNS = ["file", "region", "x0", "y0", "x1", "y1", "area", "peak"]
UNFINISHED = "unfinished.json"  # tells which call wrote scores.csv, as long as that is not complete


@dataclass(frozen=True)
class Inspection:
    """What a call of evaluate.py is about: a detector and the checkpoint that it came from, the folder for what it
    finds, the share of good images that it may flag."""

    model: Detector
    checkpoint: Path
    out: Path
    false_alarm: float
    skip_bad: bool = False
    processes: Processes = ALONE

    @property
    def limits(self) -> Thresholds:
        return self.model.thresholds(self.false_alarm)

    def call(self, images: Path) -> dict:
        """Tells a call on these images from others: with a checkpoint at the same place, but of a later time, it is
        another one."""
        return {
            "checkpoint": str(self.checkpoint.resolve()),
            "trained": self.checkpoint.stat().st_mtime_ns,
            "images": str(images.resolve()),
            "false_alarm": self.false_alarm,
        }


class Judgements:
    """What a call writes into `out`: scores.csv and regions.csv, row by row, a picture of each image, report.html.

    `call` describes it: if just this one was interrupted, it goes on behind the last whole row; any other begins anew.
    `more` are further columns of both tables. `done` holds the first cells of the rows that were there."""

    def __init__(self, work: Inspection, call: dict, more: tuple[str, ...] = ()):
        self.model = work.model
        self.limits = work.limits
        self.own = OwnFiles(work.out, "judged")
        self.call = call
        self.scores = open_scores(self.own, call, [*SCORES_COLUMNS, *more])
        self.done = self.scores.keys
        columns = [*REGIONS_COLUMNS, *more]
        regions = self.own.claim("regions.csv")
        self.regions = GrowingTable(regions, columns, resume=bool(self.done), only=self.done)

    def add(self, name: str, photo: Image.Image, verdict: Verdict, more: tuple = ()) -> None:
        """The `photograph` of an image, and the verdict on it; `more` are further cells of its rows."""
        draw.save_picture(self.own.claim(f"{name}.png"), draw.verdict_picture(photo, name, verdict, self.limits))
        save_views(self.own, name, photo, verdict, self.limits)
        for row in regions_rows(name, verdict):
            self.regions.add([*row, *more])
        self.scores.add([*scores_row(name, verdict), *more])  # last: with it the image is done
        clear()
        print(f"{name}: {sentence(verdict)}", flush=True)

    def write_page(self) -> list[Entry]:
        """report.html of all that is in scores.csv, and what is on it."""
        entries = entries_of(self.own.folder, Path(self.call["images"]), Path(self.model.settings.data))
        facts = {name: str(self.call[name]) for name in ("checkpoint", "images")}
        facts["calibration"] = basis(self.limits)
        title = f"{self.model.settings.category}: {len(entries)} images"
        write_page(self.own, title, facts, self.limits.score, entries)
        return entries

    def close(self) -> None:
        self.scores.close()
        self.regions.close()


def judge_new(work: Inspection, images: Path) -> None:
    """Judge an image, or those of a folder and its subfolders: for each a row of scores.csv, one of regions.csv for
    each of its regions, and <file name>.png.

    Raises InputError at the end if some could not be read (unless `skip_bad`); all others are judged by then."""
    out = work.out
    files = new_images(images, out)
    root = images if images.is_dir() else images.parent
    print(basis(work.limits))
    if others := shapes.others_among(files, work.model.shape):
        print(shapes.others_told(others, len(files), work.model.shape))
    complaints = []
    with held(out):
        judgements = Judgements(work, work.call(images))
        todo = [path for path in files if plain_cell(name_below(root, path)) not in judgements.done]
        if len(todo) < len(files):
            print(f"{len(files) - len(todo)} of {len(files)} images were judged before this call was interrupted")
        judged = judge_files(work.model, todo, work.limits, complaints)
        for path, photo, verdict in counted(judged, "judging images", len(todo)):
            judgements.add(name_below(root, path), photo, verdict)
        judgements.close()
        entries = judgements.write_page()
        judgements.own.remove([UNFINISHED])
    print(f"wrote report.html, scores.csv, regions.csv and {len(entries)} pictures into {out}")
    print_drift(work.model, np.array([entry.score for entry in entries]))
    if complaints and not work.skip_bad:
        raise InputError(f"{len(complaints)} of {len(files)} images could not be judged: {'; '.join(complaints)}")
    data.print_skipped(complaints, len(files))


def new_images(images: Path, out: Path) -> list[Path]:
    """The image `images`, or those below that folder. Raises InputError if there are none, or if the pictures of this
    call would lie among them in the next."""
    if not images.exists():
        raise InputError(f"--images {images}: no such file or folder")
    if not images.is_dir():
        return [images]
    refuse_inside(out, images)
    files = data.list_images(images, subfolders=True)
    if not files:
        raise InputError(f"--images {images}: no images there")
    return files


def name_below(root: Path, path: Path) -> str:
    """How the tables call an image: its path below the folder that was asked for."""
    return path.relative_to(root).as_posix()


def open_scores(own: OwnFiles, call: dict, columns: list[str]) -> GrowingTable:
    """scores.csv, from the start; or, if just this `call` was interrupted, to go on behind its last whole row."""
    marker = own.folder / UNFINISHED
    text = json.dumps(call)
    if UNFINISHED in own.names() and marker.exists() and marker.read_text() == text:
        return GrowingTable(own.claim("scores.csv"), columns, resume=True)
    own.remove_all()  # or the pictures of an earlier call would lie beside a table that lacks them
    table = GrowingTable(own.claim("scores.csv"), columns, resume=False)
    write_text(own.claim(UNFINISHED), text)  # last: as long as it is there, the table is this call's
    return table


def entries_of(out: Path, images: Path, trained_on: Path) -> list[Entry]:
    """For report.html: what is in scores.csv of these `images`, a file or a folder, of one that was judged several
    times the last row; their kind is their subfolder. `trained_on` is the category of the detector."""
    root = images if images.is_dir() else images.parent
    good_folders = [trained_on, *(trained_on / "train" / name for name in data.GOOD_NAMES)]
    table = out / "scores.csv"
    scores: dict[str, float] = {}
    for name, score in zip(names_in(table), column(table, "score"), strict=True):
        scores.pop(name, None)  # in the order in which they were judged last
        scores[name] = float(score)
    entries = []
    for name, score in scores.items():
        path = root / name
        entries.append(Entry(name, str(Path(name).parent), None, score, path, path.parent in good_folders))
    return entries


def names_in(table: Path) -> list[str]:
    """The images in a table, as their files are called."""
    return [cell.removeprefix(FORMULA_GUARD) for cell in column(table, "file")]


@dataclass(frozen=True)
class Decoded:
    """An image file as the detector sees it, `pixels` (h, w, 3); as a person does; and its shape (H, W)."""

    path: Path
    pixels: np.ndarray
    photo: Image.Image
    shape: tuple[int, int]


def decode(path: Path, model: Detector) -> Decoded:
    """Raises InputError, naming the file, if it cannot be read."""
    image = turned(load_image(path))  # once, for all three
    pixels = named(path, image, model.shape)
    return Decoded(path, pixels, draw.dimmed(photograph(image, draw.LARGE), model.roi), shape_of(image))


def decoded_batches(files: list[Path], model: Detector, complaints: list[str]) -> Iterator[list[Decoded]]:
    """The files, up to eight at a time, less the unreadable ones, on each of which a line is added to `complaints`."""
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
) -> Iterator[tuple[Path, Image.Image, Verdict]]:
    """Each file with its `photograph` and the verdict on it. A line on each unreadable one is added to `complaints`,
    which is complete when the last file is through."""
    for batch in data.ahead(decoded_batches(files, model, complaints)):
        images = torch.from_numpy(np.stack([image.pixels for image in batch])).permute(0, 3, 1, 2)
        with torch.no_grad():
            maps, scores = model(images)
        for image, heat, score in zip(batch, maps.cpu().numpy(), scores.tolist(), strict=True):
            yield image.path, image.photo, model.verdict(score, heat, image.shape, limits)


def scores_row(name: str, verdict: Verdict) -> list:
    """A row of scores.csv; the box is that of the region of the highest peak."""
    box = verdict.regions[0].box if verdict.regions else [""] * 4
    return [plain_cell(name), f"{verdict.score:.6f}", int(verdict.anomalous), *box]


def regions_rows(name: str, verdict: Verdict) -> list[list]:
    """Rows of regions.csv, highest peak first."""
    numbered = enumerate(verdict.regions, start=1)
    return [[plain_cell(name), number, *r.box, r.area, f"{r.peak:.6f}"] for number, r in numbered]


def print_drift(model: Detector, scores: np.ndarray) -> None:
    """A line, if the scores of images that were judged together have moved as a whole."""
    where = drift(scores, model.normal[0].cpu().numpy())
    if where:
        print(
            f"drift: three quarters of these {len(scores)} images score {where} than three quarters of the good images "
            "did that the threshold comes from. Unless most are defective, light, camera or parts have changed: "
            "--recalibrate FOLDER, with new good images, gives a new threshold; training again is better"
        )


def sentence(verdict: Verdict) -> str:
    if not verdict.anomalous:
        return f"normal, score {verdict.score:.3f}"
    return f"anomalous, box {verdict.regions[0].box}, score {verdict.score:.3f}"
