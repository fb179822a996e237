"""Judging what arrives: a camera writes files into a folder, and each is judged once."""

import time
from pathlib import Path

from kit import data
from kit.detector import Detector
from kit.errors import InputError
from kit.files import column, plain_cell
from kit.inspection import SCORES_COLUMNS, Judgements, call_of, judge_files, name_below
from kit.options import refuse_inside
from kit.verdict import basis

LOOK_EVERY = 1.0  # seconds
PAGE_EVERY = 30.0
STAMP_COLUMNS = ["bytes", "changed"]  # scores.csv has them here: the same name with another stamp is another image

Stamp = tuple[int, int]  # size in bytes, time of the last change in ns


def watch(model: Detector, checkpoint: Path, folder: Path, out: Path, false_alarm: float) -> None:
    """Judge the images in `folder` and its subfolders, and those that come, until Ctrl-C.

    An image counts as whole when it has not changed between two looks, and can be read; one that cannot is named, and
    looked at again when it changes. A call that was stopped or killed goes on when it is made again: a row of
    scores.csv holds the stamp of its image."""
    if not folder.is_dir():
        raise InputError(f"--images {folder}: no such folder; --watch needs one")
    refuse_inside(out, folder)
    limits = model.thresholds(false_alarm)
    print(basis(limits))
    call = call_of(checkpoint, folder, false_alarm) | {"watch": True}
    judgements = Judgements(model, limits, out, call, SCORES_COLUMNS + STAMP_COLUMNS)
    table = out / "scores.csv"
    stamps = zip(map(int, column(table, "bytes")), map(int, column(table, "changed")), strict=True)
    seen = set(zip(column(table, "file"), stamps, strict=True))
    print(f"watching {folder}, {len(seen)} images judged so far; stop with Ctrl-C", flush=True)
    last_look: dict[Path, Stamp] = {}
    page_is_due = time.monotonic()
    is_page_old = False
    try:
        while True:
            looked = time.monotonic()
            now = unseen(folder, seen)
            whole = [path for path, stamp in now.items() if last_look.get(path) == stamp]
            last_look = now
            complaints: list[str] = []
            for path, photo, verdict in judge_files(model, whole, limits, complaints):
                if stamp_of(path) == now[path]:  # else it was written while it was read: next time
                    judgements.add(name_below(folder, path), photo, verdict, now[path])
                    is_page_old = True
            for complaint in complaints:
                print(f"not judged: {complaint}", flush=True)
            # What cannot be read is seen, too, until it changes.
            seen |= {(plain_cell(name_below(folder, path)), now[path]) for path in whole if stamp_of(path) == now[path]}
            if is_page_old and time.monotonic() > page_is_due:
                judgements.write_page()
                is_page_old = False
                page_is_due = time.monotonic() + PAGE_EVERY
            time.sleep(max(0.0, looked + LOOK_EVERY - time.monotonic()))
    finally:
        judgements.close()
        judgements.write_page()
        print(f"wrote report.html, scores.csv and regions.csv into {out}", flush=True)


def unseen(folder: Path, seen: set[tuple[str, Stamp]]) -> dict[Path, Stamp]:
    """The images that are there, with their stamps, less those that were seen."""
    found = {path: stamp_of(path) for path in data.list_images(folder, subfolders=True)}
    return {
        path: stamp
        for path, stamp in found.items()
        if stamp is not None and (plain_cell(name_below(folder, path)), stamp) not in seen
    }


def stamp_of(path: Path) -> Stamp | None:
    """Of a file that has gone, or cannot be reached now: None."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns
