"""The good images of a training: which are held out, which are trained on; batches of these, x+, and the anomalous ones
x- that a given function paints on some of them."""

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kit.camera import camera_copy
from kit.detector import Detector
from kit.images import read_image
from kit.processes import ALONE, Processes, counted
from kit.settings import UNIT
from kit.windows import at_once, part_shape

CACHE_BYTES = 5e8  # of decoded images, on each machine: 560 of 384x384
PATCH = 512  # pixels a side of the part of a large image that is painted on
WHOLE = (slice(None), slice(None))

# (x+, random generator, another image to take a defect's filling from, where it may be) -> (x-, mask, box)
Paint = Callable[[np.ndarray, np.random.Generator, np.ndarray, np.ndarray], tuple]


@dataclass(frozen=True)
class Defect:
    """The file of an image with a defect, and its mask's, None where nobody has drawn one."""

    path: Path
    mask: Path | None


@dataclass(frozen=True)
class GoodImages:
    """Files of good images: those that calibrate a detector after each epoch, and those that it is trained on; textures
    to paint defects from, beside these; the processes that share the training; and real defects, if any are given."""

    held_out: list[Path]
    trained_on: list[Path]
    textures: list[Path] = field(default_factory=list)
    processes: Processes = ALONE
    defects: list[Defect] = field(default_factory=list)


def split(files: list[Path], seed: int) -> tuple[list[Path], list[Path]]:
    """(held out, trained on), at random. A tenth is held out for the calibration; of few images at least eight, or a
    quarter; at most 1000."""
    count = held_out_count(len(files))
    order = np.random.default_rng(seed).permutation(len(files))
    return [files[i] for i in order[:count]], [files[i] for i in order[count:]]


