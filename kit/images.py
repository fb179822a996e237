"""One image: decoding, checks, conversion to RGB in [0, 1]; whether it is grey, and where the object is. Arrays are
numpy, (H, W, 3) float32."""

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from scipy import ndimage

from kit import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")  # no others: a PostScript file called .png would start Ghostscript
LEAST_SIDE = 32  # pixels per side
Image.MAX_IMAGE_PIXELS = 200_000_000  # Pillow warns of larger images, and refuses those that are twice as large
# The warning names a line of this program's source, and the user can do nothing about it: such images are read.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

AnyImage = Image.Image | Path | str | np.ndarray | torch.Tensor  # what a user may hand over


def turned(image: Image.Image) -> Image.Image:
    """The image, rotated by its EXIF tag, in which phones store the rotation. Malformed EXIF data, for which Pillow
    raises many kinds of errors, count as no rotation."""
    try:
        upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        return image if upright else ImageOps.exif_transpose(image)
    except Exception:
        return image


def composed(image: Image.Image, background: str = "white") -> Image.Image:
    """RGB, with transparent pixels on this background instead of the hidden colour in the file."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    paper = Image.new("RGBA", image.size, background)
    return Image.alpha_composite(paper, image).convert("RGB")


def values_and_white(image: Image.Image) -> tuple[np.ndarray, float]:
    """Pixel values (H, W, 1 or 3) of a PIL image of any mode, uint8 or float32, and the value of white: 255, 65535 for
    16 bits, or 1 for floats. Values are never stretched to the image's own range. Raises InputError if the value of
    white is ambiguous."""
    if image.mode == "F":
        return checked(np.asarray(image, dtype=np.float32), 1, "floating-point values"), 1
    if image.mode.startswith("I"):  # I;16 and its byte orders, or 32-bit integers
        return checked(np.asarray(image, dtype=np.float32), 65535, "integers"), 65535
    return np.asarray(composed(image)), 255


def in_eight_bits(image: Image.Image, background: str = "white") -> Image.Image:
    """8-bit RGB of a PIL image of any mode, with transparent pixels on this background. Raises InputError for values
    outside their range."""
    if image.mode == "F" or image.mode.startswith("I"):
        values, white = values_and_white(image)
        image = Image.fromarray(np.uint8(255 * values[..., 0] / white))
    return composed(image, background)


def checked(values: np.ndarray, white: float, kind: str) -> np.ndarray:
    """`values` with a last axis of channels. Raises InputError if one is not within 0..white."""
    if not (values.min() >= 0 and values.max() <= white):  # written this way, NaN is refused as well
        found = f"{values.min():g}..{values.max():g}"
        raise InputError(f"{kind} in the range {found}, not 0..{white}; convert them to this range first")
    return np.atleast_3d(values)


def array_and_white(image: np.ndarray | torch.Tensor) -> tuple[np.ndarray, float]:
    """`values_and_white` for an array (H, W), (H, W, 1) or (H, W, 3), or a tensor (1 or 3, H, W)."""
    shape = tuple(image.shape)
    if isinstance(image, torch.Tensor):
        channels = shape[0] if len(shape) == 3 else None
    else:
        channels = shape[2] if len(shape) == 3 else {2: 1}.get(len(shape))
    if channels not in (1, 3) or 0 in shape:
        raise InputError(f"image of shape {shape}: give an array (H, W, 3) or a tensor (3, H, W)")
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu().permute(1, 2, 0)
        image = (image.float() if image.is_floating_point() else image).numpy()  # numpy has no bfloat16
    whites = {"uint8": 255, "uint16": 65535, "float16": 1, "float32": 1, "float64": 1}
    white = whites.get(str(image.dtype))
    if white is None:
        raise InputError(f"image of type {image.dtype}: give uint8 in 0..255, uint16 in 0..65535, or floats in 0..1")
    return checked(image.astype(np.float32), white, "values"), white


def resized(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, C) -> (height, width, C) float32, bilinear with antialiasing. Each channel is resized in float, which
    keeps the low bits of 16-bit files."""
    bands = [Image.fromarray(np.ascontiguousarray(band)).convert("F") for band in values.transpose(2, 0, 1)]
    return np.stack([np.asarray(band.resize((width, height), Image.Resampling.BILINEAR)) for band in bands], axis=-1)


