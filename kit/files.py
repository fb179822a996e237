"""Files that this program writes: safe writing (a failure or a power cut loses no earlier file, and tables survive a
kill); a list of the program's own files in a folder; which files a call may replace; and the folder of a run."""

import contextlib
import csv
import errno
import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path, PurePosixPath

import torch

from kit import InputError
from kit.detector import read_checkpoint

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

KINDS = ("trained", "measured", "judged", "drawn")  # of calls
LIST = ".clflow"  # one line per file: the kind of call that wrote it, and its path below the folder

MODEL = "model.pt"  # of a finished training
UNFINISHED = "unfinished"  # subfolder for a training that is not finished
STATE = "state.pt"  # in that subfolder: a checkpoint after each epoch, from which --resume continues
RECALIBRATED = "recalibrated.pt"  # with thresholds from other good images; used only if it is named
TRAINED = (MODEL, RECALIBRATED, "log.csv", "loss.png", "suspects.png")


# ---------------------------------------------------------------- writing


def write_atomically(path: Path, write: Callable[[Path], object], durable: bool = True) -> None:
    """Call `write(temporary file)`, then rename that file to `path`.

    A kill leaves either the old file or the new one. With `durable` a power cut does, too: both the contents and the
    name are on the disk when this returns. That takes 10 to 20 ms per file, so it is not used for pictures, which can
    be drawn again. Raises InputError if the file cannot be written. Neither an error nor Ctrl-C leaves a temporary
    file behind."""
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
        raise InputError(
            f"{path}: cannot be written ({error!r:.200}); check permissions and free disk space"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


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
    """Rename `source` to `target`, replacing a file there, so that a power cut leaves one of the two."""
    os.replace(source, target)
    sync(target.parent)
    sync(source.parent)


def write_text(path: Path, text: str) -> None:
    """`write_atomically` for text; file names in it that are not UTF-8 stay unchanged."""
    write_atomically(path, lambda file: file.write_text(text, "utf-8", "surrogateescape", newline="\n"))


def write_rows(path: Path, rows: list[list]) -> None:
    """Write rows as a CSV file."""

    def write(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)

    write_atomically(path, write)


FORMULA_GUARD = "'"


def plain_cell(text: str) -> str:
    """The text on one line, in a form that no spreadsheet takes for a formula: an apostrophe is put before a leading
    = + - @, tab or apostrophe (so that this can be undone), and line ends become \\n and \\r."""
    text = text.replace("\n", "\\n").replace("\r", "\\r")
    return f"{FORMULA_GUARD}{text}" if text.startswith(("=", "+", "-", "@", "\t", FORMULA_GUARD)) else text


def table_of(path: Path) -> list[list[str]]:
    """The rows of a CSV file, its header first, without a half-written last line; none if there is no such file."""
    text = path.read_bytes().decode("utf-8", errors="surrogateescape") if path.exists() else ""
    return list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))


class GrowingTable:
    """A CSV file that gets one row at a time. Each row is flushed at once, so a kill loses at most the last row. A
    power cut may lose the rows of the last seconds.

    The file first gets `rows`, which replace its contents."""

    def __init__(self, path: Path, columns: list[str], rows: list[list]):
        # Replaced atomically, so that a kill now loses nothing; then it grows.
        write_rows(path, [columns, *rows])
        self.file = open(path, "a", encoding="utf-8", errors="surrogateescape", newline="")
        self.writer = csv.writer(self.file, lineterminator="\n")

    def add(self, row: list) -> None:
        self.writer.writerow(row)
        self.file.flush()

    def close(self) -> None:
        self.file.close()


# A file name has at most 255 bytes on most systems; that of a temporary file is longer than that of the picture.
LONGEST_NAME = 255 - len(".png.tmp1234567890")


