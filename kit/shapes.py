"""The shape in which images are judged: the aspect ratio of the good images, with the area that --size gives.

A shape is (height, width), in pixels. --size takes a number (384: the area of 384 x 384), "native" (the area of the
images), or a shape. No PyTorch here: the command line is read with this file."""

import argparse
import contextlib
import math
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin

from kit import InputError
from kit.settings import UNIT, Shape

Size = int | str | Shape

NATIVE = "native"
SIDES = (64, 4096)  # of a square size
LONGEST = 32768  # side of a shape
ASKED = 100  # images at most, to find the usual shape
OTHER = 1.1  # ratio of two aspect ratios, above which the shapes are different
SPOT = 20  # pixels of the example defect in `told`
PNG_EXIF = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # where a PNG file may have a rotation


# ---------------------------------------------------------------- --size


def parsed_size(text: str) -> Size:
    """The value of --size: "384", "native", or "256x1024", height first. Raises argparse's error for anything else."""
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
            raise InputError(f"--size {size}: out of range; give {SIDES[0]} to {SIDES[1]}, or HEIGHTxWIDTH")
    elif size != NATIVE:
        for side in size:
            if side % UNIT or not UNIT <= side <= LONGEST:
                raise InputError(
                    f"--size {size_text(size)}: {side} is not possible; give sides that are multiples of {UNIT}, from "
                    f"{UNIT} to {LONGEST}"
                )
        if math.prod(size) < SIDES[0] ** 2:
            raise InputError(
                f"--size {size_text(size)}: has fewer pixels than {SIDES[0]}x{SIDES[0]}; give longer sides"
            )


def size_text(size: Size) -> str:
    """A size in the form that --size takes."""
    return f"{size[0]}x{size[1]}" if isinstance(size, tuple) else str(size)


# ---------------------------------------------------------------- the shape of the images


def shape_in_file(path: Path) -> tuple[int, int] | None:
    """(H, W) of an image file after its EXIF rotation, without decoding it; None if it cannot be read."""
    from kit.images import FORMATS  # imported here, since it imports PyTorch

    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if image.format == "TIFF":  # its `size` is the rotated one in newer versions of Pillow
                width, height = image.tag_v2[TiffImagePlugin.IMAGEWIDTH], image.tag_v2[TiffImagePlugin.IMAGELENGTH]
            is_turned = False
            if may_be_turned(path, image):
                with contextlib.suppress(Exception):  # see `kit.images.turned`
                    is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # by 90 degrees
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    return (width, height) if is_turned else (height, width)


def may_be_turned(path: Path, image: Image.Image) -> bool:
    """Whether an image file may have an EXIF rotation. To look for one behind the pixels, Pillow would decode the whole
    PNG file."""
    return image.format != "PNG" or any(mark in path.read_bytes() for mark in PNG_EXIF)


def usual_shape(files: list[Path]) -> Shape | None:
    """The median shape of a sample of images; None if none can be read."""
    asked = files[:: math.ceil(len(files) / ASKED)]
    shapes = [shape for path in asked if (shape := shape_in_file(path))]
    if not shapes:
        return None
    height, width = np.median(shapes, axis=0).round().astype(int).tolist()
    return height, width


def input_size(size: Size, files: list[Path]) -> int | Shape:
    """The size in which images like `files` are judged: `size` itself if it is a shape; else their aspect ratio, with
    the area of the square or, for "native", their own. Sides are multiples of 32; a square is a single number."""
    if isinstance(size, tuple):
        return size
    height, width = usual_shape(files) or (1, 1)
    side = math.sqrt(height * width) if size == NATIVE else size
    stretch = math.sqrt(height / width)
    shape = (whole_units(side * stretch), whole_units(side / stretch))
    if math.prod(shape) < SIDES[0] ** 2 or max(shape) > LONGEST:
        raise InputError(
            f"--size {size_text(size)}: would resize these images to {size_text(shape)}, which has too few pixels or "
            "too long a side; give HEIGHTxWIDTH"
        )
    return shape[0] if shape[0] == shape[1] else shape


def whole_units(side: float) -> int:
    return max(UNIT, round(side / UNIT) * UNIT)


def told(files: list[Path], shape: Shape) -> str:
    """One line that says how images like `files` are resized to `shape`, and which --size would keep them in full
    resolution; "" if they already have it."""
    usual = usual_shape(files)
    if usual is None:
        return ""
    if all(abs(side - judged_side) <= UNIT / 2 for side, judged_side in zip(usual, shape, strict=True)):
        return ""  # only rounded to multiples of UNIT, as with --size native
    shrinks = math.sqrt(math.prod(shape) / math.prod(usual))
    change = "shrinks" if shrinks < 1 else "grows"
    line = (
        f"images of {usual[1]} x {usual[0]} pixels are judged at {shape[1]} x {shape[0]}: "
        f"a {SPOT}-pixel defect {change} to {SPOT * shrinks:.0f} pixels"
    )
    if shrinks < 1 and max(usual) <= LONGEST:
        line += f"; use --size {size_text(input_size(NATIVE, files))} for full resolution"
    return line


def is_other(shape: Shape, judged_in: Shape) -> bool:
    """Whether the aspect ratios of an image and of the shape in which it is judged differ by more than a tenth."""
    stretch = (shape[0] / shape[1]) / (judged_in[0] / judged_in[1])
    return max(stretch, 1 / stretch) > OTHER


def others_told(others: dict[str, Shape], images: int, judged_in: Shape) -> str:
    """One line on the images, by name, that have another aspect ratio than the shape in which they are judged."""
    name, (height, width) = next(iter(others.items()))
    return (
        f"{len(others)} of {images} images have another aspect ratio than {judged_in[1]} x {judged_in[0]}, for example "
        f"{name} ({width} x {height}): they will be stretched to this shape"
    )


def print_others(files: list[Path], judged_in: Shape) -> None:
    """Print `others_told`, if some of the files have another aspect ratio."""
    shapes = {path.as_posix(): shape_in_file(path) for path in files}
    if others := {name: shape for name, shape in shapes.items() if shape and is_other(shape, judged_in)}:
        print(others_told(others, len(files), judged_in))
