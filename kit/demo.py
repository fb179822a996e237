"""The demo: photographs of buttons, drawn, some with defects. Nothing is shared with synth.py: the demo would else
test nothing but what the detector was trained on."""

from pathlib import Path

import numpy as np
from PIL import Image

from kit.draw import save_picture
from kit.owned import OwnFiles

COUNTS = {
    "train/good": 80,
    "test/good": 20,
    "test/crack": 10,
    "test/chip": 10,
    "test/stain": 10,
    "test/blocked": 10,
}
SIDE = 256  # pixels
SHADES = {"stain": 0.75, "crack": 0.45, "blocked": 1.5}  # of the defect, as a factor


def draw_button(rng: np.random.Generator, defect: str) -> tuple[np.ndarray, np.ndarray]:
    """A four-hole button on cloth, (256, 256, 3) uint8, and the mask of its `defect`, (256, 256) bool, which is empty
    for "good"."""
    y, x = np.mgrid[:SIDE, :SIDE] - SIDE // 2 - rng.uniform(-8, 8, 2)[:, None, None]
    turn, reach, extent = rng.uniform((0, 35, 7), (2 * np.pi, 75, 16))  # of the button; of the defect
    u = x * np.cos(turn) + y * np.sin(turn)
    v = y * np.cos(turn) - x * np.sin(turn)
    noise = rng.normal(0, 0.01, (SIDE, SIDE))
    radius = np.hypot(u, v)
    disc = radius < 94

    cloth = 0.82 + 0.02 * (np.sin(1.1 * x) + np.sin(1.3 * y)) + noise
    grain = 0.08 * np.cos(radius / 12) + 0.025 * np.sin(v / 5 + np.sin(u / 15))
    body = 0.40 + grain - 0.0006 * (x + 1.5 * y) + noise
    holes = [np.hypot(u - i, v - j) < 10 for i in (-21, 21) for j in (-21, 21)]

    mask = np.zeros_like(disc)
    if defect == "chip":
        mask = disc & (np.hypot(u, v - 94) < extent)
    elif defect == "stain":
        mask = disc & (np.hypot(u, v - reach) < extent)
    elif defect == "crack":
        mask = disc & (np.abs(v - reach + 5 * np.sin(u / 8)) < extent / 8) & (np.abs(u) < 2 * extent)
    elif defect == "blocked":
        mask = holes.pop(0)

    body = np.where(mask, body * SHADES.get(defect, 1), body)
    if defect == "chip":
        disc = disc & ~mask
    hole = np.any(holes, axis=0)
    tint = np.where(disc[..., None], (1.15, 0.95, 0.75), (0.98, 1.0, 1.02)) * rng.uniform(0.96, 1.04)
    image = np.where(disc & ~hole, body, cloth - 0.25 * hole)[..., None] * tint
    return (image.clip(0, 1) * 255).astype(np.uint8), mask


def draw_demo(data: Path, counts: dict[str, int] = COUNTS) -> None:
    """Draw the demo's category into `data`, in MVTec AD layout; the same images every time. Raises InputError if a file
    is in the way that was not drawn here."""
    own = OwnFiles(data, "drawn")
    for kind, (name, count) in enumerate(counts.items()):
        defect = Path(name).name
        for i in range(count):
            image, mask = draw_button(np.random.default_rng([kind, i]), defect)
            write_png(own, f"{name}/{i:03}.png", image)
            if mask.any():
                write_png(own, f"ground_truth/{defect}/{i:03}.png", mask)


def write_png(own: OwnFiles, name: str, pixels: np.ndarray) -> None:
    """Write a picture, unless one with these pixels is there already: earlier versions listed nothing."""
    if not holds(own.folder / name, pixels):
        save_picture(own.claim(name), Image.fromarray(pixels))


def holds(path: Path, pixels: np.ndarray) -> bool:
    """Whether this file is a picture with exactly these pixels."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return np.array_equal(np.asarray(image), pixels)
    except (OSError, SyntaxError, ValueError):
        return False
