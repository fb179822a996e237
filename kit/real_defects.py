"""Real defects that a user gives in addition to the good images, as a folder or in corrections.json (saved from
report.html): files and masks, augmented copies, rows, and fingerprints. Images are numpy, (H, W, 3) float32 in [0, 1],
masks (H, W) bool."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kit import data
from kit.detector import Detector
from kit.errors import InputError
from kit.good import Defect
from kit.images import read_image, to_tensor
from kit.processes import counted
from kit.rows import touches
from kit.settings import Settings
from kit.windows import side_of

COPIES = 8  # of each defect, including the original
SHIFT = 12  # pixels at most: one and a half positions of the backbone's maps
LIGHT = 0.1  # largest relative change of brightness


def list_defects(folder: Path, masks: Path | None) -> list[Defect]:
    """The images in `folder`, with masks of the same stems from the folder `masks`. If that is not given, from
    ground_truth/<its name>, next to the folder or, as in MVTec AD, next to its parent test/. Raises InputError if there
    are no images, or no masks in a given folder."""
    files = data.list_images(folder)
    if not files:
        raise InputError(
            f"--defects {folder}: no such folder, or no images in it; give a folder of images with defects"
        )
    found = data.by_stem(data.list_images(masks or usual_masks(folder)))
    if masks and not any(path.stem in found for path in files):
        raise InputError(
            f"--defect-masks {masks}: no such folder, or no mask in it has the name of an image in --defects; give "
            "each mask the name of its image"
        )
    if found:
        data.by_stem(files)  # no two images may claim one mask
    return [Defect(path, found.get(path.stem)) for path in files]


def usual_masks(folder: Path) -> Path:
    """The default folder for the masks of the images in `folder`."""
    folder = folder.resolve()
    root = folder.parents[1] if folder.parent.name == "test" else folder.parent
    return root / "ground_truth" / folder.name


def copies(
    image: np.ndarray, mask: np.ndarray, count: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`count` pairs of image and mask: first the original, then copies that are flipped, shifted by some pixels, and
    brighter or darker. Both image and mask are reflected at the borders."""
    yield image, mask
    height, width = mask.shape
    padded = np.pad(image, ((SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="reflect")
    padded_mask = np.pad(mask, SHIFT, mode="reflect")
    for _ in range(count - 1):
        top, left = rng.integers(0, 2 * SHIFT + 1, 2)
        part = slice(top, top + height), slice(left, left + width)
        down, across = rng.choice([-1, 1], 2)
        light = rng.uniform(1 - LIGHT, 1 + LIGHT)
        moved = padded[part][::down, ::across] * light
        yield np.ascontiguousarray(moved.clip(0, 1), dtype=np.float32), padded_mask[part][::down, ::across].copy()


# ---------------------------------------------------------------- codes (A, K + 1)


def real_rows(model: Detector, defects: list[Defect], count: int, preliminary_training: Callable[[], None]) -> Tensor:
    """Codes (A, K + 1) of real defects, from about `count` images including copies: from the area of the masks, or from
    the area that stands out after a preliminary training."""
    untrained = model.flow, model.classifier
    if not all(defect.mask for defect in defects):
        print("a preliminary training, to find where the defects without masks are", flush=True)
        preliminary_training()
    rows = defect_rows(model, defects, count)
    model.flow, model.classifier = untrained
    return rows


@torch.no_grad()
def defect_rows(model: Detector, defects: list[Defect], count: int) -> Tensor:
    """Codes (A, K + 1) of real defects and of some copies of each (fewer copies if there are many defects), in float16.

    They belong to no good image, so all prototypes count. Raises InputError if no mask marks
    anything."""
    each = max(1, min(COPIES, count // len(defects)))
    rng = np.random.default_rng(model.settings.seed)
    rows, outside = [], []
    for defect in counted(defects, "features of real defects", len(defects)):
        image = read_image(defect.path, model.shape)
        mask = defect_mask_of(model, defect, image)
        if not mask.any():
            outside.append(defect.path.name)
            continue
        for copied, where_it_is in copies(image, mask, each, rng):
            code = model.encode(to_tensor(copied[None]))
            touched = touches(to_tensor(np.float32(where_it_is)[None, ..., None]).to(model.device), code.shape[2:])
            rows.append(code.permute(0, 2, 3, 1)[touched].half())
    if outside:
        print(
            f"skipped {len(outside)} defects, since their masks mark nothing in the region of interest: "
            f"{', '.join(outside)}"
        )
    if not rows:
        raise InputError("--defects: no mask marks anything in the region of interest; check the masks and --roi")
    return torch.cat(rows)


def defect_mask_of(model: Detector, defect: Defect, image: np.ndarray) -> np.ndarray:
    """Where a defect is in its image (H, W, 3), within the region of interest: (H, W) bool. Its mask says so; without a
    mask, the highest thousandth of the model's map (of 384 x 384 pixels at most). On *screw*, a sixth of these pixels
    lay outside the defect. Of all pixels above the level of good images, half lay outside."""
    roi = model.roi.cpu().numpy()
    if defect.mask:
        return data.read_mask(defect.mask, model.shape) & roi
    maps, _ = model(to_tensor(image[None]))
    anomaly_map = np.where(roi, maps[0].cpu().numpy(), -np.inf)
    count = max(1, round(side_of(model.pixels) ** 2 / 1000))
    return (anomaly_map >= np.sort(anomaly_map, axis=None)[-count]) & roi


# ---------------------------------------------------------------- corrections.json: what a person ticked on the page


LISTS = {
    "missed": "defects that were not flagged",
    "false_alarms": "good images that were flagged",
    "not_good": "images in the good training set that are not good",
}


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
        return kept + [path for path in self.false_alarms if path.resolve() not in there]


def read_corrections(file: Path) -> Corrections:
    """Raises InputError if the file is missing, empty or not a corrections file, or if an image is in two lists or no
    longer exists."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
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


def files_of_training(settings: Settings) -> set[str]:
    """What identifies the files that a detector was trained with: hashes of the good images (held out or not), paths
    and hashes of the others."""
    return set(settings.good) | {value for pair in settings.taught for value in pair}


def is_among(path: Path, known: set[str]) -> bool:
    """Whether a file, or a copy of it, is among the `files_of_training`."""
    return str(path.resolve()) in known or fingerprint(path) in known