def to_rgb(image: Image.Image | np.ndarray | torch.Tensor, shape: tuple[int, int] | None = None) -> np.ndarray:
    """(H, W, 3) float32 RGB in [0, 1]; a PIL image is rotated by its EXIF tag; resized to `shape` (H, W) if given.

    Raises InputError for sides below 32 pixels, and for values outside their range."""
    if isinstance(image, Image.Image):
        values, white = values_and_white(turned(image))
    else:
        values, white = array_and_white(image)
    height, width, channels = values.shape
    if min(height, width) < LEAST_SIDE:
        raise InputError(f"image of {width}x{height} pixels: too small; give at least {LEAST_SIDE}x{LEAST_SIDE}")
    if shape:
        values = resized(values, *shape)
    values = values.astype(np.float32, copy=False) / white
    return np.repeat(values, 3, axis=-1) if channels == 1 else values


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """(B, H, W, C) array -> (B, C, H, W) tensor."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def load_image(path: Path | str) -> Image.Image:
    """The decoded PIL image of a file. Raises InputError, naming the file, if it cannot be decoded."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.load()
            return image
    except MemoryError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; check the path") from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: is a folder; give an image file") from error
    except Exception as error:  # Pillow raises many kinds of errors for damaged files
        raise InputError(f"{path}: cannot be read as an image ({error}); replace or remove it") from error


def read_image(path: Path | str, shape: tuple[int, int] | None = None) -> np.ndarray:
    """`to_rgb` of an image file. Raises InputError, naming the file, if it cannot be decoded or is refused."""
    return named(path, load_image(path), shape)


def named(path: Path | str, image: Image.Image, shape: tuple[int, int] | None) -> np.ndarray:
    """`to_rgb` of the decoded image of a file. Raises InputError, naming the file."""
    try:
        return to_rgb(image, shape)
    except (InputError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as an image ({error}); replace or remove it") from error


def read_any(image: AnyImage, shape: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int]]:
    """`to_rgb` in this `shape` (H, W), and the original shape, of a path, a PIL image, an array or a tensor. Raises
    InputError for anything else, naming the file if it is one."""
    if not isinstance(image, str | Path | Image.Image | np.ndarray | torch.Tensor):
        raise InputError(f"image of type {type(image).__name__}: give a path, a PIL image, an array or a tensor")
    if isinstance(image, str | Path):
        decoded = load_image(image)  # once, since it is the slow step
        return named(image, decoded, shape), shape_of(decoded)
    return to_rgb(image, shape), shape_of(image)


def shape_of(image: Image.Image | np.ndarray | torch.Tensor) -> tuple[int, int]:
    """(H, W), of a PIL image after its EXIF rotation."""
    if isinstance(image, Image.Image):
        width, height = turned(image).size
        return height, width
    shape = image.shape[-2:] if isinstance(image, torch.Tensor) else image.shape[:2]
    return int(shape[0]), int(shape[1])


# ---------------------------------------------------------------- what is in an image


def is_grey(image: np.ndarray) -> bool:
    """Whether a monochrome camera took this image (H, W, 3). Every fourth pixel along each axis is enough to tell."""
    some = image[::4, ::4]
    return bool(np.abs(some - some[..., :1]).max() < 0.02)


def foreground(image: np.ndarray) -> np.ndarray:
    """Where the object is, (H, W) bool; everywhere if the background is not plain. Otsu's threshold splits the
    distances to the border's median colour. The background is plain if nearly the whole border is close to it."""
    border = np.ones(image.shape[:2], dtype=bool)
    border[8:-8, 8:-8] = False
    distance = np.abs(image - np.median(image[border], axis=0)) @ np.full(3, 1 / 3, dtype=np.float32)
    far = distance > otsu(distance)
    if far[border].mean() > 0.1 or not 0.02 < far.mean() < 0.9:
        return np.ones_like(far)
    return ndimage.binary_fill_holes(far | ndimage.binary_closing(far, iterations=2))


def otsu(values: np.ndarray, bins: int = 64) -> float:
    """Otsu's threshold, which maximises the variance between the two classes of `values`."""
    counts, edges = np.histogram(values, bins=bins)
    share = np.cumsum(counts) / counts.sum()  # of the lower class, for each possible threshold
    mean = np.cumsum(counts * edges[1:]) / counts.sum()
    between = (mean[-1] * share - mean) ** 2 / np.maximum(share * (1 - share), 1e-9)
    return edges[np.argmax(between) + 1]
