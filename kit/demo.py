"""The demo, drawn images of buttons, some with defects; and a sheet of synthetic defects on a user's own images. The
demo shares no code with synth.py: otherwise it would only test for the defects that the detector was trained on."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from kit import draw, folders
from kit.command_line import Parser
from kit.files import OwnFiles, refuse_inside, single_file
from kit.images import foreground, read_image
from kit.settings import Shape, as_shape
from kit.shapes import check_size, input_size, parsed_size, told

SHEET_ROWS = 8
BELOW = ((0, draw.GAP), (0, draw.GAP), (0, 0))  # white margin around a panel
COUNTS = {"train/good": 80, "test/good": 20, "test/crack": 10, "test/chip": 10, "test/stain": 10, "test/blocked": 10}
BUTTON_SIDE = 256  # pixels
SHADES = {"stain": 0.75, "crack": 0.45, "blocked": 1.5}  # of the defect, as a factor


def draw_button(rng: np.random.Generator, defect: str) -> tuple[np.ndarray, np.ndarray]:
    """A four-hole button on cloth, (256, 256, 3) uint8, and the mask of its `defect`, (256, 256) bool. For "good" the
    mask is empty."""
    y, x = np.mgrid[:BUTTON_SIDE, :BUTTON_SIDE] - BUTTON_SIDE // 2 - rng.uniform(-8, 8, 2)[:, None, None]
    turn, reach, extent = rng.uniform((0, 35, 7), (2 * np.pi, 75, 16))  # of the button; of the defect
    u = x * np.cos(turn) + y * np.sin(turn)
    v = y * np.cos(turn) - x * np.sin(turn)
    noise = rng.normal(0, 0.01, (BUTTON_SIDE, BUTTON_SIDE))
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
    """Draw the demo's category into `data`, in MVTec AD layout; the images are always the same. Raises InputError if a
    file that was not drawn here is in the way."""
    own = OwnFiles(data, "drawn")
    for kind, (name, count) in enumerate(counts.items()):
        defect = Path(name).name
        for i in range(count):
            image, mask = draw_button(np.random.default_rng([kind, i]), defect)
            draw.save_picture(own.claim(f"{name}/{i:03}.png"), Image.fromarray(image))
            if mask.any():
                draw.save_picture(own.claim(f"ground_truth/{defect}/{i:03}.png"), Image.fromarray(mask))


# ---------------------------------------------------------------- a sheet of synthetic defects, before any training


def sheet(files: list[Path], shape: Shape, rng: np.random.Generator, synthesize: Callable) -> Image.Image:
    """For each image four panels: the image, its foreground, a mask, the synthetic defect. Wide panels are stacked."""
    blocks = []
    for path in files:
        image = read_image(path, shape)
        other = read_image(files[rng.integers(len(files))], shape)
        anomalous, mask, _ = synthesize(image, rng, other)
        panels = [draw.as_bytes(panel) for panel in (image, foreground(image), mask, anomalous)]
        if draw.is_wide(Image.fromarray(panels[0])):
            blocks.append(Image.fromarray(np.vstack([np.pad(panel, BELOW, constant_values=255) for panel in panels])))
        else:
            blocks.append(draw.beside_each_other(panels))
    return draw.below_each_other(blocks)


def draw_sheet(synthesize: Callable, arguments: list[str] | None = None) -> None:
    """The command line of `python synth.py FOLDER`, given the function that paints defects."""
    parser = Parser(description="Draw synthetic defects on good images: image, foreground, mask, defect.")
    parser.add_argument("folder", type=Path, help="folder of good images, or folder with train/good")
    out_help = "picture file to write (default: synthetic.png, synthetic-2.png, ...)"
    parser.add_argument("--out", type=Path, help=out_help)
    parser.add_argument("--size", type=parsed_size, default=384, help="input size, as for train.py (default: 384)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    args = parser.parse_args(arguments)
    check_size(args.size)
    rng = np.random.default_rng(args.seed)
    folder = folders.good_folder(args.folder, "FOLDER")
    files = folders.list_images(folder)
    out = single_file(args.out, Path("synthetic.png"), "--out", files)
    refuse_inside(out, folder)
    chosen = [files[i] for i in rng.permutation(len(files))[:SHEET_ROWS]]
    shape = as_shape(input_size(args.size, files))
    draw.save_picture(out, sheet(chosen, shape, rng, synthesize))
    if line := told(files, shape):
        print(line)
    print(f"wrote {out}: image, foreground, mask, synthetic defect")
