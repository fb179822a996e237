"""The run folder: which checkpoint in it counts, and what a new run may write over."""

import re
from pathlib import Path

from kit.detector import read_checkpoint
from kit.errors import InputError
from kit.options import refuse_inside
from kit.owned import OwnFiles

MODEL = "model.pt"  # of a finished run
STATE = "state.pt"  # of an unfinished one: a usable checkpoint after each epoch
RECALIBRATED = "recalibrated.pt"  # with thresholds from other good images; counts only where it is named
TRAINED = (MODEL, STATE, RECALIBRATED, "log.csv", "loss.png", "suspects.png")


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