def held_out_count(images: int) -> int:
    tenth = min(1000, round(images / 10))
    return max(1, tenth, min(8, images // 4))


class Painter:
    """Good images x+, and anomalous ones x- that a given function paints on them.

    What is painted depends on the seed, the epoch and the number of x- alone, whatever the processes and the order; it
    lies in the model's region of interest. Of images with more pixels than two patches, x+ and x- are a patch each,
    somewhere; `surrounded` adds what the backbone sees around it. Decoded images are kept in memory with half the bits,
    up to CACHE_BYTES; of the others only the last ones."""

    def __init__(self, good: GoodImages, paint: Paint | None, model: Detector):
        """`paint` is None if nothing is painted."""
        self.files = good.trained_on
        self.textures = good.textures
        self.processes = good.processes
        self.paint = paint
        self.shape = model.shape
        self.patch = part_shape(model.shape, PATCH)
        self.reach = model.backbone.reach if model.backbone else 0
        self.roi = model.roi.cpu().numpy()
        self.seed = model.settings.seed
        self.epoch = 0
        bytes_per_image = 2 * 3 * math.prod(self.shape)  # float16
        room = int(CACHE_BYTES / self.processes.local_count / bytes_per_image)
        kept = (self.files + self.textures)[:room]
        self.cache = {path: self.read(path) for path in counted(kept, "reading images", len(kept))}
        self.read_lately = lru_cache(maxsize=2)(self.read)  # a large image and a texture, say

    def read(self, path: Path) -> np.ndarray:
        """(H, W, 3) float16 in [0, 1]."""
        return read_image(path, self.shape).astype(np.float16)

    def image(self, path: Path, place: tuple[slice, slice] = WHOLE) -> np.ndarray:
        """A file, or what is at a place in it: (H, W, 3) float32 in [0, 1]."""
        whole = self.cache[path] if path in self.cache else self.read_lately(path)
        return whole[place].astype(np.float32)

    def file_number(self, number: int | np.ndarray) -> int | np.ndarray:
        """Of the file that x- with this number is made from."""
        return number % len(self.files)

    def place(self, number: int, part: int = 0) -> tuple[slice, slice]:
        """Where on its image the patch of x- with this number is: around a pixel of the region of interest; all of a
        small image. `part` 1 is another one, to take a defect's filling from."""
        rng = np.random.default_rng([self.seed, self.epoch, number, 1 + part])
        row, column = rng.integers(self.shape)
        if not self.roi.all():
            row, column = np.unravel_index(rng.choice(np.flatnonzero(self.roi)), self.shape)
        return within(row, self.patch[0], self.shape[0]), within(column, self.patch[1], self.shape[1])

    def untouched(self, number: int) -> np.ndarray:
        """x+ of this number, (H, W, 3)."""
        return self.image(self.files[self.file_number(number)], self.place(number))

    def anomalous(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, int, int, int]]:
        """x+ and x- of this number, (H, W, 3), the mask (H, W) of where they differ, and the box around it."""
        rng = np.random.default_rng([self.seed, self.epoch, number])
        path, place = self.files[self.file_number(number)], self.place(number)
        image = self.image(path, place)
        use_texture = self.textures and rng.random() < 0.5
        sources = self.textures if use_texture else self.files
        source = sources[rng.integers(len(sources))]
        if self.patch != self.shape and not use_texture:
            source = path  # to decode another large image takes long
        other = self.image(source, self.place(number, part=1))
        painted, mask, box = self.paint(image, rng, other, self.roi[place])
        return image, painted, mask, box

    def surroundings(self, number: int) -> tuple[slice, slice]:
        """Where on its image the patch of x- with this number is, with all that the backbone sees around it."""
        rows, columns = self.place(number)
        return widened(rows, self.reach, self.shape[0]), widened(columns, self.reach, self.shape[1])

    def surrounded(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """x- of this number with its `surroundings`, (H, W, 3), and the mask (H, W) of where it differs from x+.

        A patch alone would teach the wrong thing: features near its rim see the padding of convolutions, which those of
        good images do not."""
        _, painted, changed, _ = self.anomalous(number)
        place, around = self.place(number), self.surroundings(number)
        anomalous = self.image(self.files[self.file_number(number)], around).copy()
        patch = tuple(slice(p.start - a.start, p.stop - a.start) for p, a in zip(place, around, strict=True))
        mask = np.zeros(anomalous.shape[:2], dtype=bool)
        anomalous[patch], mask[patch] = painted, changed
        return anomalous, mask

    def normal(self) -> Iterator[Tensor]:
        """This process's part of the files x+, each once, as (<= 8, 3, H, W) tensors; the larger, the less of them."""
        batch = at_once(self.shape)
        mine = self.processes.part(self.files)
        for start in counted(range(0, len(mine), batch), "features of images", len(mine), batch):
            yield to_tensor(np.stack([self.image(path) for path in mine[start : start + batch]]))

    def copies(self) -> Iterator[Tensor]:
        """A camera copy of each of this process's files x+, as (<= 8, 3, H, W) tensors: what a slightly worse camera
        would see."""
        batch = at_once(self.shape)
        mine = self.processes.part(range(len(self.files)))
        batches = loader(Copies(self, mine), batch, shuffle=False)
        for (images,) in counted(batches, "features of copies", len(mine), each=batch):
            yield to_tensor(images)

    def painted(self, count: int) -> Iterator[tuple[Tensor, Tensor, np.ndarray]]:
        """x- (A, 3, H, W), `surrounded`, their masks (A, 1, H, W), and their numbers (A,): this process's part of
        `count` of them in all, on as many files as there are, one after the other."""
        order = np.random.default_rng(self.seed).permutation(len(self.files))[:count]
        numbers = [n for i, file in enumerate(order) for n in range(file, file + count - i, len(self.files))]
        mine = self.processes.part(numbers)
        # Surroundings end where the image ends, so they have different shapes and cannot be stacked.
        batch = at_once(self.shape) if self.patch == self.shape else 1
        batches = loader(Paintings(self, mine), batch, shuffle=False)
        for after, masks, numbers in counted(batches, "painting defects", len(mine), each=batch):
            yield to_tensor(after), to_tensor(masks), numbers


class Copies(Dataset):
    """Camera copies of a painter's files with these numbers, (H, W, 3) each."""

    def __init__(self, painter: Painter, numbers: Sequence[int]):
        self.painter = painter
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitems__(self, indices: list[int]) -> tuple[np.ndarray]:
        """Some of them, stacked. An array, as in `Paintings`."""
        numbers = [self.numbers[i] for i in indices]
        return (np.stack([self.copy(number) for number in numbers]),)

    def copy(self, number: int) -> np.ndarray:
        painter = self.painter
        return camera_copy(painter.image(painter.files[number]), np.random.default_rng([painter.seed, number]))


class Paintings(Dataset):
    """The x- of a painter with these numbers, `surrounded`: (H, W, 3), mask (H, W, 1), number."""

    def __init__(self, painter: Painter, numbers: Sequence[int]):
        self.painter = painter
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitems__(self, indices: list[int]) -> tuple[np.ndarray, ...]:
        """Some of them, each stacked. Arrays, not tensors: what a loader's worker hands over as a tensor goes through
        shared memory, of which a container has 64 MB, less than a few batches."""
        numbers = [self.numbers[i] for i in indices]
        after, masks = zip(*(self.painter.surrounded(number) for number in numbers), strict=True)
        return np.stack(after), np.float32(masks)[..., None], np.array(numbers)


class Pairs(Dataset):
    """Batches of x+, and of x- for half of them (twice as many teach no more), for each process its part. Small sets
    are repeated, to about `images_per_epoch`."""

    def __init__(self, painter: Painter, images_per_epoch: int):
        self.painter = painter
        self.repeats = max(1, round(images_per_epoch / len(painter.files)))

    def __len__(self) -> int:
        return len(self.painter.files) * self.repeats

    def __getitems__(self, numbers: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """This process's part of a batch: B images x+, then A ones x- that were made from the first A of them, as
        (B + A, H, W, 3) float32; the masks, (A, H, W, 1) float32; and the boxes (y0, x0, y1, x1) around them, (A, 4).
        (H, W) is the images' shape, or a patch's. Arrays, as in `Paintings`.

        Of a batch [5, 3, 8, 1] two processes take [5, 8] and [3, 1]; x- are made from 5 and 3, the first half of the
        batch, so that each process makes one. Every process gets at least one image and one x-."""
        painter = self.painter
        rank, count = painter.processes.rank, painter.processes.count
        mine = painter.processes.part(numbers)
        half = (len(numbers) + 1) // 2  # of the whole batch
        pairs = max(1, len(range(rank, half, count)))
        normal, painted, masks, boxes = [], [], [], []
        for number in mine[:pairs]:
            image, anomalous, mask, box = painter.anomalous(number)
            normal.append(image)
            painted.append(anomalous)
            masks.append(mask)
            boxes.append(box)
        for number in mine[pairs:]:
            normal.append(painter.untouched(number))
        return np.stack(normal + painted), np.float32(masks)[..., None], np.array(boxes)


def within(middle: int, length: int, limit: int) -> slice:
    """So long a part of an axis of `limit` pixels, around the `middle` as far as it goes."""
    start = min(max(0, int(middle) - length // 2), limit - length)
    return slice(start, start + length)


def widened(part: slice, reach: int | None, limit: int) -> slice:
    """A part of an axis of `limit` pixels with at least `reach` pixels around it, as far as the axis goes; all of the
    axis if `reach` is None. It starts at a multiple of UNIT, so that positions of features fall on the same pixels as
    those of the whole image."""
    if reach is None:
        return slice(0, limit)
    start = max(0, part.start - reach) // UNIT * UNIT
    stop = math.ceil((part.stop + reach) / UNIT) * UNIT
    return slice(start, min(stop, limit))


def loader(dataset: Dataset, batch: int, shuffle: bool) -> DataLoader:
    """Batches of `dataset`, painted in the background where processes can be forked; elsewhere each of them would have
    to copy the decoded images."""
    workers = min(4, len(os.sched_getaffinity(0))) if sys.platform == "linux" else 0
    context = "fork" if workers else None
    return DataLoader(
        dataset, batch, shuffle=shuffle, collate_fn=tuple, num_workers=workers, multiprocessing_context=context
    )


def to_tensor(images: np.ndarray) -> Tensor:
    """(B, H, W, C) array -> (B, C, H, W) tensor."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)
