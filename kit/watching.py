"""Judging images as they arrive: a camera writes files into a folder, and each is judged once."""

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from kit import InputError, folders, shapes
from kit.files import locked, plain_cell, refuse_inside
from kit.inspection import (
    Judgements,
    Stamp,
    check_findings,
    judge_files,
    name_below,
    print_camera,
    print_drift,
    stamp_of,
)
from kit.measuring import Inspection
from kit.verdict import basis

LOOK_EVERY = 1.0  # seconds
PAGE_EVERY = 30.0
IN_TURN = 2000  # known files that are checked at each look, in turn
SETTLED_NS = 2_000_000_000  # after this, a later change is sure to give the directory another time
AT_A_LOOK = 200  # images that are judged before the next look, so that the page is written during a backlog, too
RECENT = 50  # latest images that are checked for a drift of their scores


def watch(work: Inspection, folder: Path) -> None:
    """Judge the images in `folder` and its subfolders, and new ones as they arrive, until Ctrl-C or SIGTERM.

    An image is complete when it has not changed between two looks and can be read. One that cannot be read is named,
    and tried again when it changes. The same call after a stop or a kill continues, also with another detector: a row
    of scores.csv has the stamp of its image and the fingerprint of the detector that judged it."""
    if not folder.is_dir():
        raise InputError(f"--images {folder}: no such folder; --watch needs a folder")
    out = work.out
    refuse_inside(out, folder)
    folders.print_unread(folder, subfolders=True)
    print(basis(work.limits))
    with locked(out):
        check_findings(out, folder, work.detector, watch=True)
        judgements = Judgements(work, folder)
        seen = {(cell, (int(size), int(changed))) for cell, size, changed in judgements.seen}
        print(f"watching {folder}: {len(seen)} images judged so far; stop with Ctrl-C", flush=True)
        try:
            judge_what_comes(folder, seen, judgements)
        finally:
            judgements.close()
            judgements.write_page()
            print(f"wrote report.html, scores.csv and regions.csv into {out}", flush=True)


def judge_what_comes(folder: Path, seen: set[tuple[str, Stamp]], judgements: Judgements) -> None:
    """Check `folder` again and again; never returns."""
    listing = Listing(folder)
    last_look: dict[Path, Stamp] = {}
    page_is_due = time.monotonic()
    is_page_old = is_told = False
    measures: deque[np.ndarray] = deque(maxlen=RECENT)
    while True:
        looked = time.monotonic()
        now = unseen(folder, [*last_look, *listing.look()], seen)
        whole = [path for path, stamp in now.items() if last_look.get(path) == stamp][:AT_A_LOOK]
        last_look = now
        complaints: list[str] = []
        for image, verdict in judge_files(judgements.model, whole, judgements.limits, complaints):
            path = image.path
            if stamp_of(path) == now[path]:  # else it changed while it was read, and is judged at the next look
                judgements.add(name_below(folder, path), image.photo, verdict, now[path])
                measures.append(image.measures)
                is_page_old = True
                shape, judged_in = verdict.anomaly_map.shape, judgements.model.shape
                if not is_told and shapes.is_other(shape, judged_in):
                    print(shapes.others_told({path.name: shape}, 1, judged_in), flush=True)
                    is_told = True  # once is enough: a camera makes many such images
        for complaint in complaints:
            print(f"not judged: {complaint}", flush=True)
        for complaint in judgements.complaints:
            print(f"judged, but its picture could not be written: {complaint}", flush=True)
        judgements.complaints.clear()
        # Unreadable files count as seen, too, until they change.
        seen |= {(plain_cell(name_below(folder, path)), now[path]) for path in whole if stamp_of(path) == now[path]}
        if is_page_old and time.monotonic() > page_is_due:
            entries = judgements.write_page()
            print_camera(judgements.model, list(measures))
            print_drift(judgements.model, np.array([entry.score for entry in entries[-RECENT:]]))
            is_page_old = False
            page_is_due = time.monotonic() + PAGE_EVERY
        time.sleep(max(0.0, looked + LOOK_EVERY - time.monotonic()))


class Listing:
    """The images below a folder, checked again and again. A new name changes its directory's time, so each look checks
    the directories only. A file that is overwritten in place does not change its directory, so each look also checks
    the next IN_TURN of the known files. To check 100,000 files takes two seconds."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.times: dict[Path, int] = {}  # of directories, when they were listed
        self.names: dict[Path, set[str]] = {}  # by directory, all names that were ever in it
        self.files: list[Path] = []  # in the order in which they arrived
        self.turn: Iterator[Path] = iter(())

    def look(self) -> list[Path]:
        """The files that are new since the last look, and the known files that are due for a check."""
        new: list[Path] = []
        self.visit(self.folder, new)
        new.sort()
        self.files += new
        return new + self.next_in_turn()

    def visit(self, directory: Path, new: list[Path]) -> None:
        """Add a directory's new files to `new`, and those of its subfolders."""
        try:
            changed = directory.stat().st_mtime_ns
            if self.times.get(directory) != changed:
                self.list_directory(directory, new)
                # A change shortly after this one may get the same time, since clocks have a limited resolution.
                if time.time_ns() - changed > SETTLED_NS:
                    self.times[directory] = changed
        except OSError:  # it is gone, or cannot be reached now
            self.times.pop(directory, None)
            return
        for subfolder in [path for path in self.times if path.parent == directory and path != directory]:
            self.visit(subfolder, new)

    def list_directory(self, directory: Path, new: list[Path]) -> None:
        """Add a directory's new files to `new`; its subfolders are visited from now on."""
        names = self.names.setdefault(directory, set())
        with os.scandir(directory) as entries:  # distinguishes folders from files without a system call for each
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    if folders.is_hidden(entry.name):
                        continue
                    self.times.setdefault(directory / entry.name, -1)
                elif entry.name not in names:
                    names.add(entry.name)
                    path = directory / entry.name
                    if folders.is_image(path):
                        new.append(path)

    def next_in_turn(self) -> list[Path]:
        """IN_TURN of the known files, from where the last call ended."""
        due = list(islice(self.turn, IN_TURN))
        if len(due) < IN_TURN:
            self.turn = iter(list(self.files))
        return due


def unseen(folder: Path, files: Iterable[Path], seen: set[tuple[str, Stamp]]) -> dict[Path, Stamp]:
    """The existing files among `files` that were not seen, with their stamps."""
    stamps = {path: stamp_of(path) for path in dict.fromkeys(files)}
    return {
        path: stamp
        for path, stamp in stamps.items()
        if stamp is not None and (plain_cell(name_below(folder, path)), stamp) not in seen
    }
