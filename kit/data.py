"""Folders of images: the usual layouts, batches of the images in them, and masks."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image

from kit.errors import InputError
from kit.images import SUFFIXES, load_image, read_image, to_tensor, turned
from kit.settings import Shape
from kit.windows import at_once

Item = TypeVar("Item")

GOOD_NAMES = ("good", "ok")  # MVTec AD's and BTAD's


@dataclass(frozen=True)
class LabelledImage:
    """An image with its label; `mask` is None for good images, and for defective ones without a mask."""

    path: Path
    anomalous: bool
    mask: Path | None

    @property
    def defect_type(self) -> str:
        """The type of its defect, or "good": its folder's name."""
        return self.path.parent.name


def list_images(folder: Path, subfolders: bool = False) -> list[Path]:
    """Image files in `folder`, sorted by path; none if there is no such folder. Hidden files and hidden subfolders are
    left out."""
    paths = folder.rglob("*") if subfolders else folder.glob("*")
    seen = [path for path in paths if not any(map(is_hidden, path.relative_to(folder).parts[:-1]))]
    return sorted(path for path in seen if is_image(path) and path.is_file())


def is_image(path: Path) -> bool:
    """Whether the file has the suffix of an image and is not hidden."""
    return path.suffix.lower() in SUFFIXES and not is_hidden(path.name)


def is_hidden(name: str) -> bool:
    """Whether the name of a file or folder begins with a dot: macOS adds ._x.png to x.png, and file managers keep
    thumbnails in .thumbnails."""
    return name.startswith(".")


def category_name(category: Path) -> str:
    """The name of a category's folder. For a link it is the link's own name, since two links may point to folders of
    the same name."""
    return Path(os.path.abspath(category)).name


def good_folder(data: Path, flag: str = "--data") -> Path:
    """The folder with the good images: `train/good` (MVTec AD), `train/ok` (BTAD), or `data` itself; never `test/`.
    Raises InputError, naming the `flag`, if there are none."""
    if not data.is_dir():
        raise InputError(f"{flag} {data}: no such folder")
    for folder in (*(data / "train" / name for name in GOOD_NAMES), data):
        if list_images(folder):
            return folder
    raise InputError(f"{flag} {data}: no images in it or in its train/good; add good images ({' '.join(SUFFIXES)})")


def category_folders(data: Path) -> list[Path]:
    """The categories in the folder `data`, each with train/good or train/ok; if there are none, `data` itself."""
    found = {p.parents[1] for p in data.glob("*/train/*") if p.name in GOOD_NAMES and not is_hidden(p.parents[1].name)}
    return sorted(found) or [data]


def print_skipped(complaints: list[str], images: int) -> None:
    """A line for each image that was skipped, and one with their number."""
    for complaint in complaints:
        print(f"skipped: {complaint}")
    if complaints:
        print(f"skipped {len(complaints)} of {images} images in total")


def usable(files: list[Path], skip_bad: bool) -> list[Path]:
    """`files`; with `skip_bad`, which reads them all, without those that cannot be read. A line is printed for each of
    these."""
    if not skip_bad:
        return files
    good, complaints = [], []
    for path in files:
        try:
            read_image(path)
            good.append(path)
        except InputError as error:
            complaints.append(str(error))
    print_skipped(complaints, len(files))
    return good


def by_stem(files: list[Path]) -> dict[str, Path]:
    """Files by stem, without `_mask` at its end. Raises InputError if two have the same stem."""
    found: dict[str, Path] = {}
    for path in files:
        twin = found.setdefault(path.stem.removesuffix("_mask"), path)
        if twin != path:
            raise InputError(
                f"{path}: has the same name as {twin.name} apart from the ending, but masks and images are matched by "
                "name; rename one of them"
            )
    return found


def labelled_images(data: Path) -> list[LabelledImage]:
    """The labelled images of `test/<good|ok|defect>`, in MVTec AD or BTAD layout; masks in `ground_truth/<defect>` are
    matched by stem, with or without `_mask`. Raises InputError if there are no images."""
    found = []
    for folder in test_folders(data):
        files = list_images(folder)
        anomalous = folder.name not in GOOD_NAMES
        masks = by_stem(list_images(data / "ground_truth" / folder.name)) if anomalous else {}
        if masks:
            by_stem(files)  # no two images may claim one mask
        found += [LabelledImage(path, anomalous, masks.get(path.stem)) for path in files]
    if not found:
        raise InputError(
            f"--data {data}: no images in test/good or test/<defect>; to judge unlabelled images, give --images"
        )
    return found


def has_tests(data: Path) -> bool:
    """Whether there are labelled images to measure a detector on."""
    return any(list_images(folder) for folder in test_folders(data))


def test_folders(data: Path) -> list[Path]:
    """The folders test/<kind> of a category, sorted by path, without hidden ones."""
    return sorted(path for path in data.glob("test/*") if path.is_dir() and not is_hidden(path.name))


def read_batch(files: list[Path], shape: Shape) -> torch.Tensor:
    """(len(files), 3, *shape) float32 in [0, 1]."""
    return to_tensor(np.stack([read_image(path, shape) for path in files]))


def batches(files: list[Path], shape: Shape) -> Iterator[torch.Tensor]:
    """Images of `files` in their order, as (<= 8, 3, *shape) tensors; fewer at a time if they are large."""
    batch = at_once(shape)
    starts = range(0, len(files), batch)
    yield from prefetched(read_batch(files[start : start + batch], shape) for start in starts)


def prefetched(items: Iterator[Item]) -> Iterator[Item]:
    """The items, each made in a thread while the one before is used: the next images are decoded while the network
    processes the present ones. Errors in the thread are raised here."""
    end = object()
    with ThreadPoolExecutor(max_workers=1) as thread:
        coming = thread.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, items, end)
            yield item


# ---------------------------------------------------------------- masks


def marked(mask: Image.Image) -> np.ndarray:
    """Where a mask image marks a defect, (H, W) bool: every value except black, since masks come as 0 and 255, as
    labels 1, 2, ..., and in colours. Transparent pixels mark nothing. JPEG blurs black; there values above one half."""
    black = 127 if mask.format == "JPEG" else 0
    mask = turned(mask)
    if mask.mode == "F" or mask.mode.startswith("I"):
        return np.asarray(mask) > 0
    bands = np.asarray(mask.convert("RGBA"))
    return (bands[..., :3].max(axis=2) > black) & (bands[..., 3] > 0)


def read_mask(path: Path | None, shape: Shape) -> np.ndarray:
    """The true mask in this `shape` (H, W), bool, resized to the nearest pixel; all False for None. A mask that is too
    thin for this keeps every pixel it touches. Raises InputError, naming the file, if it cannot be decoded."""
    if path is None:
        return np.zeros(shape, dtype=bool)
    mask = Image.fromarray(np.float32(marked(load_image(path))))
    nearest = np.asarray(mask.resize(shape[::-1], Image.Resampling.NEAREST)) > 0
    if nearest.any():
        return nearest
    return np.asarray(mask.resize(shape[::-1], Image.Resampling.BOX)) > 0


def read_region(path: Path, judged_in: Shape) -> np.ndarray:
    """The region of interest that an image marks in white, in the shape in which images are judged: (H, W) bool. Raises
    InputError, naming the file, if it cannot be decoded or marks nothing."""
    picture = turned(load_image(path)).convert("L").point(lambda value: 255 * (value > 127))
    region = np.asarray(picture.resize(judged_in[::-1], Image.Resampling.BOX)) > 127
    if not region.any():
        raise InputError(f"--roi {path}: contains no white area; mark the area to inspect in white")
    return region
