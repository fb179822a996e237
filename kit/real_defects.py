"""Real defects that a user gives beside the good images, as a folder or in corrections.json, which report.html writes:
their files and masks, copies of them, their rows, and how they are known again. Images are numpy, (H, W, 3) float32 in
[0, 1], masks (H, W) bool."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kit import data
from kit.detector import Detector, side_of
from kit.errors import InputError
from kit.good import Defect, to_tensor
from kit.images import read_image, read_mask
from kit.processes import counted
from kit.rows import touches

COPIES = 8  # of each defect, with itself
SHIFT = 12  # pixels at most: one and a half positions of the backbone's maps
LIGHT = 0.1  # brighter or darker by this share at most


def list_defects(folder: Path, masks: Path | None) -> list[Defect]:
    """The images in `folder`, with the masks of the same stems in the folder `masks`; if that is not given, in
    ground_truth/<its name>, beside it or, as in MVTec AD, beside its parent test/. Raises InputError if there are no
    images, or no masks where they were said to be."""
    files = data.list_images(folder)
    if not files:
        raise InputError(f"--defects {folder}: no such folder, or no images in it")
    found = data.by_stem(data.list_images(masks or usual_masks(folder)))
    if masks and not any(path.stem in found for path in files):
        raise InputError(f"--defect-masks {masks}: no such folder, or no masks in it that are called like the images")
    if found:
        data.by_stem(files)  # no two images may claim one mask
    return [Defect(path, found.get(path.stem)) for path in files]


def usual_masks(folder: Path) -> Path:
    """Where the masks of the images in `folder` are, if there are any."""
    folder = folder.resolve()
    root = folder.parents[1] if folder.parent.name == "test" else folder.parent
    return root / "ground_truth" / folder.name


def copies(
    image: np.ndarray, mask: np.ndarray, count: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`count` pairs of image and mask: first as they are, then turned over, shifted by some pixels, and in another
    light. What a shift uncovers is reflected, defect and mask alike."""
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


# ---------------------------------------------------------------- rows w (A, K)


def real_rows(model: Detector, defects: list[Defect], count: int, first_training: Callable[[], None]) -> Tensor:
    """Codes (A, K + 1) of real defects, about `count` of them with their copies: where their masks are, or where they
    stand out after a first training."""
    untrained = model.flow, model.classifier
    if not all(defect.mask for defect in defects):
        print("a first training, to find where the defects without masks are", flush=True)
        first_training()
    rows = defect_rows(model, defects, count)
    model.flow, model.classifier = untrained
    return rows


@torch.no_grad()
def defect_rows(model: Detector, defects: list[Defect], count: int) -> Tensor:
    """Codes (A, K + 1) of real defects and of some copies of each, in float16; of many defects there are fewer copies.

    They are of no good image, so they are seen from all prototypes. Raises InputError if nothing is marked on any of
    the defects."""
    each = max(1, min(COPIES, count // len(defects)))
    rng = np.random.default_rng(model.settings.seed)
    rows, outside = [], []
    for defect in counted(defects, "features of real defects", len(defects)):
        image = read_image(defect.path, model.shape)
        mask = whereabouts(model, defect, image)
        if not mask.any():
            outside.append(defect.path.name)
            continue
        for copied, where_it_is in copies(image, mask, each, rng):
            w = model.encode(to_tensor(copied[None]))
            touched = touches(to_tensor(np.float32(where_it_is)[None, ..., None]).to(model.device), w.shape[2:])
            rows.append(w.permute(0, 2, 3, 1)[touched].half())
    if outside:
        print(f"nothing is marked, in the region of interest, on {len(outside)} defects: {', '.join(outside)}")
    if not rows:
        raise InputError("--defects: not one of them has anything marked in the region of interest")
    return torch.cat(rows)


def whereabouts(model: Detector, defect: Defect, image: np.ndarray) -> np.ndarray:
    """Where a defect is in its image (H, W, 3), in the region of interest: by its mask; or, if it has none, where the
    model's map stands out most. (H, W) bool. That is its highest thousandth, of 384 x 384 pixels at most: what else is
    above the level of good images is half of it beside the defect (on screws; of the highest thousandth a sixth)."""
    roi = model.roi.cpu().numpy()
    if defect.mask:
        return read_mask(defect.mask, model.shape) & roi
    maps, _ = model(to_tensor(image[None]))
    heat = np.where(roi, maps[0].cpu().numpy(), -np.inf)
    count = max(1, round(side_of(model.pixels) ** 2 / 1000))
    return (heat >= np.sort(heat, axis=None)[-count]) & roi


# ---------------------------------------------------------------- corrections.json: what a person ticked on the page


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


# ---------------------------------------------------------------- known again


def fingerprints(files: Iterable[Path]) -> tuple[tuple[str, str], ...]:
    """For each of these files its path and a hash of its bytes: it is known again by either."""
    return tuple(sorted({(str(path.resolve()), fingerprint(path)) for path in files}))


def fingerprint(path: Path) -> str:
    """Raises InputError if there is no such file."""
    try:
        return hashlib.sha1(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def is_among(path: Path, taught: Iterable[tuple[str, str]]) -> bool:
    """Whether a file, or a copy of it, has one of these `fingerprints`."""
    known = {value for pair in taught for value in pair}
    return bool(known) and (str(path.resolve()) in known or fingerprint(path) in known)
