"""Single files that a call writes: which files they may replace."""

import itertools
from collections.abc import Iterable
from pathlib import Path

import torch

from kit.errors import InputError
from kit.files import is_listed


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
