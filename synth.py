"""Training images, and synthetic anomalies made from them: normal image -> (anomalous image, mask, box).

The CL-Flow paper says only that its synthesis resembles industrial defects and yields "surrogate annotations".
Perlin masks and blending follow DRAEM (arXiv 2108.07610); thin defects and the foreground are our reconstruction.
All arrays are numpy: images (H, W, 3) float32 RGB in [0, 1], masks (H, W) bool.
"""
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from scipy import ndimage
from torch.utils.data import Dataset

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}


class InputError(Exception):
    """Something only the user can mend; the scripts print it as one line and exit with code 2."""


# ---------------------------------------------------------------- finding and reading images

def list_images(folder: Path | str) -> list[Path]:
    """Image files directly inside `folder`, sorted by name."""
    return sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())


def good_images(data: Path | str) -> list[Path]:
    """Normal training images of a category in MVTec AD (`train/good`) or BTAD (`train/ok`) layout.

    Raises InputError for a missing folder or one without images. Never looks into `test/`.
    """
    data = Path(data)
    if not data.is_dir():
        raise InputError(f"--data {data}: no such folder")
    folder = next((data / "train" / name for name in ("good", "ok") if (data / "train" / name).is_dir()), None)
    if folder is None:
        raise InputError(f"--data {data}: no folder train/good in it; put the normal images there")
    files = list_images(folder)
    if not files:
        raise InputError(f"{folder}: no images in it ({' '.join(sorted(IMAGE_SUFFIXES))})")
    return files


def read_image(path: Path | str, size: int | None = None) -> np.ndarray:
    """Image file as (H, W, 3) float32 RGB in [0, 1], resized to size x size if given.

    16-bit grey maps 0..65535 to 0..1, never stretched per image: a score must not depend on an image's own range.
    Raises InputError, naming the file, if it cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)  # phones store the rotation, not the rotated pixels
            deep = image.mode.startswith("I")  # 16-bit grey
            pixels = np.asarray(image if deep else image.convert("RGB"), dtype=np.float32)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read as an image ({error})") from error
    bands = np.atleast_3d(pixels / (65535 if deep else 255))
    if size:  # in float, so that 12 bits in a 16-bit file survive; Pillow's filter widens when it shrinks
        bands = np.stack([np.asarray(Image.fromarray(band).resize((size, size), Image.Resampling.BILINEAR))
                          for band in np.moveaxis(bands, -1, 0)], axis=-1)
    return np.repeat(bands, 3 // bands.shape[-1], axis=-1).clip(0, 1)


# ---------------------------------------------------------------- masks: where a defect is

def perlin(height: int, width: int, cells: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Perlin noise of `cells` (down, across) lattice cells, turned by a random angle; (height, width), about -1..1.

    Gradients are looked up by coordinate, so any shape and any angle need no padding and no second resampling.
    """
    gradients = rng.uniform(0, 2 * np.pi, (32, 32))
    gradients = np.stack([np.sin(gradients), np.cos(gradients)], axis=-1)
    angle, origin = rng.uniform(-np.pi / 2, np.pi / 2), rng.uniform(0, 32, 2)
    y, x = np.meshgrid(np.arange(height) / height - 0.5, np.arange(width) / width - 0.5, indexing="ij")
    y, x = cells[0] * (y * np.cos(angle) - x * np.sin(angle)) + origin[0], \
        cells[1] * (y * np.sin(angle) + x * np.cos(angle)) + origin[1]
    row, column = np.floor(y).astype(int), np.floor(x).astype(int)
    y, x = y - row, x - column  # place inside the cell, 0..1

    def corner(dy: int, dx: int) -> np.ndarray:  # gradient . distance, for one corner of each cell
        g = gradients[(row + dy) % 32, (column + dx) % 32]
        return g[..., 0] * (y - dy) + g[..., 1] * (x - dx)

    fade_y, fade_x = (t ** 3 * (t * (6 * t - 15) + 10) for t in (y, x))  # quintic: first two derivatives are 0 at 0, 1
    top = corner(0, 0) + fade_x * (corner(0, 1) - corner(0, 0))
    bottom = corner(1, 0) + fade_x * (corner(1, 1) - corner(1, 0))
    return np.sqrt(2) * (top + fade_y * (bottom - top))


def foreground(image: np.ndarray) -> np.ndarray:
    """Where the object is, (H, W) bool; all True unless the image shows an object on a plain background.

    Plain: the border strip is nearly all one colour, by Otsu's threshold on the distance from its median colour.
    """
    strip = max(2, round(0.03 * min(image.shape[:2])))
    border = np.ones(image.shape[:2], dtype=bool)
    border[strip:-strip, strip:-strip] = False
    distance = np.abs(image - np.median(image[border], axis=0)).max(axis=-1)
    counts, edges = np.histogram(distance, bins=64)
    below = np.cumsum(counts)[:-1]
    sums = np.cumsum(counts * (edges[:-1] + edges[1:]) / 2)
    above = below[-1] + counts[-1] - below
    gap = sums[:-1] / np.maximum(below, 1) - (sums[-1] - sums[:-1]) / np.maximum(above, 1)
    far = distance > edges[np.argmax(below * above * gap ** 2) + 1]  # Otsu: the split with most variance between
    plain = far[border].mean() < 0.1 and 0.02 < far.mean() < 0.9
    if not plain:
        return np.ones_like(far)
    far = ndimage.binary_fill_holes(ndimage.binary_closing(far, iterations=2))
    return ndimage.binary_opening(far, iterations=1) if far.mean() > 0.05 else far