def fitting(name: str) -> str:
    """A file name, or a path below a folder, that is short enough for .png to be added on any file system. A name that
    is too long is cut and gets a hash of the full name."""
    path = PurePosixPath(name)
    if len(os.fsencode(path.name)) <= LONGEST_NAME:
        return name
    mark = hashlib.sha1(os.fsencode(path.name)).hexdigest()[:12]
    return path.with_name(f"{path.name[:50]}~{mark}").as_posix()  # a letter has at most four bytes


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make `folder` and lock it against other calls. The system removes the lock when this process and the workers that
    it has started end, in whatever way. Raises InputError if another call holds the lock."""
    if folder.is_file():
        raise InputError(f"--out {folder}: is a file; give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise InputError(f"--out {folder}: cannot be written; check its permissions, or give another --out")
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
            pass  # some network folders have no locks
        yield
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------- the program's own files; others are never removed


class OwnFiles:
    """The files in `folder` that calls of this `kind` (one of KINDS) wrote. A folder may contain several kinds; a call
    removes only its own kind."""

    def __init__(self, folder: Path, kind: str):
        self.folder = folder
        self.kind = kind
        self.listed = read_list(folder)

    def claim(self, name: str) -> Path:
        """The path for writing the file `name`. It is listed first, so that a kill leaves no unlisted file. Raises
        InputError if there is a file that this program did not write."""
        if (self.kind, name) not in self.listed:
            self.refuse_foreign(name)
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / LIST, "a", encoding="utf-8") as file:
                file.write(list_entry(self.kind, name))
            self.listed.add((self.kind, name))
        return self.folder / name

    def refuse_foreign(self, name: str) -> None:
        """Raises InputError if there is a file `name` that this program did not write."""
        ours = {(kind, name) for kind in KINDS}
        if ours & self.listed or not os.path.lexists(self.folder / name):
            return
        if not ours & read_list(self.folder):  # read again: another process of this program may have just written it
            raise InputError(
                f"--out {self.folder}: contains {name}, but {LIST} does not list it as a file of this program; give "
                f"another --out, move the file away, or copy {LIST} too if you copied a run"
            )

    def names(self) -> list[str]:
        """The files that calls of this kind wrote."""
        return sorted(name for kind, name in self.listed if kind == self.kind)

    def remove(self, names: Collection[str]) -> None:
        """Remove the files `names` if calls of this kind wrote them, and folders that become empty."""
        gone = {(self.kind, name) for name in names} & self.listed
        if not gone:
            return
        for _, name in gone:
            remove_inside(self.folder, name)
        self.listed = read_list(self.folder) - gone
        if self.listed:
            write_text(self.folder / LIST, "".join(list_entry(*entry) for entry in sorted(self.listed)))
        else:
            remove_inside(self.folder, LIST)

    def remove_all(self, but: Collection[str] = ()) -> None:
        """Remove all files that calls of this kind wrote, except these."""
        self.remove([name for name in self.names() if name not in but])


def is_listed(path: Path) -> bool:
    """Whether an existing file is in the list of its folder, or of a folder above it."""
    if not path.exists():
        return False
    whole = path.resolve()
    for folder in whole.parents:
        name = whole.relative_to(folder).as_posix()
        if any(name == listed for _, listed in read_list(folder)):
            return True
    return False


def list_entry(kind: str, name: str) -> str:
    # In ASCII: file names need not be UTF-8. It begins a line, since a full disk can leave half an entry before it.
    return f"\n{json.dumps([kind, name])}\n"


def read_list(folder: Path) -> set[tuple[str, str]]:
    """The entries of a folder's list. Incomplete lines, which a kill can leave, and other text are ignored."""
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
    """Remove the file `name` below `folder`, unless ../ or a link leads outside; then the folders in between, if they
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


# ---------------------------------------------------------------- single files that a call writes


def single_file(named: Path | None, default: Path, flag: str, inputs: Iterable[Path] = ()) -> Path:
    """The path of the one file that a call writes: `named`, which the user gave with this `flag`; else `default`, or
    the first of default-2, default-3, ... that does not exist.

    A file that the user names is overwritten. Raises InputError if it is one of the `inputs` that are read, a
    checkpoint, a folder, or a file that this program lists as part of a run or of earlier results."""
    if named is None:
        numbered = (default.with_stem(f"{default.stem}-{number}") for number in itertools.count(2))
        return next(path for path in itertools.chain([default], numbered) if not path.exists())
    reason = ""
    if named.is_dir():
        reason = "is a folder"
    elif any(is_same(named, path) for path in inputs):
        reason = "is one of the files that are read"
    elif is_checkpoint(named):
        reason = "is a checkpoint"
    elif is_listed(named):
        reason = "belongs to a run or to earlier results"
    if reason:
        raise InputError(f"{flag} {named}: {reason}; give another file")
    return named


def is_same(one: Path, other: Path) -> bool:
    """Whether two paths lead to the same file, also through links."""
    return one.exists() and other.exists() and one.samefile(other)


def is_checkpoint(path: Path) -> bool:
    """Whether a file is a checkpoint of a detector, of any version."""
    if not path.is_file():
        return False
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # other files can fail in many ways inside the unpickler
        return False
    return isinstance(found, dict) and {"format", "settings", "state"} <= set(found)


# ---------------------------------------------------------------- the run folder
#
# A training writes into the subfolder `unfinished`. An earlier detector, with all files that belong to it, stays
# unchanged until the new one is complete; then `install` replaces it.


def checkpoint_of(run: Path) -> Path:
    """The checkpoint to use: `run` itself if it is a file, else its model.pt. If there is none yet, that of the
    unfinished training."""
    if not run.is_dir():
        return run
    for path in (run / MODEL, run / UNFINISHED / MODEL, run / UNFINISHED / STATE):
        if path.exists():
            return path
    return run / MODEL


def folder_of(checkpoint: Path) -> Path:
    """The run folder that a checkpoint lies in."""
    return checkpoint.parent.parent if checkpoint.parent.name == UNFINISHED else checkpoint.parent


def is_unfinished(run: Path) -> bool:
    """Whether a training in this folder was started and is not complete, or not installed."""
    return bool(unfinished_files(run).names())


def unfinished_files(run: Path) -> OwnFiles:
    """The files of the unfinished training in `run`."""
    return OwnFiles(run / UNFINISHED, "trained")


def resumable(run: Path) -> Path | None:
    """The checkpoint for --resume: the state of a stopped training, else the finished model. None if a training was
    announced but has not started."""
    if is_unfinished(run):
        state = run / UNFINISHED / STATE
        return state if state.exists() else None
    return run / MODEL if (run / MODEL).exists() else None


def check_out(out: Path, data: Path, inputs: list[Path], resume: bool, epochs: int = 0) -> None:
    """Raises InputError if training on category `data` must not write into `out`: if it lies in one of the folders that
    are read (`inputs`); if it contains an unfinished training and `resume` is false, or a run on other data; or if this
    program would have to replace a file there that it did not write (with `epochs` kept epochs)."""
    for folder in inputs:
        refuse_inside(out, folder)
    unfinished = unfinished_files(out)
    for own in (OwnFiles(out, "trained"), unfinished):
        for name in (*TRAINED, *(epoch_file(number) for number in range(1, epochs + 1))):
            own.refuse_foreign(name)
    unfinished.refuse_foreign(STATE)
    for checkpoint in (out / MODEL, out / UNFINISHED / STATE):
        if checkpoint.exists():
            refuse_other_data(out, checkpoint, data)
    is_stopped = (out / UNFINISHED / STATE).exists() and not (out / UNFINISHED / MODEL).exists()
    if is_stopped and not resume:
        raise InputError(
            f"--out {out}: contains an unfinished training; add --resume to continue it, remove {out / UNFINISHED}, or "
            "give another --out"
        )


def refuse_other_data(out: Path, checkpoint: Path, data: Path) -> None:
    """Raises InputError if a checkpoint in `out` was not trained on category `data`."""
    try:
        other = Path(read_checkpoint(checkpoint)["settings"]["data"])
    except InputError as error:
        raise InputError(
            f"--out {out}: contains a detector of another version, or a damaged one ({checkpoint}); remove this file "
            "and train again, or give another --out"
        ) from error
    if other != data.resolve():
        raise InputError(f"--out {out}: contains a run that was trained on {other}; give another --out")


def announce(out: Path) -> None:
    """Mark on the disk that a training will follow. Until it is complete, metrics in `out` belong to an earlier
    detector, and --resume starts the training."""
    unfinished_files(out).claim(STATE)


def withdraw(out: Path) -> None:
    """Remove the mark that a training will follow, if it ended before it wrote anything."""
    own = unfinished_files(out)
    if not (own.folder / STATE).exists():
        own.remove([STATE])
        if own.folder.is_dir() and not any(own.folder.iterdir()):
            own.folder.rmdir()


def install(out: Path) -> None:
    """Move a complete training, with its model.pt, from the subfolder `unfinished` to the place of an earlier one.

    A kill at any point leaves one of the two detectors in `out`, and no files of the other one. The next call continues
    from there. Does nothing while a training is not complete."""
    new, own = unfinished_files(out), OwnFiles(out, "trained")
    is_complete = (new.folder / MODEL).exists()
    if not is_complete and STATE in new.names():
        return
    arriving = [name for name in new.names() if name not in (MODEL, STATE) and (new.folder / name).exists()]
    for name in (MODEL, *arriving):
        own.refuse_foreign(name)
    if is_complete:
        new.remove([STATE])
        # The files of the earlier detector are removed before the new one is moved.
        remove_measured(out)
        own.remove([name for name in own.names() if name != MODEL and belongs_to_detector(name)])
        move(new.folder / MODEL, own.claim(MODEL))
    for name in arriving:
        move(new.folder / name, own.claim(name))
    new.remove_all()
    if new.folder.is_dir() and not any(new.folder.iterdir()):
        new.folder.rmdir()


def belongs_to_detector(name: str) -> bool:
    """Whether the training of one detector writes a file of this name (results.json belongs to several runs)."""
    return name in TRAINED or re.fullmatch(r"epoch_\d+\.pt", name) is not None


def remove_measured(out: Path) -> None:
    """Remove all metrics and pictures of a run's test images, since they belong to another detector."""
    for folder in (out, *out.glob("tests/*")):
        OwnFiles(folder, "measured").remove_all()
    for folder in (*out.glob("tests/*"), out / "tests"):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def epoch_file(epoch: int) -> str:
    """The file name that train.py --keep-epochs gives to the checkpoint of an epoch."""
    return f"epoch_{epoch:02}.pt"


def is_inside(path: Path, folder: Path) -> bool:
    """Whether `path`, existing or not, is `folder` or lies in it."""
    return path.resolve().is_relative_to(folder.resolve())


def refuse_inside(out: Path, folder: Path) -> None:
    """Raises InputError if --out is a folder that is read, or lies in it: a later call would read this call's files."""
    if is_inside(out, folder):
        raise InputError(f"--out {out}: is inside {folder}, and images are read from there; give a folder outside it")
