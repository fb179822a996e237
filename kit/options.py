"""What the scripts' command lines share: errors in one line, ranges, options without effect. No PyTorch here: its
import takes seconds."""

import argparse
from collections.abc import Iterable
from pathlib import Path

from kit.errors import InputError


class Parser(argparse.ArgumentParser):
    """argparse's parser, but a wrong command line is an InputError: one line, without the usage block."""

    def error(self, message: str) -> None:
        raise InputError(message)


def flag_of(name: str) -> str:
    """The flag on the command line: "keep_epochs" -> "--keep-epochs"."""
    return "--" + name.replace("_", "-")


def is_given(value: object) -> bool:
    """Whether an option stands on the command line: all that may have no effect default to None."""
    return value is not None


def refuse_without_effect(args: argparse.Namespace, names: Iterable[str], reason: str) -> None:
    """Raises InputError if one of these options is given; `reason` completes "--flag has no effect ..."."""
    for name in names:
        if is_given(getattr(args, name)):
            raise InputError(f"{flag_of(name)} has no effect {reason}; leave it out")


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raises InputError if an option's value is not within low..high."""
    if not low <= value <= high:
        raise InputError(f"{flag_of(name)} {value}: out of range, give {low} to {high}")


def is_inside(path: Path, folder: Path) -> bool:
    """Whether `path`, existing or not, is `folder` or lies in it."""
    return path.resolve().is_relative_to(folder.resolve())


def refuse_inside(out: Path, folder: Path) -> None:
    """Raises InputError if --out is a folder that is read, or lies in it: a later call would read what this wrote."""
    if is_inside(out, folder):
        raise InputError(f"--out {out}: lies in {folder}, whose images are read; give a folder outside")
