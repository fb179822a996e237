"""Synthetic defects, painted on good images: x+ -> (x-, mask, box). To look at some: python synth.py FOLDER

Perlin masks and blending follow DRAEM (arXiv 2108.07610); thin defects and sources are our own reconstruction.
All arrays are numpy: images (H, W, 3) float32 RGB in [0, 1], masks (H, W) bool."""

import math
from functools import partial

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from kit.command_line import run_script
from kit.images import foreground, is_grey
from kit.windows import side_of

LATTICE = 64  # gradients per side; beyond them the lattice repeats
MARGIN = 6  # radius in pixels of the filter that softens a mask's edge


def synthesize(
    image: np.ndarray,
    rng: np.random.Generator,
    other: np.ndarray | None = None,
    roi: np.ndarray | None = None,
    defects: int = 1,
) -> tuple[np.ndarray, np.ndarray, tuple[int, int, int, int]]:
    """Paint `defects` synthetic defects: x- = x+ + alpha M (source - x+), blended in [0, 1], before any normalisation.

    Their sizes are in proportion to sqrt(H W); a value above 384 counts as 384. So a strip gets defects as large as
    those of a square with the same number of pixels, and images above 384 x 384 do not get larger ones. `image` and
    `other` (a texture or second good image; default: the image itself) are (H, W, 3). Defects lie on the foreground
    (see `kit.images.foreground`) and inside the region of interest `roi` (H, W) bool, if it is given. If the region has
    no foreground, they lie anywhere in it. Returns (anomalous image, mask (H, W) bool, half-open box (y0, x0, y1, x1)).
    The mask is never empty, and pixels outside it are unchanged."""
    if other is None:
        other = image
    where = foreground(image)
    if roi is not None:
        inside = where & roi
        where = inside if inside.any() else roi
    anomalous, touched = image, np.zeros(image.shape[:2], dtype=bool)
    for _ in range(defects):
        anomalous, mask = with_defect(anomalous, rng, other, where)
        touched |= mask
    return anomalous, touched, bounding_box(touched)


