"""Time and memory of training against the number of images, and their size; draws OUT/scale.png.

python benchmarks/scale.py mvtec/bottle/train/good --weights resnet18.pth --out scale     # half an hour

The folder's images are repeated to get many. They are stored at 64x64, so that reading files takes little of the
time."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.speed import run_measured  # noqa: E402
from kit import draw, folders  # noqa: E402
from kit.draw import photograph  # noqa: E402
from kit.files import write_text  # noqa: E402
from kit.images import load_image  # noqa: E402

SMALL = 64
COUNTS = (100, 1000, 10_000, 100_000)  # of images of SMALL x SMALL
SIZES = (512, 1024, 2048)  # of 100 images
LABELS = {"seconds": "training, seconds", "memory": "peak memory, MB"}
LEFT, TOP, WIDTH, HEIGHT = 90, 60, 400, 240  # of a plot, in pixels
INSET = 30  # of the first point from the left edge


def repeated(files: list[Path], count: int, folder: Path, side: int) -> Path:
    """`count` images in `folder`, smaller copies of `files`. Each file gets its number behind the image, since training
    leaves out files that are equal."""
    small = folder.with_name(f"small{side}")
    if not small.exists():
        small.mkdir(parents=True)
        for i, path in enumerate(files):
            photograph(load_image(path), 10_000).resize((side, side), Image.Resampling.BICUBIC).save(small / f"{i}.png")
    copies = folders.list_images(small)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        path = folder / f"{i:06}.png"
        if not path.exists():
            path.write_bytes(copies[i % len(copies)].read_bytes() + str(i).encode())
    return folder


def measured(folder: Path, size: int, weights: str, out: Path) -> dict[str, float]:
    """Seconds and peak memory of one training."""
    run = out / f"run_{folder.name}_{size}"
    options = ["--data", str(folder.resolve()), "--size", str(size), "--weights", weights, "--out", str(run.resolve())]
    seconds, memory = run_measured([sys.executable, "train.py", *options], out / "log.txt")
    return {
        "images": len(folders.list_images(folder)),
        "size": size,
        "seconds": round(seconds, 1),
        "memory": round(memory),
    }


def chart(title: str, rows: list[dict], by: str, name: str, slope: int) -> Image.Image:
    """A chart of `name` against `by` with logarithmic axes and the value at each point. A grey line with this slope
    shows growth in proportion."""
    x = np.log10([row[by] for row in rows])
    y = np.log10([row[name] for row in rows])
    low, high = np.floor(y.min()), max(np.ceil(y.max()), np.floor(y.min()) + 2)
    across = LEFT + INSET + (x - x[0]) / (x[-1] - x[0]) * (WIDTH - INSET)
    unit = HEIGHT / (high - low)  # pixels of a decade
    down = TOP + (high - y) * unit

    sheet = Image.new("RGB", (LEFT + WIDTH + 60, TOP + HEIGHT + 50), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(15)
    pen.text((LEFT, 12), title, "black", ImageFont.load_default(18))
    for decade in np.arange(low, high + 1):
        height = TOP + (high - decade) * unit
        pen.line((LEFT, height, LEFT + WIDTH, height), "#dddddd")
        pen.text((LEFT - 10, height), f"{10**decade:,.0f}", "black", font, anchor="rm")
    points = list(zip(across, down, strict=True))
    rise = min(slope * (x[-1] - x[0]), y[-1] - low)  # decades, down to the lower edge
    start = across[-1] - rise / slope * (across[-1] - across[0]) / (x[-1] - x[0])
    pen.line((across[-1], down[-1], start, down[-1] + rise * unit), "#bbbbbb", 2)
    pen.line(points, "#2a6fb0", 3)
    for (column, row), entry in zip(points, rows, strict=True):
        pen.ellipse((column - 4, row - 4, column + 4, row + 4), "#2a6fb0")
        pen.text((column, row - 10), f"{entry[name]:,.0f}", "black", font, anchor="ms")
        pen.text((column, TOP + HEIGHT + 10), f"{entry[by]:,}", "black", font, anchor="mt")
    return sheet


def figure(rows: list[dict]) -> Image.Image:
    """Seconds on the left, memory on the right; by number of images above, by size below."""
    small = [row for row in rows if row["size"] == SMALL]
    large = [row for row in rows if row["size"] != SMALL]
    lines = []
    for part, by, among, slope in (
        (small, "images", f"by images of {SMALL}x{SMALL}", 1),
        (large, "size", "by size, 100 images", 2),  # an image has size^2 pixels
    ):
        panels = [chart(f"{label}, {among}", part, by, name, slope) for name, label in LABELS.items()]
        lines.append(draw.beside_each_other([np.asarray(panel) for panel in panels]))
    return draw.below_each_other(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of good images")
    parser.add_argument("--weights", required=True, help="file with ResNet18's ImageNet weights")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    args = parser.parse_args()
    weights = str(Path(args.weights).resolve())
    files = folders.list_images(args.folder)
    rows = []
    for count in args.counts:
        folder = repeated(files, count, args.out / f"images{count}", SMALL)
        rows.append(measured(folder, SMALL, weights, args.out))
        print(rows[-1], flush=True)
    for size in args.sizes:
        folder = repeated(files, 100, args.out / "large", max(SIZES))
        rows.append(measured(folder, size, weights, args.out))
        print(rows[-1], flush=True)
    write_text(args.out / "scale.json", json.dumps(rows, indent=1) + "\n")
    draw.save_picture(args.out / "scale.png", figure(rows))


if __name__ == "__main__":
    main()
