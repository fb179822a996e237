"""What this program wrote into a folder, listed in a file beside it: nothing else is ever replaced or removed."""

import json
import os
from collections.abc import Collection
from pathlib import Path

from kit.errors import InputError
from kit.files import write_text

KINDS = ("trained", "measured", "judged", "drawn")  # of calls
LIST = ".clflow"  # a line for each file: the kind of call that wrote it, and its path below the folder


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


def is_listed(path: Path) -> bool:
    """Whether a file that exists is in the list of its folder, or of one above it."""
    if not path.exists():
        return False
    whole = path.resolve()
    for folder in whole.parents:
        name = whole.relative_to(folder).as_posix()
        if any(name == listed for _, listed in read_list(folder)):
            return True
    return False


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