def with_defect(
    image: np.ndarray, rng: np.random.Generator, other: np.ndarray, where: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Paint one defect inside `where` (H, W) bool. Returns the new image and the mask."""
    is_visible = False
    while not is_visible:  # a change of tone makes sure that this ends
        mask = where & defect_mask(where, rng)
        if not 0 < mask.mean() < 0.3:
            continue
        part = around(mask)  # the rest of the image does not change
        alpha = opacity(mask[part], rng)
        change = alpha[..., None] * (source(image, other, part, rng) - image[part])
        is_visible = np.abs(change[mask[part]]).mean() > 0.03
    painted = image.copy()
    painted[part] = (image[part] + change).clip(0, 1)
    return painted, mask


def around(mask: np.ndarray) -> tuple[slice, slice]:
    """The part of an image around a mask (H, W) bool, with the margin that `opacity` needs."""
    y0, x0, y1, x1 = bounding_box(mask)
    height, width = mask.shape
    rows = slice(max(0, y0 - MARGIN), min(height, y1 + MARGIN))
    columns = slice(max(0, x0 - MARGIN), min(width, x1 + MARGIN))
    return rows, columns


# ---------------------------------------------------------------- where the defect is


def defect_mask(where: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random shape, (H, W) bool: Perlin noise above 0.5 as in DRAEM, or a scratch or spots that start in `where`."""
    height, width = where.shape
    if rng.random() < 0.4:
        cells = 2 ** rng.integers(0, 6, 2)  # 1 to 32 along each axis of a square
        down, across = cells * where.shape / side_of(height * width)
        return perlin(height, width, (float(down), float(across)), rng) > 0.5
    candidates = np.argwhere(where)
    return thin_mask(height, width, candidates[rng.integers(len(candidates))], rng)


def perlin(height: int, width: int, cells: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """Perlin noise (height, width), about -1..1, with `cells` (down, across) lattice cells, rotated by U(-90, 90)
    degrees.

    Each corner of a cell has a random gradient. A corner's noise is this gradient times the offset from the corner;
    inside a cell the noise of its corners is blended."""
    phase = rng.uniform(0, 2 * np.pi, (LATTICE, LATTICE))
    phase = np.pad(phase, (0, 1), mode="wrap").flatten()  # the last cell's far corner wraps around
    down_gradient, across_gradient = np.float32(np.sin(phase)), np.float32(np.cos(phase))
    angle = rng.uniform(-math.pi / 2, math.pi / 2)
    # Both axes have the same unit; otherwise the rotation would shear the cells of a strip.
    tall, wide = height / math.sqrt(height * width), width / math.sqrt(height * width)
    lines, columns = np.arange(height, dtype=np.float32), np.arange(width, dtype=np.float32)
    v, u = np.meshgrid(tall * (lines / height - 0.5), wide * (columns / width - 0.5), indexing="ij")
    y = cells[0] / tall * (v * math.cos(angle) - u * math.sin(angle)) + rng.uniform(0, LATTICE)
    x = cells[1] / wide * (v * math.sin(angle) + u * math.cos(angle)) + rng.uniform(0, LATTICE)
    row, column = np.floor(y).astype(np.int32) % LATTICE, np.floor(x).astype(np.int32) % LATTICE
    cell = row * (LATTICE + 1) + column  # one index is looked up faster than two
    y, x = y % 1, x % 1  # position inside the cell

    def corner(down: int, across: int) -> np.ndarray:
        number = cell + (down * (LATTICE + 1) + across)
        return down_gradient[number] * (y - down) + across_gradient[number] * (x - across)

    top = blend(corner(0, 0), corner(0, 1), fade(x))
    bottom = blend(corner(1, 0), corner(1, 1), fade(x))
    return math.sqrt(2) * blend(top, bottom, fade(y))


def fade(t: np.ndarray) -> np.ndarray:
    """Perlin's quintic, 0..1 -> 0..1: flat to second order at both ends, so that cell borders are invisible."""
    return t**3 * (t * (6 * t - 15) + 10)


def blend(a: np.ndarray, b: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Linear interpolation from a (share 0) to b (share 1)."""
    return a + share * (b - a)


def thin_mask(height: int, width: int, first: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A scratch (a curved chain of dots) or up to three spots. The first dot or spot is at `first` (y, x)."""
    is_scratch = rng.random() < 0.5
    count = rng.integers(10, 40) if is_scratch else rng.integers(1, 4)
    step = 2 if is_scratch else 10  # all lengths are for an image of 256 x 256
    wobble = 0.05 if is_scratch else 2
    radii = rng.uniform(0.5, 2, (1, 2)).repeat(count, 0) if is_scratch else rng.uniform(1.5, 7, (count, 2))
    angle = rng.uniform(0, 2 * np.pi)
    bend = rng.normal(0, 0.03)
    directions = angle + np.cumsum(rng.normal(bend, wobble, count))
    points = np.cumsum(step * np.stack([np.cos(directions), np.sin(directions)], axis=1), axis=0)
    unit = side_of(height * width) / 256
    image = Image.new("1", (width, height))
    pen = ImageDraw.Draw(image)
    for point, radius in zip(points - points[0], radii, strict=True):
        x, y = point * unit + first[::-1]  # points are (x, y), as in drawing; `first` is (y, x), as in arrays
        dx, dy = radius * unit
        pen.ellipse((x - dx, y - dy, x + dx, y + dy), fill=1)
    return np.asarray(image)


def opacity(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """alpha M, (H, W) in 0..1. It rises gradually from the mask's edge inwards. With sharp edges, a detector
    would learn the edges instead of the defects."""
    soft = 2 * ndimage.gaussian_filter(mask.astype(np.float32), rng.uniform(0.3, 1.5))
    return np.minimum(soft, 1) * mask * rng.uniform(0.5, 1)


def bounding_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """(y0, x0, y1, x1), half-open, of a non-empty mask (H, W) bool."""
    rows = np.flatnonzero(mask.any(axis=1))
    columns = np.flatnonzero(mask.any(axis=0))
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


# ---------------------------------------------------------------- what the defect looks like


def source(image: np.ndarray, other: np.ndarray, part: tuple[slice, slice], rng: np.random.Generator) -> np.ndarray:
    """The content that fills the mask, in this part of the image: `other` (a texture or a good image) with its tiles
    shuffled, or `image` with its tone changed, or `image` displaced: (h, w, 3), or (h, w, 1) for grey images."""
    kind = rng.integers(3)
    if kind == 0:
        filling = shuffled(other, part, rng)
    elif kind == 1:
        filling = toned(image[part], rng)
    else:
        filling = displaced(image, rng)[part]
    if is_grey(image):  # a monochrome camera sees no coloured defects
        return filling.mean(axis=-1, keepdims=True)
    return filling


def shuffled(image: np.ndarray, part: tuple[slice, slice], rng: np.random.Generator, grid: int = 8) -> np.ndarray:
    """The tiles of an image (`grid` x `grid` in a square) in random order, with random contrast, brightness and tint.
    Returns this part of the result."""
    gain = rng.uniform(0.6, 1.6)
    shift = np.float32(rng.normal(0, 0.12) + rng.normal(0, 0.04, 3))
    height, width = image.shape[:2]
    side = math.ceil(side_of(height * width) / grid)
    down, across = math.ceil(height / side), math.ceil(width / side)
    y, x = np.ogrid[part]
    order = rng.permutation(down * across)
    tile = order[y // side * across + x // side]  # for each pixel, the tile that it comes from
    from_y = tile // across * side + y % side
    from_x = tile % across * side + x % side
    tiles = image[np.minimum(from_y, height - 1), np.minimum(from_x, width - 1)]
    mean = image.mean(axis=(0, 1))
    return (mean + (tiles - mean) * gain + shift).clip(0, 1)


def toned(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For stains, scratches and dents: darker or lighter, slightly tinted, with some grain."""
    shade = np.float32(rng.choice([-1, 1]) * rng.uniform(0.1, 0.5) + rng.normal(0, 0.05, 3))
    grain = np.float32(rng.normal(0, rng.uniform(0, 0.05), (*image.shape[:2], 1)))
    return (image * rng.uniform(0.4, 1) + shade + grain).clip(0, 1)


def displaced(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image itself, shifted by 2 to 6 % of a square's side along both axes."""
    reach = rng.choice([-1, 1], 2) * rng.uniform(0.02, 0.06, 2) * side_of(math.prod(image.shape[:2]))
    return np.roll(image, np.round(reach).astype(int), axis=(0, 1))


if __name__ == "__main__":
    from kit.demo import draw_sheet  # here: nothing else needs it

    run_script(partial(draw_sheet, synthesize))
