"""Large images in overlapping windows, so that the memory of a network does not grow with the image; and what happens
to memory that is freed."""

import ctypes
import math
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from kit.settings import UNIT, Shape

PIXELS = 2**21  # processed at once, of all images of a batch together: two million
STRIP = 2**15  # of a map, that networks on single positions process at once
SIDE = 384  # pixels: for larger images, filter widths and the count of highest pixels are those of this side
CORE = 1024  # maximum side of a window in pixels, without the margin around it


def at_once(shape: Shape, batch: int = 8) -> int:
    """The number of images of this shape that are processed together, at most `batch`."""
    return max(1, min(batch, PIXELS // math.prod(shape)))


def cuts(length: int) -> list[int]:
    """The ends of equal parts of an axis, of at most CORE pixels each. All but the last are multiples of UNIT."""
    count = math.ceil(length / CORE)
    return [round(i * length / count / UNIT) * UNIT for i in range(count)] + [length]


def side_of(pixels: int) -> float:
    """The side of the square with this many pixels, at most SIDE."""
    return min(math.sqrt(pixels), SIDE)


def part_shape(shape: Shape, side: int) -> Shape:
    """The shape of the part of an image that is used at once: the whole image, or the area of side x side if the image
    has more than twice this area. No side is longer than the image's."""
    if math.prod(shape) <= 2 * side**2:
        return shape
    height, width = min(shape[0], side), min(shape[1], side)
    return min(shape[0], side**2 // width), min(shape[1], side**2 // height)


def overlapping_parts(shape: Shape, side: int) -> list[tuple[slice, slice]]:
    """Overlapping parts, all of the same `part_shape`, that cover an image of this shape. The
    starts of neighbouring parts are at most half a part apart."""
    height, width = part_shape(shape, side)
    down, across = starts(shape[0], height), starts(shape[1], width)
    return [(slice(y, y + height), slice(x, x + width)) for y in down for x in across]


def starts(length: int, part: int) -> list[int]:
    """The evenly spaced starts of the parts of an axis."""
    gaps = math.ceil(2 * (length - part) / part)
    return [0] + [round(i * (length - part) / gaps) for i in range(1, gaps + 1)]


def in_windows(
    function: Callable[[Tensor], list[Tensor]], images: Tensor, stride: int, reach: int | None
) -> list[Tensor]:
    """`function` of images (B, 3, H, W): maps (B, ..., h, w) whose positions are `stride` pixels apart and depend on
    pixels up to `reach` away. Large images are processed window by window, each with a margin of `reach`; the results
    for the windows without margins are put together. If `reach` is None, a position depends on the whole image, and it
    is processed at once."""
    height, width = images.shape[2:]
    if height * width <= PIXELS or reach is None:
        return function(images)
    down, across = cuts(height), cuts(width)
    lines = []
    for top, bottom in zip(down, down[1:], strict=False):
        line = []
        for left, right in zip(across, across[1:], strict=False):
            y, x = max(0, top - reach), max(0, left - reach)
            found = function(images[:, :, y : bottom + reach, x : right + reach])
            rows = slice((top - y) // stride, math.ceil((bottom - y) / stride))
            columns = slice((left - x) // stride, math.ceil((right - x) / stride))
            line.append([part[..., rows, columns] for part in found])
        lines.append([torch.cat(parts, dim=-1) for parts in zip(*line, strict=True)])
    return_freed_memory()
    return [torch.cat(parts, dim=-2) for parts in zip(*lines, strict=True)]


def in_strips(function: Callable[[Tensor], list[Tensor]], maps: Tensor) -> list[Tensor]:
    """`function` of maps (B, C, h, w): maps (B, h, w), in which each position depends on itself alone. Large maps are
    processed in horizontal strips. On a CPU each image of a batch is processed by itself: what it needs then fits into
    the cache."""
    is_alone = maps.device.type == "cpu" and not torch.compiler.is_compiling()
    images = []
    for image in maps.split(1) if is_alone else [maps]:
        strips = [function(strip) for strip in image.split(max(1, STRIP // maps.shape[3]), dim=2)]
        images.append([torch.cat(parts, dim=1) for parts in zip(*strips, strict=True)])
    return [torch.cat(parts) for parts in zip(*images, strict=True)]


# ---------------------------------------------------------------- freed memory


def keep_freed_memory() -> None:
    """Let glibc keep the large blocks that tensors free. Getting new ones from the system takes a fifth longer."""
    mallopt = glibc("mallopt")
    if mallopt is None:
        return
    trim_threshold, mmap_max = -1, -4  # names of glibc's malloc.h
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)


def return_freed_memory() -> None:
    """Return kept memory to the system after a large computation: the next one might not fit into the free blocks."""
    malloc_trim = glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def glibc(name: str) -> Callable | None:
    """A function of glibc; None on other systems."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
