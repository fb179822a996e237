"""The good images of a training: which are held out, which are trained on; batches of these, x+, and the anomalous ones
x- that a given function paints on some of them."""

import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kit.defects import Defect
from kit.detector import Detector
from kit.images import read_image
from kit.processes import ALONE, Processes
from kit.progress import counted
from kit.sizes import Shape
from kit.windows import at_once

CACHE_BYTES = 5e8  # of decoded images, on each machine: 560 of 384x384
PATCH = 512  # pixels a side of the part of a large image that is painted on

# (x+, random generator, another image to take a defect's filling from, where it may be) -> (x-, mask, box)
Paint = Callable[[np.ndarray, np.random.Generator, np.ndarray, np.ndarray], tuple]


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


class Pairs(Dataset):
    """Batches of x+, and of x- for half of them (twice as many teach no more), for each process its part.

    Small sets are repeated, to about `images_per_epoch`: index i stands for file i modulo their number. What is painted
    depends on seed, epoch and index alone, whatever the processes and the order; it lies in the model's region of
    interest. Of images with more pixels than two patches, x+ and x- are a patch each, somewhere. Decoded images are
    kept in memory with half the bits, up to CACHE_BYTES; the others are read anew each time."""

    def __init__(self, good: GoodImages, paint: Paint, model: Detector, images_per_epoch: int):
        self.files = good.trained_on
        self.textures = good.textures
        self.processes = good.processes
        self.paint = paint
        self.shape = model.shape
        self.patch = patch_shape(model.shape)
        self.roi = model.roi.cpu().numpy()
        self.seed = model.settings.seed
        self.epoch = 0
        self.repeats = max(1, round(images_per_epoch / len(self.files)))
        bytes_per_image = 2 * 3 * math.prod(self.shape)  # float16
        room = int(CACHE_BYTES / self.processes.local_count / bytes_per_image)
        kept = (self.files + self.textures)[:room]
        self.cache = {
            path: read_image(path, self.shape).astype(np.float16) for path in counted(kept, "reading images", len(kept))
        }

    def __len__(self) -> int:
        return len(self.files) * self.repeats

    def image(self, path: Path) -> np.ndarray:
        """(H, W, 3) float32 in [0, 1]."""
        if path in self.cache:
            return self.cache[path].astype(np.float32)
        return read_image(path, self.shape)

    def place(self, index: int, part: int = 0) -> tuple[slice, slice]:
        """Where on image number `index` its patch is: around a pixel of the region of interest; all of a small image.
        `part` 1 is another one, to take a defect's filling from."""
        rng = np.random.default_rng([self.seed, self.epoch, index, 1 + part])
        row, column = rng.integers(self.shape)
        if not self.roi.all():
            row, column = np.unravel_index(rng.choice(np.flatnonzero(self.roi)), self.shape)
        return within(row, self.patch[0], self.shape[0]), within(column, self.patch[1], self.shape[1])

    def anomalous(self, index: int, path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x+ number `index`, the file `path`; x- made from it; and its mask."""
        rng = np.random.default_rng([self.seed, self.epoch, index])
        whole = self.image(path)
        place = self.place(index)
        image = whole[place]
        use_texture = self.textures and rng.random() < 0.5
        sources = self.textures if use_texture else self.files
        source = sources[rng.integers(len(sources))]
        if self.patch == self.shape:
            other = self.image(source)
        else:  # to decode another large image takes long
            other = (self.image(source) if use_texture else whole)[self.place(index, part=1)]
        painted, mask, _ = self.paint(image, rng, other, self.roi[place])
        return image, painted, mask

    def __getitems__(self, indices: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """This process's part of a batch: B images x+, then A ones x- that were made from the first A of them, as
        (B + A, H, W, 3) float32; the masks, (A, H, W, 1) float32; and the numbers (A,) of the files that x- were made
        from. (H, W) is the images' shape, or a patch's.

        Of a batch [5, 3, 8, 1] two processes take [5, 8] and [3, 1]; x- are made from 5 and 3, the first half of the
        batch, so that each process makes one. Every process gets at least one image and one x-.

        Arrays, not tensors: what a loader's worker hands over as a tensor goes through shared memory, of which a
        container has 64 MB, less than a few batches."""
        rank, count = self.processes.rank, self.processes.count
        mine = self.processes.part(indices)
        half = (len(indices) + 1) // 2  # of the whole batch
        pairs = max(1, len(range(rank, half, count)))
        normal, painted, masks = [], [], []
        for index in mine[:pairs]:
            image, anomalous, mask = self.anomalous(index, self.files[index % len(self.files)])
            normal.append(image)
            painted.append(anomalous)
            masks.append(mask)
        for index in mine[pairs:]:
            normal.append(self.image(self.files[index % len(self.files)])[self.place(index)])
        numbers = np.array(mine[:pairs]) % len(self.files)
        return np.stack(normal + painted), np.float32(masks)[..., None], numbers

    def normal(self) -> Iterator[Tensor]:
        """This process's part of the files x+, each once, as (<= 8, 3, H, W) tensors; the larger, the less of them."""
        batch = at_once(self.shape)
        mine = self.processes.part(self.files)
        for start in counted(range(0, len(mine), batch), "features of images", len(mine), batch):
            yield to_tensor(np.stack([self.image(path) for path in mine[start : start + batch]]))

    def painted(self, count: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """x+ and the x- made from it, both (A, 3, H, W), the masks (A, 1, H, W), and the numbers (A,) of the files,
        until all processes together have had `count` of them; anew in each epoch."""
        batches = self.painted_batches(count / self.processes.count)
        yield from counted(batches, "painting defects", math.ceil(count / self.processes.count), each=8)

    def painted_batches(self, count: float) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """The batches of `painted`, until this process has had `count` of them."""
        while count > 0:
            self.epoch += 1
            for images, masks, numbers in loader(self, batch=16):
                pairs = len(masks)
                before, after = to_tensor(images[:pairs]), to_tensor(images[-pairs:])
                yield before, after, to_tensor(masks), torch.from_numpy(numbers)
                count -= pairs
                if count <= 0:
                    break


def patch_shape(shape: Shape) -> Shape:
    """Of images of this shape: all of it, or as many pixels as PATCH x PATCH where there are more than twice as many,
    no side longer than the image's."""
    if math.prod(shape) <= 2 * PATCH**2:
        return shape
    height, width = min(shape[0], PATCH), min(shape[1], PATCH)
    return min(shape[0], PATCH**2 // width), min(shape[1], PATCH**2 // height)


def within(middle: int, length: int, limit: int) -> slice:
    """So long a part of an axis of `limit` pixels, around the `middle` as far as it goes."""
    start = min(max(0, int(middle) - length // 2), limit - length)
    return slice(start, start + length)


def loader(pairs: Pairs, batch: int) -> DataLoader:
    """Batches of `pairs`, shuffled, painted in the background where processes can be forked; elsewhere each of them
    would have to copy the decoded images."""
    workers = min(4, len(os.sched_getaffinity(0))) if sys.platform == "linux" else 0
    context = "fork" if workers else None
    return DataLoader(
        pairs, batch, shuffle=True, collate_fn=tuple, num_workers=workers, multiprocessing_context=context
    )


def to_tensor(images: np.ndarray) -> Tensor:
    """(B, H, W, C) array -> (B, C, H, W) tensor."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)
