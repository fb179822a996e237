"""The good images of a training: the held-out ones and those to train on; batches of x+, the good images, and of x-,
the anomalous images that a given function paints on some of them."""

import io
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage
from torch import Tensor
from torch.utils.data import DataLoader

from kit import data
from kit.detector import Detector
from kit.images import is_grey, read_image, to_tensor
from kit.processes import ALONE, Processes, counted
from kit.quantized import CALIBRATION_IMAGES, is_fast
from kit.settings import UNIT, Shape
from kit.windows import at_once, glibc, part_shape

CACHE_BYTES = 5e8  # of decoded images, on each machine: 560 of 384x384
BLUR = (0.3, 1.2)  # pixels, standard deviation of the Gaussian
NOISE = 0.03  # standard deviation, at most
QUALITY = (40, 95)  # of the JPEG file
SIDE_LIGHT = (0.1, 0.25)  # how much brighter one side is, and how much darker the opposite one
LEAST_COPIES = 64  # camera copies: with fewer good images, there are several of each
PARTS = 2  # of a large image, to choose the scales of int8
PATCH = 512  # side in pixels of the part of a large image that is painted on
WHOLE = (slice(None), slice(None))


@dataclass(frozen=True)
class Defect:
    """The file of an image with a defect, and the file of its mask, if there is one."""

    path: Path
    mask: Path | None


@dataclass(frozen=True)
class GoodImages:
    """The files of a training: good images that calibrate the detector after each epoch, and good images to train on;
    textures as a second source of synthetic defects; real defects, if given. And the processes that share the
    training."""

    held_out: list[Path]
    trained_on: list[Path]
    textures: list[Path] = field(default_factory=list)
    processes: Processes = ALONE
    defects: list[Defect] = field(default_factory=list)


def split(files: list[Path], seed: int) -> tuple[list[Path], list[Path]]:
    """(held out, trained on), at random. A tenth is held out for the calibration: at least eight (of fewer than 32
    images a quarter), at most 1000."""
    count = held_out_count(len(files))
    order = np.random.default_rng(seed).permutation(len(files))
    return [files[i] for i in order[:count]], [files[i] for i in order[count:]]


def quantize_backbone(model: Detector, files: Sequence[Path]) -> None:
    """Let the model's backbone compute in int8 if its settings ask for it and its device is fast at it. Scales and
    biases come from CALIBRATION_IMAGES of these good images at most."""
    wanted = getattr(model.settings, "int8", False)  # only some methods have this option
    if wanted and model.backbone.can_quantize and is_fast(model.device):
        print("the backbone computes in int8 (8-bit integers)")
        some = files[:: math.ceil(len(files) / CALIBRATION_IMAGES)]
        model.backbone.quantize(random_parts(model, some))


def random_parts(model: Detector, files: Sequence[Path]) -> Iterator[Tensor]:
    """Yields these images as (B, 3, H, W) tensors in [0, 1]. Large images would fill the memory: only random parts of
    them are taken, in the region of interest."""
    patch = part_shape(model.shape, PATCH)
    roi = model.roi.cpu().numpy()
    rng = np.random.default_rng(model.settings.seed)
    for images in data.batches(files, model.shape):
        for _ in range(1 if patch == model.shape else PARTS):
            rows, columns = random_place(roi, patch, rng)
            yield images[:, :, rows, columns]


