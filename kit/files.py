"""Writing files so that no failure costs what was there, and tables that survive a kill."""

import csv
import os
from collections.abc import Callable
from pathlib import Path

from kit.errors import InputError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary file)`, then rename that file to `path`.

    Raises InputError if it cannot be written; neither that nor Ctrl-C leaves a temporary file behind."""
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")  # processes may write side by side
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise InputError(f"{path}: cannot be written ({error!r:.200})") from error
    finally:
        if temporary.exists():
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """`write_atomically` for text; file names that are not UTF-8 go through unchanged."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape", newline="\n")

    write_atomically(path, write)


def write_table(path: Path, rows: list[dict]) -> None:
    """Write rows, dicts with the same keys, as a CSV file with a header."""

    def write(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)


FORMULA_GUARD = "'"


def plain_cell(text: str) -> str:
    """A text that no spreadsheet takes for a formula, on one line: an apostrophe goes before a leading = + - @ or tab,
    line ends become \\n and \\r."""
    text = text.replace("\n", "\\n").replace("\r", "\\r")
    return f"{FORMULA_GUARD}{text}" if text.startswith(("=", "+", "-", "@", "\t")) else text


def first_cells(path: Path) -> list[str]:
    """The first cell of each row of a CSV file, less its header; none if there is no such file."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return [row[0] for row in list(csv.reader(file))[1:] if row]


class GrowingTable:
    """A CSV file that gets one row at a time, each on the disk at once, so that a kill costs the last one at most.

    Opened again with `resume`, it drops a half-written last line, and `keys` holds the first cells of its rows."""

    def __init__(self, path: Path, columns: list[str], resume: bool):
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.read_bytes() if resume and path.exists() else b""
        whole = whole[: whole.rfind(b"\n") + 1]
        if resume and path.exists():
            os.truncate(path, len(whole))
        self.keys = set(first_cells(path)) if whole else set()
        mode = "a" if whole else "w"
        self.file = open(path, mode, encoding="utf-8", errors="surrogateescape", newline="")
        self.writer = csv.writer(self.file, lineterminator="\n")
        if not whole:
            self.add(columns)

    def add(self, row: list) -> None:
        self.writer.writerow(row)
        self.file.flush()

    def close(self) -> None:
        self.file.close()
