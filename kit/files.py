"""Files that this program writes: so that no failure costs what was there, and tables survive a kill; which of the
files in a folder are its own; and the folder of a run."""

import contextlib
import csv
import io
import json
import os
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from kit.detector import read_checkpoint
from kit.errors import InputError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

KINDS = ("trained", "measured", "judged")  # of calls
LIST = ".clflow"  # a line for each file: the kind of call that wrote it, and its path below the folder

MODEL = "model.pt"  # of a finished run
STATE = "state.pt"  # of an unfinished one: a usable checkpoint after each epoch
RECALIBRATED = "recalibrated.pt"  # with thresholds from other good images; counts only where it is named
TRAINED = (MODEL, STATE, RECALIBRATED, "log.csv", "loss.png", "suspects.png")


# ---------------------------------------------------------------- writing


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


# ---------------------------------------------------------------- what this program wrote; nothing else is ever removed


class OwnFiles:
    """The files in `folder` that calls of this `kind`, one of KINDS, wrote. A folder may have several
    kinds in it; a call removes its own kind only."""

    def __init__(self, folder: Path, kind: str):
        self.folder = folder
        self.kind = kind
        self.listed = read_list(folder)

    def claim(self, name: str) -> Path:
        """Where to write the file `name`. It is listed first, so that a kill leaves nothing that nobody owns. Raises
        InputError if something is there that no call of ours wrote."""
        if (self.kind, name) not in self.listed:
            self.refuse_foreign(name)
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / LIST, "a", encoding="utf-8") as file:
                file.write(line(self.kind, name))
            self.listed.add((self.kind, name))
        return self.folder / name

    def refuse_foreign(self, name: str) -> None:
        """Raises InputError if something is there that no call of ours wrote."""
        is_ours = any((kind, name) in self.listed for kind in KINDS)
        if not is_ours and os.path.lexists(self.folder / name):
            raise InputError(
                f"--out {self.folder}: has {name} in it, which this program did not write; give another --out"
            )

    def names(self) -> list[str]:
        """The files that calls of this kind wrote."""
        return sorted(name for kind, name in self.listed if kind == self.kind)

    def remove(self, names: Collection[str]) -> None:
        """Remove those of these files that calls of this kind wrote, and the folders that are empty then."""
        gone = {(self.kind, name) for name in names} & self.listed
        if not gone:
            return
        for _, name in gone:
            remove_inside(self.folder, name)
        self.listed = read_list(self.folder) - gone
        if self.listed:
            write_text(self.folder / LIST, "".join(line(*entry) for entry in sorted(self.listed)))
        else:
            remove_inside(self.folder, LIST)

    def remove_all(self, but: Collection[str] = ()) -> None:
        """Remove all files that calls of this kind wrote, but these."""
        self.remove([name for name in self.names() if name not in but])


def line(kind: str, name: str) -> str:
    return json.dumps([kind, name]) + "\n"  # in ASCII: file names need not be UTF-8


def read_list(folder: Path) -> set[tuple[str, str]]:
    """The entries of a folder's list. A line that a kill cut off counts as none, and so does whatever else is there."""
    listed = set()
    try:
        lines = (folder / LIST).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return listed
    for text in lines:
        try:
            kind, name = json.loads(text)
        except (ValueError, TypeError):
            continue
        listed.add((str(kind), str(name)))
    return listed


def remove_inside(folder: Path, name: str) -> None:
    """Remove the file `name` below `folder`, unless it lies outside by ../ or a link; then the folders between, if they
    are empty."""
    path = folder / name
    parent = path.parent
    if not parent.resolve().is_relative_to(folder.resolve()) or path.name in ("", ".."):
        return
    if path.is_symlink() or path.is_file():
        path.unlink()
    while parent != folder and parent.is_dir() and not any(parent.iterdir()):
        parent.rmdir()
        parent = parent.parent


# ---------------------------------------------------------------- the run folder


def checkpoint_of(run: Path) -> Path:
    """The checkpoint that counts: `run` itself if it is a file; else, while training is unfinished, its state."""
    if not run.is_dir():
        return run
    return run / STATE if (run / STATE).exists() else run / MODEL


def check_out(out: Path, data: Path, inputs: list[Path], resume: bool) -> None:
    """Raises InputError if training on category `data` may not write into `out`: if it lies in one of the folders
    that are read (`inputs`), or holds a stopped run that was not asked for, or the run of another folder, or what is
    called like a run's files and is none."""
    for folder in inputs:
        refuse_inside(out, folder)
    own = OwnFiles(out, "trained")
    for name in TRAINED:
        own.refuse_foreign(name)
    checkpoint = checkpoint_of(out)
    if not checkpoint.exists():
        return
    try:
        other = Path(read_checkpoint(checkpoint)["settings"]["data"])
    except InputError as error:
        raise InputError(f"--out {out}: {error}, or give another --out") from error
    if other != data.resolve():
        raise InputError(f"--out {out}: holds a run of {other}; give another --out")
    if checkpoint.name == STATE and not resume:
        raise InputError(f"--out {out}: holds a stopped run; go on with --resume, or give another --out")


def remove_stale(out: Path) -> None:
    """Remove what an earlier run left in `out`, once a new one has begun there."""
    OwnFiles(out, "trained").remove_all(but=(STATE,))
    remove_measured(out)


def remove_measured(out: Path) -> None:
    """Remove all figures and pictures of a run's test images: they are of another detector."""
    for folder in (out, *out.glob("tests/*")):
        OwnFiles(folder, "measured").remove_all()
        if folder != out and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def epoch_file(epoch: int) -> str:
    """What train.py --keep-epochs calls the checkpoint of an epoch."""
    return f"epoch_{epoch:02}.pt"


def epoch_of(path: Path) -> int:
    return int(path.stem.removeprefix("epoch_"))


def kept_epochs(out: Path, subfolders: bool = False) -> list[Path]:
    """The epochs that were kept in a run's folder, or in those of all runs below it, by run and epoch."""
    found = out.glob("**/*.pt" if subfolders else "*.pt")
    kept = [path for path in found if re.fullmatch(r"epoch_\d+", path.stem)]
    return sorted(kept, key=lambda path: (path.parent, epoch_of(path)))


def is_inside(path: Path, folder: Path) -> bool:
    """Whether `path`, existing or not, is `folder` or lies in it."""
    return path.resolve().is_relative_to(folder.resolve())


def refuse_inside(out: Path, folder: Path) -> None:
    """Raises InputError if --out is a folder that is read, or lies in it: a later call would read what this wrote."""
    if is_inside(out, folder):
        raise InputError(f"--out {out}: lies in {folder}, whose images are read; give a folder outside")
