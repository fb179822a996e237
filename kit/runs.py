"""The run folder: which checkpoint in it counts, and what a new run may write over."""

import re
import shutil
from pathlib import Path

from kit.detector import read_checkpoint
from kit.errors import InputError
from kit.options import refuse_inside

MODEL = "model.pt"  # of a finished run
STATE = "state.pt"  # of an unfinished one: a usable checkpoint after each epoch
RECALIBRATED = "recalibrated.pt"  # with thresholds from other good images; counts only where it is named
MEASURED = ("metrics.json", "report.html", "report_files", "pictures", "tests", "curve.png", "curve.json")
TRAINED = (MODEL, RECALIBRATED, "log.csv", "loss.png", "suspects.png")


def checkpoint_of(run: Path) -> Path:
    """The checkpoint that counts: `run` itself if it is a file; else, while training is unfinished, its state."""
    if not run.is_dir():
        return run
    return run / STATE if (run / STATE).exists() else run / MODEL


def check_out(out: Path, data: Path, inputs: list[Path], resume: bool) -> None:
    """Raises InputError if training on category `data` may not write into `out`: if it lies in one of the folders
    that are read (`inputs`), or holds a stopped run that was not asked for, or the run of another folder, or what is no
    run's but is called like what a new run removes."""
    for folder in inputs:
        refuse_inside(out, folder)
    checkpoint = checkpoint_of(out)
    if not checkpoint.exists():
        refuse_foreign(out)
        return
    try:
        other = Path(read_checkpoint(checkpoint)["settings"]["data"])
    except InputError as error:
        raise InputError(f"--out {out}: {error}, or give another --out") from error
    if other != data.resolve():
        raise InputError(f"--out {out}: holds a run of {other}; give another --out")
    if checkpoint.name == STATE and not resume:
        raise InputError(f"--out {out}: holds a stopped run; go on with --resume, or give another --out")


def refuse_foreign(out: Path) -> None:
    """Raises InputError if a folder without a run has in it what a run would remove."""
    for name in TRAINED + MEASURED:
        if (out / name).exists():
            raise InputError(
                f"--out {out}: has {name} in it, which training would remove, and no run; give another --out"
            )


def remove(out: Path, names: tuple[str, ...]) -> None:
    """Remove these files and folders of a run, where they are there."""
    for name in names:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def remove_stale(out: Path) -> None:
    """Remove what an earlier run left in `out`, once a new one has begun there."""
    remove(out, TRAINED + MEASURED)
    for path in kept_epochs(out):
        path.unlink()


def epoch_file(out: Path, epoch: int) -> Path:
    """Where train.py --keep-epochs puts the checkpoint of an epoch."""
    return out / f"epoch_{epoch:02}.pt"


def epoch_of(path: Path) -> int:
    return int(path.stem.removeprefix("epoch_"))


def kept_epochs(out: Path, subfolders: bool = False) -> list[Path]:
    """The epochs that were kept in a run's folder, or in those of all runs below it, by run and epoch."""
    found = out.glob("**/*.pt" if subfolders else "*.pt")
    kept = [path for path in found if re.fullmatch(r"epoch_\d+", path.stem)]
    return sorted(kept, key=lambda path: (path.parent, epoch_of(path)))
