"""Judging what arrives: a camera writes files into a folder, and each is judged once."""

import time
from pathlib import Path

import numpy as np

from kit import data
from kit.errors import InputError
from kit.files import column, held, plain_cell
from kit.inspection import Inspection, Judgements, judge_files, name_below, print_drift
from kit.options import refuse_inside
from kit.verdict import basis

LOOK_EVERY = 1.0  # seconds
PAGE_EVERY = 30.0
RECENT = 50  # images that are asked, together, whether their scores have moved
STAMP_COLUMNS = ("bytes", "changed")  # the tables have them here: the same name with another stamp is another image

Stamp = tuple[int, int]  # size in bytes, time of the last change in ns


def watch(work: Inspection, folder: Path) -> None:
    """Judge the images in `folder` and its subfolders, and those that come, until Ctrl-C.

    An image counts as whole when it has not changed between two looks, and can be read; one that cannot is named, and
    looked at again when it changes. A call that was stopped or killed goes on when it is made again: a row of
    scores.csv holds the stamp of its image."""
    if not folder.is_dir():
        raise InputError(f"--images {folder}: no such folder; --watch needs one")
    out = work.out
    refuse_inside(out, folder)
    print(basis(work.limits))
    with held(out):
        judgements = Judgements(work, work.call(folder) | {"watch": True}, STAMP_COLUMNS)
        seen = seen_before(out / "scores.csv")
        print(f"watching {folder}, {len(seen)} images judged so far; stop with Ctrl-C", flush=True)
        try:
            judge_what_comes(folder, seen, judgements)
        finally:
            judgements.close()
            judgements.write_page()
            print(f"wrote report.html, scores.csv and regions.csv into {out}", flush=True)


def seen_before(table: Path) -> set[tuple[str, Stamp]]:
    """The images in scores.csv, as the first cells of their rows, and their stamps."""
    stamps = zip(map(int, column(table, "bytes")), map(int, column(table, "changed")), strict=True)
    return set(zip(column(table, "file"), stamps, strict=True))


def judge_what_comes(folder: Path, seen: set[tuple[str, Stamp]], judgements: Judgements) -> None:
    """Look into `folder` again and again; never returns."""
    last_look: dict[Path, Stamp] = {}
    page_is_due = time.monotonic()
    is_page_old = False
    while True:
        looked = time.monotonic()
        now = unseen(folder, seen)
        whole = [path for path, stamp in now.items() if last_look.get(path) == stamp]
        last_look = now
        complaints: list[str] = []
        for path, photo, verdict in judge_files(judgements.model, whole, judgements.limits, complaints):
            if stamp_of(path) == now[path]:  # else it was written while it was read: next time
                judgements.add(name_below(folder, path), photo, verdict, now[path])
                is_page_old = True
        for complaint in complaints:
            print(f"not judged: {complaint}", flush=True)
        # What cannot be read is seen, too, until it changes.
        seen |= {(plain_cell(name_below(folder, path)), now[path]) for path in whole if stamp_of(path) == now[path]}
        if is_page_old and time.monotonic() > page_is_due:
            entries = judgements.write_page()
            print_drift(judgements.model, np.array([entry.score for entry in entries[-RECENT:]]))
            is_page_old = False
            page_is_due = time.monotonic() + PAGE_EVERY
        time.sleep(max(0.0, looked + LOOK_EVERY - time.monotonic()))


def unseen(folder: Path, seen: set[tuple[str, Stamp]]) -> dict[Path, Stamp]:
    """The images that are there, with their stamps, less those that were seen."""
    try:
        files = data.list_images(folder, subfolders=True)
    except FileNotFoundError:  # a subfolder went away meanwhile
        return {}
    found = {path: stamp_of(path) for path in files}
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
