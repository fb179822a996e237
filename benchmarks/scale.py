"""Time and memory of training against the number of images, and their size; draws OUT/scale.png.

python benchmarks/scale.py mvtec/bottle/train/good --weights resnet18.pth --out scale     # half an hour

The folder's images, repeated, stand for many; stored at 64x64, so that not reading them is what is measured."""

import argparse
import json
import math
import os
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.speed import run_measured  # noqa: E402
from kit import data, draw  # noqa: E402
from kit.files import write_text  # noqa: E402
from kit.images import load_image, photograph  # noqa: E402

COUNTS = (100, 1000, 10_000, 100_000)  # of images of 64x64
SIZES = (256, 512, 1024)  # of 100 images


def repeated(files: list[Path], count: int, folder: Path, side: int) -> Path:
    """`count` images in `folder`, all of them links to smaller copies of `files`."""
    small = folder.with_name(f"small{side}")
    if not small.exists():
        small.mkdir(parents=True)
        for i, path in enumerate(files):
            photograph(load_image(path), 10_000).resize((side, side), Image.Resampling.BICUBIC).save(small / f"{i}.png")
    copies = data.list_images(small)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        link = folder / f"{i:06}.png"
        if not link.exists():
            os.link(copies[i % len(copies)], link)
    return folder


def measured(folder: Path, size: int, weights: str, out: Path) -> dict[str, float]:
    """Seconds and peak memory of one training."""
    run = out / f"run_{folder.name}_{size}"
    options = ["--data", str(folder.resolve()), "--size", str(size), "--weights", weights, "--out", str(run.resolve())]
    seconds, memory = run_measured([sys.executable, "train.py", *options], out / "log.txt")
    return {
        "images": len(data.list_images(folder)),
        "size": size,
        "seconds": round(seconds, 1),
        "memory": round(memory),
    }


def chart(rows: list[dict], by: str, title: str) -> Image.Image:
    """Seconds and memory in MB by images or size, both axes logarithmic."""
    lines = {
        name: [(math.log10(row[by]), math.log10(row[key])) for row in rows]
        for name, key in (("seconds", "seconds"), ("memory, MB", "memory"))
    }
    return draw.line_chart(title, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of good images")
    parser.add_argument("--weights", required=True, help="file with ResNet18's ImageNet weights")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    args = parser.parse_args()
    weights = str(Path(args.weights).resolve())
    files = data.list_images(args.folder)
    by_count, by_size = [], []
    for count in args.counts:
        folder = repeated(files, count, args.out / f"images{count}", 64)
        by_count.append(measured(folder, 64, weights, args.out))
        print(by_count[-1], flush=True)
    for size in args.sizes:
        folder = repeated(files, 100, args.out / "large", 1024)
        by_size.append(measured(folder, size, weights, args.out))
        print(by_size[-1], flush=True)
    write_text(args.out / "scale.json", json.dumps(by_count + by_size, indent=1) + "\n")
    charts = [chart(by_count, "images", "training, log10: by images (of 64x64)")]
    charts.append(chart(by_size, "size", "training, log10: by size in pixels (100 images)"))
    draw.save_picture(args.out / "scale.png", draw.below_each_other(charts))


if __name__ == "__main__":
    main()
