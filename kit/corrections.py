"""corrections.json, which report.html writes: the images that a detector judged wrongly, as a person ticked them."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from kit.errors import InputError

LISTS = {
    "missed": "defects that it took for normal",
    "false_alarms": "good images that it flagged",
    "not_good": "images that it was trained on as good ones, and should not be",
}


@dataclass(frozen=True)
class Corrections:
    """Files of images: defects that were `missed`, good ones that were flagged, and those among the good ones that are
    none."""

    missed: list[Path] = field(default_factory=list)
    false_alarms: list[Path] = field(default_factory=list)
    not_good: list[Path] = field(default_factory=list)

    def of_good(self, files: list[Path], defects: list[Path]) -> list[Path]:
        """The good images `files`, less those that are none, or are given as `defects`, and with the false alarms.
        Raises InputError if one of those that are `not_good` is not among them."""
        there = {path.resolve() for path in files}
        for path in self.not_good:
            if path.resolve() not in there:
                raise InputError(f"--corrections: {path}, which is not_good, is none of the good images of --data")
        out = {path.resolve() for path in [*self.not_good, *defects]}
        kept = [path for path in files if path.resolve() not in out]
        return kept + [path for path in self.false_alarms if path.resolve() not in there]


def read_corrections(file: Path) -> Corrections:
    """Raises InputError if the file is missing or is none of report.html's, if it has nothing in it, if an image is in
    two of its lists, or is not there any more."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--corrections {file}: cannot be read as JSON ({error})") from error
    if not isinstance(found, dict) or not set(found) <= set(LISTS) or not all(map(is_list_of_text, found.values())):
        raise InputError(f"--corrections {file}: is no corrections; give lists of paths, {', '.join(LISTS)}")
    paths = [path for name in LISTS for path in dict.fromkeys(found.get(name, []))]
    if not paths:
        raise InputError(f"--corrections {file}: has no image in it; tick some on the page")
    for path in paths:
        if paths.count(path) > 1:
            raise InputError(f"--corrections {file}: {path} is in two of its lists; leave it in one")
        if not Path(path).is_file():
            raise InputError(f"--corrections {file}: {path} is not there any more; leave it out")
    return Corrections(**{name: [Path(path) for path in dict.fromkeys(found.get(name, []))] for name in LISTS})


def is_list_of_text(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)
