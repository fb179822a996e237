"""The run folder: which checkpoint in it counts, and how a new training takes the place of an earlier one.

A training writes into the subfolder `unfinished`. The detector of an earlier training, and all that belongs to it, stay
as they are until the new one is complete; then `install` puts it in their place."""

import re
from pathlib import Path

from kit.detector import read_checkpoint
from kit.errors import InputError
from kit.files import move
from kit.options import refuse_inside
from kit.owned import OwnFiles

MODEL = "model.pt"  # of a finished training
UNFINISHED = "unfinished"  # the subfolder of one that is not finished
STATE = "state.pt"  # in that subfolder: a checkpoint after each epoch, from which --resume goes on
RECALIBRATED = "recalibrated.pt"  # with thresholds from other good images; counts only where it is named
TRAINED = (MODEL, RECALIBRATED, "log.csv", "loss.png", "suspects.png")


def checkpoint_of(run: Path) -> Path:
    """The checkpoint that judges: `run` itself if it is a file; else its model.pt. Only if there is none yet: that of
    the unfinished training."""
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
    """Whether a training was begun in this folder, and is not complete or not in its place."""
    return bool(unfinished_files(run).names())


def unfinished_files(run: Path) -> OwnFiles:
    """The files of the training in `run` that is not finished."""
    return OwnFiles(run / UNFINISHED, "trained")


def resumable(run: Path) -> Path | None:
    """The checkpoint that --resume looks at: the state of a stopped training; else, unless one was announced that has
    not begun, the finished model."""
    if is_unfinished(run):
        state = run / UNFINISHED / STATE
        return state if state.exists() else None
    return run / MODEL if (run / MODEL).exists() else None


def check_out(out: Path, data: Path, inputs: list[Path], resume: bool, epochs: int = 0) -> None:
    """Raises InputError if training on category `data` may not write into `out`: if it lies in one of the folders
    that are read (`inputs`), or holds a stopped run that was not asked for, or the run of another folder, or a file
    that has the name of one of a run's files, those of so many kept `epochs` included, and was not written by one."""
    for folder in inputs:
        refuse_inside(out, folder)
    names = [*TRAINED, *(epoch_file(number) for number in range(1, epochs + 1))]
    for name in names:
        OwnFiles(out, "trained").refuse_foreign(name)
        unfinished_files(out).refuse_foreign(name)
    unfinished_files(out).refuse_foreign(STATE)
    if (out / STATE).exists():
        raise InputError(f"--out {out}: holds a stopped run of an earlier version; give another --out")
    for checkpoint in (out / MODEL, out / UNFINISHED / STATE):
        if checkpoint.exists():
            refuse_other_data(out, checkpoint, data)
    is_stopped = (out / UNFINISHED / STATE).exists() and not (out / UNFINISHED / MODEL).exists()
    if is_stopped and not resume:
        raise InputError(f"--out {out}: holds a stopped run; go on with --resume, or give another --out")


def refuse_other_data(out: Path, checkpoint: Path, data: Path) -> None:
    """Raises InputError if a checkpoint in `out` was not trained on category `data`."""
    try:
        other = Path(read_checkpoint(checkpoint)["settings"]["data"])
    except InputError as error:
        raise InputError(f"--out {out}: {error}, or give another --out") from error
    if other != data.resolve():
        raise InputError(f"--out {out}: holds a run of {other}; give another --out")


def announce(out: Path) -> None:
    """Say on the disk that a training will follow: as long as it is not complete, figures in `out` are those of an
    earlier detector, and --resume begins it."""
    unfinished_files(out).claim(STATE)


def install(out: Path) -> None:
    """Put a complete training, whose model.pt lies in the subfolder `unfinished`, in the place of an earlier one.

    A kill at any point leaves one of the two detectors in `out`, and nothing beside it that belongs to the other. The
    next call goes on from there. It does nothing while a training is not complete."""
    new, own = unfinished_files(out), OwnFiles(out, "trained")
    is_complete = (new.folder / MODEL).exists()
    if not is_complete and STATE in new.names():
        return
    arriving = [name for name in new.names() if name not in (MODEL, STATE) and (new.folder / name).exists()]
    for name in (MODEL, *arriving):
        own.refuse_foreign(name)
    if is_complete:
        new.remove([STATE])
        # What belongs to the earlier detector goes before its successor comes.
        remove_measured(out)
        own.remove([name for name in own.names() if name != MODEL and belongs_to_detector(name)])
        move(new.folder / MODEL, own.claim(MODEL))
    for name in arriving:
        move(new.folder / name, own.claim(name))
    new.remove_all()
    if new.folder.is_dir() and not any(new.folder.iterdir()):
        new.folder.rmdir()


def belongs_to_detector(name: str) -> bool:
    """Whether a training of one detector writes a file of this name; results.json of several runs is none."""
    return name in TRAINED or re.fullmatch(r"epoch_\d+\.pt", name) is not None


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
    kept = [path for path in found if re.fullmatch(r"epoch_\d+", path.stem) and not is_of_successor(path)]
    return sorted(kept, key=lambda path: (path.parent, epoch_of(path)))


def is_of_successor(path: Path) -> bool:
    """Whether a file is one of an unfinished training in a folder that has a finished detector."""
    return path.parent.name == UNFINISHED and (folder_of(path) / MODEL).exists()
