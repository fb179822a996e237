"""What --size takes: 384, as many pixels as 384 x 384; "native", as many as the images have; or a shape outright,
(height, width) in pixels. No PyTorch here: the command line is read with it."""

import argparse
import math

from kit.errors import InputError

Shape = tuple[int, int]
Size = int | str | Shape

NATIVE = "native"
UNIT = 32  # pixels: sides are multiples of it, so that every layer of a backbone halves them evenly
SIDES = (64, 4096)  # of a square size
LONGEST = 32768  # side of a shape


def parsed_size(text: str) -> Size:
    """What stands behind --size: "384", "native", or "256x1024", height first. Raises argparse's error for anything
    else."""
    try:
        if text == NATIVE:
            return NATIVE
        sides = [int(part) for part in text.split("x")]
    except ValueError:
        sides = []
    if len(sides) == 1:
        return sides[0]
    if len(sides) == 2:
        return sides[0], sides[1]
    raise argparse.ArgumentTypeError(f"{text}: give a number, HEIGHTxWIDTH in pixels, or {NATIVE}")


def check_size(size: Size) -> None:
    """Raises InputError if a size is out of range."""
    if isinstance(size, int):
        if not SIDES[0] <= size <= SIDES[1]:
            raise InputError(f"--size {size}: out of range, give {SIDES[0]} to {SIDES[1]}, or HEIGHTxWIDTH")
    elif size != NATIVE:
        for side in size:
            if side % UNIT or not UNIT <= side <= LONGEST:
                raise InputError(f"--size {as_text(size)}: {side} is not a multiple of {UNIT} in {UNIT}..{LONGEST}")
        if math.prod(size) < SIDES[0] ** 2:
            raise InputError(f"--size {as_text(size)}: has less pixels than {SIDES[0]}x{SIDES[0]}; give more")


def as_shape(size: int | Shape) -> Shape:
    """A number stands for a square."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def part_shape(shape: Shape, side: int) -> Shape:
    """What to look at of images of this shape at once: all of it, or as many pixels as side x side where there are more
    than twice as many, no side longer than the image's."""
    if math.prod(shape) <= 2 * side**2:
        return shape
    height, width = min(shape[0], side), min(shape[1], side)
    return min(shape[0], side**2 // width), min(shape[1], side**2 // height)


def as_text(size: Size) -> str:
    """As --size takes it."""
    return f"{size[0]}x{size[1]}" if isinstance(size, tuple) else str(size)
