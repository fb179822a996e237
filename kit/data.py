"""Image files as arrays and tensors: batches of images, masks, and the region of interest."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image

from kit import InputError
from kit.images import in_eight_bits, load_image, read_image, to_tensor, turned
from kit.settings import Shape
from kit.windows import at_once

Item = TypeVar("Item")


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
    """The region of interest that an image marks in white, in the shape in which images are judged: (H, W) bool.
    Transparent pixels mark nothing. Raises InputError, naming the file, if it cannot be decoded or marks nothing."""
    mask = turned(load_image(path))
    try:
        grey = in_eight_bits(mask, background="black").convert("L")
    except InputError as error:  # values outside their range
        raise InputError(f"--roi {path}: {error}") from error
    is_white = grey.point(lambda value: 255 * (value > 127))
    region = np.asarray(is_white.resize(judged_in[::-1], Image.Resampling.BOX)) > 127
    if not region.any():
        raise InputError(f"--roi {path}: contains no white area; mark the area to inspect in white")
    return region
