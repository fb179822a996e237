"""Writing files so that neither a failure nor a power cut costs what was there, and tables that survive a kill."""

import contextlib
import csv
import errno
import hashlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from kit.errors import InputError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None


def write_atomically(path: Path, write: Callable[[Path], object], durable: bool = True) -> None:
    """Call `write(temporary file)`, then rename that file to `path`.

    A kill leaves either the old file or the new one. So does a power cut if `durable`: then both the contents and the
    name are on the disk when this returns. That takes some 10 to 20 ms a file, so pictures, which can be drawn again,
    do without. Raises InputError if the file cannot be written; neither that nor Ctrl-C leaves a temporary file
    behind."""
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")  # processes may write side by side
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        if durable:  # before the rename, or a power cut could leave the new name with an empty file
            sync(temporary)
        os.replace(temporary, path)
        if durable:
            sync(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise InputError(f"{path}: cannot be written ({error!r:.200})") from error
    finally:
        if temporary.exists():
            temporary.unlink()


def sync(path: Path) -> None:
    """Wait until a file's contents, or a folder's names, are on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network folders cannot be synced
            raise
    finally:
        os.close(descriptor)


def move(source: Path, target: Path) -> None:
    """Rename `source` to `target`, in place of what is there, so that a power cut leaves one of both."""
    os.replace(source, target)
    sync(target.parent)
    sync(source.parent)


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


def read_as_is(path: Path) -> str:
    """A file's text, its line ends untouched."""
    return path.read_bytes().decode("utf-8", errors="surrogateescape")


def header_of(path: Path) -> list[str] | None:
    """The names of the columns of a CSV file; None if there is no such file, or its first line is not complete."""
    text = read_as_is(path) if path.exists() else ""
    return next(csv.reader(io.StringIO(text[: text.find("\n") + 1], newline="")), None)


def rows_of(path: Path) -> list[list[str]]:
    """The rows of a CSV file without its header and without a half-written last line; none if there is no such file."""
    text = read_as_is(path) if path.exists() else ""
    return list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))[1:]


class GrowingTable:
    """A CSV file that gets one row at a time. Each row is handed to the system at once, so that a kill costs the last
    one at most; a power cut may cost those of the last seconds.

    It begins with `rows`, in place of what is in the file."""

    def __init__(self, path: Path, columns: list[str], rows: list[list]):
        # Written anew beside it, so that a kill now costs nothing; then it grows.
        write_rows(path, [columns, *rows])
        self.file = open(path, "a", encoding="utf-8", errors="surrogateescape", newline="")
        self.writer = csv.writer(self.file, lineterminator="\n")

    def add(self, row: list) -> None:
        self.writer.writerow(row)
        self.file.flush()

    def close(self) -> None:
        self.file.close()


# A file's name has at most 255 bytes on most systems; a temporary file's has some more than the picture's.
LONGEST_NAME = 255 - len(".png.tmp1234567890")


def fitting(name: str) -> str:
    """A file name, or a path below a folder, to which .png can be added on any file system: a name that is too long for
    that is cut, and gets a hash of the whole."""
    path = PurePosixPath(name)
    if len(os.fsencode(path.name)) <= LONGEST_NAME:
        return name
    mark = "~" + hashlib.sha1(os.fsencode(path.name)).hexdigest()[:12]
    kept = path.name
    while len(os.fsencode(kept + mark)) > LONGEST_NAME:  # by letters: bytes would cut one in two
        kept = kept[:-1]
    return path.with_name(kept + mark).as_posix()


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
