"""Normal images, and synthetic anomalies made from them: x+ -> (x-, mask, box).

Perlin masks and blending follow DRAEM (arXiv 2108.07610); thin defects, sources and foreground are our reconstruction.
All arrays are numpy: images (H, W, 3) float32 RGB in [0, 1], masks (H, W) bool."""
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from scipy import ndimage

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


class InputError(Exception):
    """Something only the user can mend; the scripts print it as one line and exit with code 2."""


def list_images(folder: Path, pattern: str = "*") -> list[Path]:
    """Image files in `folder`, sorted by path; none if there is no such folder. "**/*" looks into subfolders too."""
    return sorted(p for p in folder.glob(pattern) if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())


def good_images(data: Path) -> list[Path]:
    """Normal images in `train/good` (MVTec AD), `train/ok` (BTAD), or `data` itself. Never opens `test/`."""
    if not data.is_dir():
        raise InputError(f"--data {data}: no such folder")
    for folder in (data / "train" / "good", data / "train" / "ok", data):
        if files := list_images(folder):
            return files
    raise InputError(f"--data {data}: no images there, nor in train/good; put normal ones ({' '.join(IMAGE_SUFFIXES)})")


def to_array(image: Image.Image, size: int | None = None) -> np.ndarray:
    """PIL image of any mode as (H, W, 3) float32 RGB in [0, 1], turned by its EXIF tag, resized to size x size if
    given. 16-bit grey maps 0..65535 to 0..1, never stretched to the image's own range. InputError below 32 pixels."""
    if min(image.size) < 32:
        raise InputError(f"an image of {image.width}x{image.height} pixels is too small, 32x32 is the least")
    image = ImageOps.exif_transpose(image)  # phones store the rotation, not the rotated pixels
    deep = image.mode.startswith("I")
    pixels = np.atleast_3d(np.asarray(image if deep else image.convert("RGB"), dtype=np.float32))
    if size:  # band by band in float, so that the low bits of 16-bit files survive; the filter widens as it shrinks
        bands = [Image.fromarray(band) for band in pixels.transpose(2, 0, 1)]
        pixels = np.stack([band.resize((size, size), Image.Resampling.BILINEAR) for band in bands], axis=-1)
    return np.repeat(pixels / (65535 if deep else 255), 3 // pixels.shape[-1], axis=-1)


def read_image(path: Path | str, size: int | None = None) -> np.ndarray:
    """`to_array` of an image file. Raises InputError, naming the file, if it cannot be decoded or is too small."""
    try:
        with Image.open(path) as image:
            return to_array(image, size)
    except (OSError, SyntaxError, ValueError, InputError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read as an image ({error})") from error


def perlin(height: int, width: int, cells: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Perlin noise, (height, width), about -1..1: `cells` (down, across) lattice cells, turned by U(-90, 90) degrees.
    Gradients are looked up by coordinate, so that any shape and angle need neither padding nor resampling."""
    phase = rng.uniform(0, 2 * np.pi, (64, 64))
    gradients, angle = np.stack([np.sin(phase), np.cos(phase)], axis=-1), rng.uniform(-np.pi / 2, np.pi / 2)
    v, u = np.meshgrid(np.arange(height) / height - 0.5, np.arange(width) / width - 0.5, indexing="ij")
    y = cells[0] * (v * np.cos(angle) - u * np.sin(angle)) + rng.uniform(0, 64)
    x = cells[1] * (v * np.sin(angle) + u * np.cos(angle)) + rng.uniform(0, 64)
    row, column = np.floor(y).astype(int), np.floor(x).astype(int)
    y, x = y - row, x - column  # place inside the cell, 0..1

    def corner(dy: int, dx: int) -> np.ndarray:
        gradient = gradients[(row + dy) % 64, (column + dx) % 64]
        return gradient[..., 0] * (y - dy) + gradient[..., 1] * (x - dx)

    fade_y, fade_x = (t ** 3 * (t * (6 * t - 15) + 10) for t in (y, x))  # flat to second order at the cell's borders
    top = corner(0, 0) + fade_x * (corner(0, 1) - corner(0, 0))
    bottom = corner(1, 0) + fade_x * (corner(1, 1) - corner(1, 0))
    return np.sqrt(2) * (top + fade_y * (bottom - top))


def foreground(image: np.ndarray) -> np.ndarray:
    """Where the object is, (H, W) bool; everywhere, unless it lies on a plain background. Otsu's threshold splits the
    distances from the border's median colour; the background is plain if nearly the whole border is near it."""
    border = np.pad(np.zeros(np.subtract(image.shape[:2], 16), dtype=bool), 8, constant_values=True)
    distance = np.abs(image - np.median(image[border], axis=0)) @ np.full(3, 1 / 3)
    counts, edges = np.histogram(distance, bins=64)
    share, mean = np.cumsum(counts) / counts.sum(), np.cumsum(counts * edges[1:]) / counts.sum()
    between = (mean[-1] * share - mean) ** 2 / np.maximum(share * (1 - share), 1e-9)  # Otsu: variance between classes
    far = distance > edges[np.argmax(between) + 1]
    if far[border].mean() > 0.1 or not 0.02 < far.mean() < 0.9:
        return np.ones_like(far)
    return ndimage.binary_fill_holes(far | ndimage.binary_closing(far, iterations=2))


def thin_mask(height: int, width: int, centre: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A scratch (a curved chain of dots) or up to three spots from `centre` (y, x) on: what Perlin noise lacks."""
    scratch, image = rng.random() < 0.5, Image.new("1", (width, height))
    count, step = (rng.integers(10, 40), 2) if scratch else (rng.integers(1, 4), 10)  # lengths for 256 pixels
    radii = rng.uniform(0.5, 2, (1, 2)).repeat(count, 0) if scratch else rng.uniform(1.5, 7, (count, 2))
    turns = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(rng.normal(0, 0.03), 0.05 if scratch else 2, count))
    points = np.cumsum(step * np.stack([np.cos(turns), np.sin(turns)], axis=1), axis=0)
    unit, draw = min(height, width) / 256, ImageDraw.Draw(image)
    for point, radius in zip(points - points[0], radii, strict=True):
        point, radius = point * unit + centre[::-1], radius * unit
        draw.ellipse((*(point - radius), *(point + radius)), fill=1)
    return np.asarray(image)


def shuffled(image: np.ndarray, rng: np.random.Generator, grid: int = 8) -> np.ndarray:
    """Structural source: another gain, contrast and tint, then the grid x grid tiles in another order."""
    mean, gain = image.mean(axis=(0, 1)), rng.uniform(0.6, 1.6)
    image = (mean + (image - mean) * gain + rng.normal(0, 0.12) + rng.normal(0, 0.04, 3)).clip(0, 1)
    height, width = image.shape[:2]
    (y, x), down, across = np.mgrid[:height, :width], -(-height // grid), -(-width // grid)
    tile = rng.permutation(grid * grid)[y // down * grid + x // across]
    return image[np.minimum(tile // grid * down + y % down, height - 1),
                 np.minimum(tile % grid * across + x % across, width - 1)]


def source(image: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What fills the mask: `other` (a texture or a normal image) shuffled, a change of tone, or displaced content."""
    kind = rng.integers(3)
    if kind == 0:
        filling = shuffled(other, rng)
    elif kind == 1:  # stains, scratches, dents: darker or lighter, slightly tinted, some grain
        shade = rng.choice([-1, 1]) * rng.uniform(0.1, 0.5) + rng.normal(0, 0.05, 3)
        grain = rng.normal(0, rng.uniform(0, 0.05), (*image.shape[:2], 1))
        filling = (image * rng.uniform(0.4, 1) + shade + grain).clip(0, 1)
    else:
        reach = rng.choice([-1, 1], 2) * rng.uniform(0.02, 0.06, 2) * image.shape[:2]
        filling = np.roll(image, np.round(reach).astype(int), axis=(0, 1))
    grey = np.abs(image - image[..., :1]).max() < 0.02  # a camera without colour sees no coloured defects either
    return filling.mean(axis=-1, keepdims=True) if grey else filling


def synthesize(image: np.ndarray, rng: np.random.Generator,
               other: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, tuple[int, int, int, int]]:
    """Paint one synthetic defect: x- = x+ + alpha M (source - x+), blended in [0, 1], before any normalisation.

    image, other (texture or second normal image; default: the image itself): (H, W, 3) of one shape. Returns (anomalous
    image, mask (H, W) bool, box (y0, x0, y1, x1), half-open). The mask is not empty; outside it nothing changes."""
    (height, width), where = image.shape[:2], foreground(image)
    while True:  # until the defect exists and can be seen; a change of tone always can, sooner or later
        if rng.random() < 0.4:  # DRAEM's mask: 2^k cells per axis, k in 0..5
            mask = where & (perlin(height, width, tuple(2 ** rng.integers(0, 6, 2)), rng) > 0.5)
        else:
            mask = where & thin_mask(height, width, np.argwhere(where)[rng.integers(where.sum())], rng)
        if not 0 < mask.mean() < 0.3:
            continue
        # Opacity rises from the mask's rim inwards: sharp cut-outs are what a detector would learn instead of defects.
        soft = np.minimum(2 * ndimage.gaussian_filter(mask.astype(np.float32), rng.uniform(0.3, 1.5)), 1)
        alpha = soft * mask * rng.uniform(0.5, 1)
        change = alpha[..., None] * (source(image, image if other is None else other, rng) - image)
        if np.abs(change[mask]).mean() > 0.03:
            break
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1
    return (image + change).clip(0, 1).astype(np.float32), mask, box