def blob_mask(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """DRAEM's mask: Perlin noise with 2^k cells per axis, k in 0..5, above 0.5."""
    cells = 2 ** rng.integers(0, 6, 2)
    return perlin(height, width, tuple(cells), rng) > 0.5


def thin_mask(height: int, width: int, centre: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A scratch (a curved line) or one to three spots at `centre` (y, x): the small defects Perlin noise lacks."""
    image = Image.new("1", (width, height))
    draw, unit = ImageDraw.Draw(image), min(height, width) / 256
    y, x = centre
    if rng.random() < 0.5:
        angle, bend = rng.uniform(0, 2 * np.pi), rng.normal(0, 0.15)
        step, points = rng.uniform(1.5, 8) * unit, [(x, y)]
        for _ in range(10):
            angle += bend + rng.normal(0, 0.1)
            points.append((points[-1][0] + step * np.cos(angle), points[-1][1] + step * np.sin(angle)))
        draw.line(points, fill=1, width=max(1, round(rng.uniform(1, 4) * unit)), joint="curve")
        return np.asarray(image)
    for _ in range(rng.integers(1, 4)):
        ry, rx = rng.uniform(1.5, 7, 2) * unit
        draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=1)
        y, x = centre + rng.normal(0, 10 * unit, 2)
    return np.asarray(image)


# ---------------------------------------------------------------- sources: what a defect looks like

def augment(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Flips, quarter turns, and a change of gain, tint and contrast; same shape."""
    if rng.random() < 0.5:
        image = image[:, ::-1]
    turned = np.rot90(image, rng.integers(4) if image.shape[0] == image.shape[1] else 2 * rng.integers(2))
    mean = turned.mean(axis=(0, 1))
    out = mean + (turned - mean) * rng.uniform(0.6, 1.6) + rng.normal(0, 0.12) + rng.normal(0, 0.04, 3)
    return out.clip(0, 1).astype(np.float32)


def shuffle_tiles(image: np.ndarray, rng: np.random.Generator, grid: int = 8) -> np.ndarray:
    """The image cut into grid x grid tiles in random order (structural source; the remainder stays in place)."""
    th, tw, out = image.shape[0] // grid, image.shape[1] // grid, image.copy()
    tiles = image[:th * grid, :tw * grid].reshape(grid, th, grid, tw, 3).swapaxes(1, 2).reshape(-1, th, tw, 3)
    tiles = rng.permutation(tiles).reshape(grid, grid, th, tw, 3).swapaxes(1, 2)
    out[:th * grid, :tw * grid] = tiles.reshape(th * grid, tw * grid, 3)
    return out


def defect_source(image: np.ndarray, other: np.ndarray, texture: np.ndarray | None,
                  rng: np.random.Generator) -> np.ndarray:
    """What fills the mask: a texture or shuffled normal image, a change of tone, or the image's own content displaced."""
    kind = rng.choice(["pattern", "tone", "displaced"])
    if kind == "pattern":
        use_texture = texture is not None and rng.random() < 0.7
        return augment(texture, rng) if use_texture else shuffle_tiles(augment(other, rng), rng)
    if kind == "tone":  # stains, scratches, dents: darker or lighter, slightly tinted, some grain
        shade = rng.choice([-1, 1]) * rng.uniform(0.1, 0.5) + rng.normal(0, 0.05, 3)
        grain = rng.normal(0, rng.uniform(0, 0.05), image.shape[:2] + (1,))
        return (image * rng.uniform(0.4, 1) + shade + grain).clip(0, 1)
    reach = np.array(image.shape[:2]) / 16
    dy, dx = np.round(rng.uniform(0.3, 1, 2) * rng.choice([-1, 1], 2) * reach).astype(int)
    return np.roll(image, (dy, dx), axis=(0, 1))


# ---------------------------------------------------------------- the synthesizer

def synthesize(image: np.ndarray, rng: np.random.Generator, other: np.ndarray | None = None,
               texture: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, tuple[int, int, int, int]]:
    """Paint one synthetic defect: x- = (1 - aM) x+ + aM source, with opacity a, inside the mask M only.

    `image`, `other` (a second normal image), `texture`: (H, W, 3) float32 in [0, 1], same shape; blended before any
    normalisation. Returns (anomalous image, mask (H, W) bool, box (y0, x0, y1, x1) half-open). The mask is never
    empty, lies on the object where the background is plain, and the pixels outside it are untouched.
    """
    height, width = image.shape[:2]
    where = foreground(image)
    places = np.argwhere(where)
    for attempt in range(20):
        if rng.random() < 0.4:
            mask = blob_mask(height, width, rng) & where
        else:
            mask = thin_mask(height, width, places[rng.integers(len(places))], rng) & where
        if not mask.any() or mask.mean() > 0.3:
            continue
        source = defect_source(image, image if other is None else other, texture, rng)
        # a soft rim, inside the mask: cut-out edges are what real defects lack and detectors learn first
        alpha = np.minimum(ndimage.gaussian_filter(mask.astype(np.float32), rng.uniform(0.3, 1.5)) * 2, 1) * mask
        alpha *= rng.uniform(0.5, 1)
        anomalous = (image + alpha[..., None] * (source - image)).astype(np.float32)
        if np.abs(anomalous - image).max(axis=-1)[mask].mean() > 0.03:  # else nobody could see it
            break
    else:  # no visible defect in 20 draws (an all-black image, say): invert a patch around one place
        y, x = places[len(places) // 2]
        mask = np.zeros((height, width), dtype=bool)
        mask[max(0, y - 3):y + 4, max(0, x - 3):x + 4] = True
        anomalous = np.where(mask[..., None], np.where(image > 0.5, 0, 1), image).astype(np.float32)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return anomalous, mask, (int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1)
