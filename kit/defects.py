"""Real defects that a user gives beside the good images: their files and masks, copies of them, and how they are known
again. Images are numpy, (H, W, 3) float32 in [0, 1], masks (H, W) bool."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kit import data
from kit.errors import InputError

COPIES = 8  # of each defect, with itself
SHIFT = 12  # pixels at most: one and a half positions of the backbone's maps
LIGHT = 0.1  # brighter or darker by this share at most


@dataclass(frozen=True)
class Defect:
    """The file of an image with a defect, and its mask's, None where nobody has drawn one."""

    path: Path
    mask: Path | None


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