def held_out_count(images: int) -> int:
    tenth = min(1000, round(images / 10))
    return max(1, tenth, min(8, images // 4))


class Painter:
    """Good images x+, and anomalous images x- that a given function paints on them. Like `synth.synthesize`, `paint`
    takes x+, a random generator, another image and the region of interest, and returns x-, its mask and its box.

    The painting of an x- depends only on the seed, the epoch and its number, not on the processes or the order. It lies
    in the model's region of interest. For images with more pixels than two patches, x+ and x- are a random patch;
    `surrounded` adds the area around it that the backbone sees. Decoded images are kept in memory in float16, up to
    CACHE_BYTES; of the others only the last ones."""

    def __init__(self, good: GoodImages, paint: Callable, model: Detector):
        self.files = good.trained_on
        self.textures = good.textures
        self.processes = good.processes
        self.paint = paint
        self.shape = model.shape
        height, width = part_shape(model.shape, PATCH)
        self.patch = height // UNIT * UNIT, width // UNIT * UNIT
        self.reach = model.backbone.reach
        self.roi = model.roi.cpu().numpy()
        self.seed = model.settings.seed
        self.epoch = 0
        bytes_per_image = 2 * 3 * math.prod(self.shape)  # float16
        room = int(CACHE_BYTES / self.processes.local_count / bytes_per_image)
        kept = (self.files + self.textures)[:room]
        # A cached method would refer to this painter, and keep its images until Python looks for such cycles.
        read = partial(read_half, shape=self.shape)
        self.cache = {path: read(path) for path in counted(kept, "reading images", len(kept))}
        self.read_lately = lru_cache(maxsize=2)(read)  # a large image and a texture, say

    def image(self, path: Path, place: tuple[slice, slice] = WHOLE) -> np.ndarray:
        """A file, or the part of it at `place`: (H, W, 3) float32 in [0, 1]."""
        whole = self.cache[path] if path in self.cache else self.read_lately(path)
        return whole[place].astype(np.float32)

    def image_index(self, number: int | np.ndarray) -> int | np.ndarray:
        """The index of the good image that x- with this number is painted on, or that the camera copy with this number
        shows."""
        return number % len(self.files)

    def place(self, number: int, part: int = 0) -> tuple[slice, slice]:
        """Where on its image the patch of x- with this number is: around a random pixel of the region of interest; a
        small image is taken whole. `part` 1 is another patch, as a source of the defect's content."""
        rng = np.random.default_rng([self.seed, self.epoch, number, 1 + part])
        return random_place(self.roi, self.patch, rng)

    def untouched(self, number: int) -> np.ndarray:
        """x+ of this number, (H, W, 3)."""
        return self.image(self.files[self.image_index(number)], self.place(number))

    def pair(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, int, int, int]]:
        """x+ and x- of this number, (H, W, 3), the mask (H, W) of where they differ, and the box around it."""
        rng = np.random.default_rng([self.seed, self.epoch, number])
        path, place = self.files[self.image_index(number)], self.place(number)
        image = self.image(path, place)
        use_texture = self.textures and rng.random() < 0.5
        sources = self.textures if use_texture else self.files
        source = sources[rng.integers(len(sources))]
        if self.patch != self.shape and not use_texture:
            source = path  # decoding another large image takes long
        other = self.image(source, self.place(number, part=1))
        painted, mask, box = self.paint(image, rng, other, self.roi[place])
        return image, painted, mask, box

    def surroundings(self, number: int) -> tuple[slice, slice]:
        """The patch of x- with this number on its image, together with the area around it that the backbone sees."""
        rows, columns = self.place(number)
        return widened(rows, self.reach, self.shape[0]), widened(columns, self.reach, self.shape[1])

    def surrounded(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """x- of this number with its `surroundings`, (H, W, 3), and the mask (H, W) of where it differs from x+.

        A patch alone would teach the wrong thing: features near its edge depend on the padding of convolutions, those
        of good images do not."""
        _, painted, changed, _ = self.pair(number)
        place, around = self.place(number), self.surroundings(number)
        anomalous = self.image(self.files[self.image_index(number)], around).copy()
        patch = tuple(slice(p.start - a.start, p.stop - a.start) for p, a in zip(place, around, strict=True))
        mask = np.zeros(anomalous.shape[:2], dtype=bool)
        anomalous[patch], mask[patch] = painted, changed
        return anomalous, mask

    def normal(self) -> Iterator[Tensor]:
        """This process's part of the files x+, each once, as (<= 8, 3, H, W) tensors; fewer at a time if large."""
        batch = at_once(self.shape)
        mine = self.processes.part(self.files)
        for start in counted(range(0, len(mine), batch), "features of images", len(mine), batch):
            yield to_tensor(np.stack([self.image(path) for path in mine[start : start + batch]]))

    def copy_numbers(self) -> Sequence[int]:
        """The numbers of this process's camera copies: all files have equally many, and in total there are at least
        LEAST_COPIES."""
        times = math.ceil(LEAST_COPIES / len(self.files))
        return self.processes.part(range(times * len(self.files)))

    def copies(self) -> Iterator[Tensor]:
        """This process's camera copies of files x+, as (<= 8, 3, H, W) tensors: what a slightly worse camera would
        see."""
        batch = at_once(self.shape)
        mine = self.copy_numbers()
        batches = loader(mine, self.copied, batch, shuffle=False)
        for images in counted(batches, "features of copies", len(mine), each=batch):
            yield to_tensor(images)

    def copied(self, numbers: list[int]) -> np.ndarray:
        """The camera copies with these numbers: (A, H, W, 3)."""
        paths = [self.files[self.image_index(number)] for number in numbers]
        generators = [np.random.default_rng([self.seed, number]) for number in numbers]
        return np.stack([camera_copy(self.image(path), rng) for path, rng in zip(paths, generators, strict=True)])

    def painted(self, count: int) -> Iterator[tuple[Tensor, Tensor, np.ndarray]]:
        """`surrounded` x- (A, 3, H, W), their masks (A, 1, H, W), and their numbers (A,): this process's part of
        `count` in total, which are spread evenly over the files."""
        order = np.random.default_rng(self.seed).permutation(len(self.files))[:count]
        numbers = []
        for place, file in enumerate(order):  # file by file: a large image is decoded only once
            rounds = math.ceil((count - place) / len(self.files))
            numbers += [file + number * len(self.files) for number in range(rounds)]
        mine = self.processes.part(numbers)
        # Surroundings end where the image ends, so they have different shapes and cannot be stacked.
        batch = at_once(self.shape) if self.patch == self.shape else 1
        batches = loader(mine, self.all_surrounded, batch, shuffle=False)
        for after, masks, numbers in counted(batches, "painting defects", len(mine), each=batch):
            yield to_tensor(after), to_tensor(masks), numbers

    def all_surrounded(self, numbers: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`surrounded` x- (A, H, W, 3) with these numbers, their masks (A, H, W, 1), and the numbers (A,)."""
        after, masks = zip(*(self.surrounded(number) for number in numbers), strict=True)
        return np.stack(after), np.float32(masks)[..., None], np.array(numbers)


def read_half(path: Path, shape: Shape) -> np.ndarray:
    """An image file, resized to this shape: (H, W, 3) float16 in [0, 1]."""
    return read_image(path, shape).astype(np.float16)


def random_place(roi: np.ndarray, patch: Shape, rng: np.random.Generator) -> tuple[slice, slice]:
    """Where a patch of this shape lies on an image: around a random pixel of the region of interest (H, W) bool."""
    row, column = rng.integers(roi.shape)
    if not roi.all():
        row, column = np.unravel_index(rng.choice(np.flatnonzero(roi)), roi.shape)
    return within(row, patch[0], roi.shape[0]), within(column, patch[1], roi.shape[1])


def within(middle: int, length: int, limit: int) -> slice:
    """A part of this `length` of an axis of `limit` pixels, centred at `middle` as far as possible."""
    start = min(max(0, int(middle) - length // 2), limit - length)
    return slice(start, start + length)


def widened(part: slice, reach: int | None, limit: int) -> slice:
    """A part of an axis of `limit` pixels, extended by at least `reach` pixels on both sides within the axis; the whole
    axis if `reach` is None. It starts at a multiple of UNIT, so that features have the same positions as in the whole
    image."""
    if reach is None:
        return slice(0, limit)
    start = max(0, part.start - reach) // UNIT * UNIT
    stop = math.ceil((part.stop + reach) / UNIT) * UNIT
    return slice(start, min(stop, limit))


def loader(numbers: Sequence[int], make: Callable[[list[int]], object], batch: int, shuffle: bool) -> DataLoader:
    """What `make` makes of these numbers, batch by batch, in background processes where these can be forked; elsewhere
    each process would have to copy the decoded images. `make` returns arrays, not tensors: tensors of a loader's worker
    go through shared memory, and a container has only 64 MB of it, less than a few batches."""
    workers = 0
    if sys.platform == "linux":
        workers = min(4, len(os.sched_getaffinity(0)), math.ceil(len(numbers) / batch))  # at most one for each batch
    return DataLoader(
        numbers,
        batch,
        shuffle=shuffle,
        collate_fn=make,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=end_with_parent,
    )


def end_with_parent(worker: int) -> None:
    """Let a loader's worker end when its parent ends, in whatever way. Ctrl-C, which reaches both, is the parent's
    business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    prctl = glibc("prctl")
    if prctl is not None:
        parent_death_signal = 1  # PR_SET_PDEATHSIG of Linux's prctl.h
        prctl(parent_death_signal, signal.SIGKILL)


# ---------------------------------------------------------------- camera copies


def camera_copy(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image as a slightly worse camera would see it: (H, W, 3) -> (H, W, 3).

    A blur in half of the copies, then Gaussian noise of a random strength in all, then JPEG compression in two thirds.
    Grey images stay grey."""
    channels = 1 if is_grey(image) else 3
    copy = image
    if rng.random() < 1 / 2:
        copy = blurred(copy, rng.uniform(*BLUR))
    noise = rng.standard_normal((*image.shape[:2], channels), dtype=np.float32)
    copy = (copy + np.float32(rng.uniform(0, NOISE)) * noise).clip(0, 1)
    if rng.random() < 2 / 3:
        copy = compressed(copy, int(rng.uniform(*QUALITY)))
    return copy


def side_light(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image (H, W, 3) in light from one side, in a random direction. Only the test of a detector uses it: in
    training it lowered the image AUROC."""
    angle, strength = rng.uniform(0, 2 * math.pi), rng.uniform(*SIDE_LIGHT)
    height, width = image.shape[:2]
    down, across = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)[None]
    ramp = math.sin(angle) * down + math.cos(angle) * across
    return np.float32(image * (1 + strength * ramp)[..., None]).clip(0, 1)


def with_camera_copies(paint: Callable) -> Callable:
    """Wraps `paint`, a function of (x+, rng, other image, region) that returns (x-, mask, box): with probability 1/2,
    x- is replaced by a camera copy of it. So noise and blur tell nothing about defects."""

    def painted(image: np.ndarray, rng: np.random.Generator, other: np.ndarray, roi: np.ndarray) -> tuple:
        anomalous, mask, box = paint(image, rng, other, roi)
        if rng.random() < 0.5:
            anomalous = camera_copy(anomalous, rng)
        return anomalous, mask, box

    return painted


def blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    """The image (H, W, 3) after a Gaussian filter; `sigma` in pixels."""
    return ndimage.gaussian_filter(image, (sigma, sigma, 0))


def compressed(image: np.ndarray, quality: int) -> np.ndarray:
    """The image (H, W, 3) after it was written as a JPEG file of this quality (1 to 95) and read again."""
    file = io.BytesIO()
    Image.fromarray(np.uint8(np.round(image * 255))).save(file, "JPEG", quality=quality)
    return np.float32(Image.open(file)) / 255
