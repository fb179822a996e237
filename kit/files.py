"""Writing files so that no failure costs what was there, and tables that survive a kill."""

import contextlib
import csv
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from kit.errors import InputError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None


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
    write_rows(path, [list(rows[0]), *(list(row.values()) for row in rows)])


def write_rows(path: Path, rows: list[list]) -> None:
    """Write rows as a CSV file."""

    def write(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)

    write_atomically(path, write)


FORMULA_GUARD = "'"


def plain_cell(text: str) -> str:
    """A text that no spreadsheet takes for a formula, on one line: an apostrophe goes before a leading = + - @ or tab,
    and before an apostrophe, so that it can be told from this; line ends become \\n and \\r."""
    text = text.replace("\n", "\\n").replace("\r", "\\r")
    return f"{FORMULA_GUARD}{text}" if text.startswith(("=", "+", "-", "@", "\t", FORMULA_GUARD)) else text


def column(path: Path, name: str) -> list[str]:
    """The cells of this column of a CSV file, less its header; none if there is no such file."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return [row[name] for row in csv.DictReader(file)]


def read_as_is(path: Path) -> str:
    """A file's text, its line ends untouched."""
    return path.read_bytes().decode("utf-8", errors="surrogateescape")


class GrowingTable:
    """A CSV file that gets one row at a time, each on the disk at once, so that a kill costs the last one at most.

    Opened again with `resume`, it keeps its rows, but a half-written last one, and those whose first cell is not among
    `only`, if that is given; `keys` holds the first cells of its rows."""

    def __init__(self, path: Path, columns: list[str], resume: bool, only: set[str] | None = None):
        path.parent.mkdir(parents=True, exist_ok=True)
        text = read_as_is(path) if resume and path.exists() else ""
        rows = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))[1:]
        kept = [row for row in rows if only is None or row[0] in only]
        self.keys = {row[0] for row in kept}
        # Written anew beside it, so that a kill now costs nothing; then it grows.
        write_rows(path, [columns, *kept])
        self.file = open(path, "a", encoding="utf-8", errors="surrogateescape", newline="")
        self.writer = csv.writer(self.file, lineterminator="\n")

    def add(self, row: list) -> None:
        self.writer.writerow(row)
        self.file.flush()

    def close(self) -> None:
        self.file.close()


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make `folder`, and keep other calls from writing into it meanwhile; the system lets go of it when this process
    ends, however it does. Raises InputError if another call has it."""
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"--out {folder}: another call is writing there; wait, or give another --out") from error
        except OSError:
            pass  # some network folders know no locks
        yield
    finally:
        os.close(descriptor)
