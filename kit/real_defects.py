"""Real defects that a user gives in addition to the good images, as a folder or in corrections.json (saved from
report.html), and the fingerprints of files."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from kit import InputError, folders
from kit.good import Defect
from kit.settings import Settings


def list_defects(folder: Path, masks: Path | None) -> list[Defect]:
    """The images in `folder`, with masks of the same stems from the folder `masks`. If that is not given, from
    ground_truth/<its name>, next to the folder or, as in MVTec AD, next to its parent test/. Raises InputError if there
    are no images, or no masks in a given folder."""
    files = folders.list_images(folder)
    folders.print_unread(folder)
    if not files:
        what = "no images in this folder (subfolders are not read)" if folder.is_dir() else "no such folder"
        raise InputError(f"--defects {folder}: {what}; give one folder of images with defects")
    found = folders.by_stem(folders.list_images(masks or usual_masks(folder)))
    if masks and not any(path.stem in found for path in files):
        raise InputError(
            f"--defect-masks {masks}: no such folder, or no mask in it has the name of an image in --defects; give "
            "each mask the name of its image"
        )
    if found:
        folders.by_stem(files)  # no two images may claim one mask
    return [Defect(path, found.get(path.stem)) for path in files]


def usual_masks(folder: Path) -> Path:
    """The default folder for the masks of the images in `folder`."""
    folder = folder.resolve()
    root = folder.parents[1] if folder.parent.name == "test" else folder.parent
    return root / "ground_truth" / folder.name


# ---------------------------------------------------------------- corrections.json: what a person ticked on the page


LISTS = ("missed", "false_alarms", "not_good")  # see `Corrections`


@dataclass(frozen=True)
class Corrections:
    """Image files: defects that were `missed`, good images that were flagged (`false_alarms`), and images among the
    good ones that are `not_good`."""

    missed: list[Path] = field(default_factory=list)
    false_alarms: list[Path] = field(default_factory=list)
    not_good: list[Path] = field(default_factory=list)

    def of_good(self, files: list[Path], defects: list[Path]) -> list[Path]:
        """The good images `files` without those that are `not_good` or given as `defects`, and with the false alarms.
        Raises InputError if a `not_good` image is not among them."""
        there = {path.resolve() for path in files}
        for path in self.not_good:
            if path.resolve() not in there:
                raise InputError(
                    f"--corrections: {path} is in not_good, but not among the good images of --data; remove it there"
                )
        out = {path.resolve() for path in [*self.not_good, *defects]}
        kept = [path for path in files if path.resolve() not in out]
        return kept + sorted(path for path in self.false_alarms if path.resolve() not in there)


def read_corrections(file: Path) -> Corrections:
    """Raises InputError if the file is missing, empty or not a corrections file, or if an image is in two lists or no
    longer exists."""
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"--corrections {file}: cannot be read as JSON ({error}); save it again from report.html"
        ) from error
    if not isinstance(found, dict) or not set(found) <= set(LISTS) or not all(map(is_list_of_text, found.values())):
        expected = f"a JSON object with lists of paths: {', '.join(LISTS)}"
        raise InputError(f"--corrections {file}: not a corrections file; expected {expected}")
    paths = [path for name in LISTS for path in dict.fromkeys(found.get(name, []))]
    if not paths:
        raise InputError(f"--corrections {file}: contains no images; tick images in report.html, and save it again")
    for path in paths:
        if paths.count(path) > 1:
            raise InputError(f"--corrections {file}: {path} is in two of its lists; remove it from one")
        if not Path(path).is_file():
            raise InputError(
                f"--corrections {file}: there is no file {Path(path).absolute()}; give its full path, or remove it "
                "from the list"
            )
    return Corrections(**{name: [Path(path) for path in dict.fromkeys(found.get(name, []))] for name in LISTS})


def is_list_of_text(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


# ---------------------------------------------------------------- fingerprints


def fingerprints(files: Iterable[Path]) -> tuple[tuple[str, str], ...]:
    """The path of each file and a hash of its bytes; either identifies the file."""
    return tuple(sorted({(str(path.resolve()), fingerprint(path)) for path in files}))


def fingerprint(path: Path) -> str:
    """A hash of a file's bytes. Raises InputError if it cannot be read."""
    try:
        return hashlib.sha1(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def without_copies(files: list[Path], others: Iterable[Path] = ()) -> dict[Path, str]:
    """The good images `files`, each with its hash, without copies of earlier ones or of the `others`, byte by byte. A
    copy would tell nothing new, and the held-out images would not be new ones. Prints a line if there are any."""
    known = {fingerprint(path) for path in others}
    of_others = " or of given defects" if known else ""
    kept = {}
    for path in files:
        found = fingerprint(path)
        if found not in known:
            kept[path] = found
            known.add(found)
    if len(kept) < len(files):
        print(f"left out {len(files) - len(kept)} of {len(files)} good images, as copies of other ones{of_others}")
    return kept


def files_of_training(settings: Settings) -> set[str]:
    """What identifies the files that a detector was trained with: hashes of the good images (held out or not), paths
    and hashes of the others."""
    return set(settings.good) | {value for pair in settings.taught for value in pair}


def is_among(path: Path, known: set[str]) -> bool:
    """Whether a file, or a copy of it, is among those with these paths and hashes, such as the `files_of_training`."""
    return str(path.resolve()) in known or fingerprint(path) in known
