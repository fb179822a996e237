"""Does a detector find small defects in photographs of 12 megapixels, and how much time and memory does it take?

python benchmarks/large.py mvtec/screw --weights resnet18.pth --out large      # some ten minutes on two cores

The photographs are made from real images: each has 9 x 7 tiles of 448 x 448 pixels. The detector learns from 20
photographs with good images as tiles, drawn at random. Each of the 20 test photographs repeats one good test image in
all places. In half of them one tile is replaced by one of the defective images with the smallest defects."""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.speed import run_measured  # noqa: E402
from kit import data, folders, metrics  # noqa: E402
from kit.data import marked  # noqa: E402
from kit.detector import Detector  # noqa: E402
from kit.images import load_image  # noqa: E402
from methods import load  # noqa: E402

TILE = 448  # pixels
DOWN, ACROSS = 7, 9
LEARNT_FROM = 20
TESTS = 10  # of each kind
NEAR = 8  # pixels
RATES = (0.02, 0.1)  # accepted false-alarm rates, each with its own threshold

Box = tuple[int, int, int, int]  # x0, y0, x1, y1


def tile(path: Path) -> Image.Image:
    return load_image(path).convert("RGB").resize((TILE, TILE), Image.Resampling.BILINEAR)


def photograph_of(tiles: list[Image.Image], rng: np.random.Generator) -> Image.Image:
    """A photograph with tiles drawn at random in all places."""
    whole = Image.new("RGB", (ACROSS * TILE, DOWN * TILE))
    for place in range(DOWN * ACROSS):
        whole.paste(tiles[rng.integers(len(tiles))], corner(place))
    return whole


def corner(place: int) -> tuple[int, int]:
    """(x, y) of a tile's upper left corner."""
    return place % ACROSS * TILE, place // ACROSS * TILE


def smallest_defects(category: Path) -> list[tuple[Path, np.ndarray]]:
    """The defective images with the smallest defects, smallest first, each with its mask at the size of a tile."""
    found = []
    for test in folders.labelled_images(category):
        if test.mask:
            mask = Image.fromarray(marked(load_image(test.mask))).resize((TILE, TILE), Image.Resampling.NEAREST)
            found.append((test.path, np.asarray(mask)))
    found = [entry for entry in found if entry[1].any()]
    return sorted(found, key=lambda entry: int(entry[1].sum()))[:TESTS]


def draw_all(category: Path, to: Path) -> dict[str, Box]:
    """Draw the photographs. Returns the box of the defect in each defective photograph, by name."""
    rng = np.random.default_rng(0)
    good = [tile(path) for path in folders.list_images(folders.good_folder(category))]
    other = [tile(test.path) for test in folders.labelled_images(category) if not test.anomalous]
    if len(other) < 2 * TESTS:
        sys.exit(f"error: {category}: has {len(other)} good test images; {2 * TESTS} are needed")
    for folder in ("train", "new/good", "new/bad"):
        (to / folder).mkdir(parents=True, exist_ok=True)
    for i in range(LEARNT_FROM):
        photograph_of(good, rng).save(to / "train" / f"{i:02}.png", compress_level=1)
    for i in range(TESTS):
        photograph_of(other[i : i + 1], rng).save(to / "new" / "good" / f"{i:02}.png", compress_level=1)
    boxes = {}
    for i, (path, mask) in enumerate(smallest_defects(category)):
        whole = photograph_of(other[TESTS + i : TESTS + i + 1], rng)
        x, y = corner(int(rng.integers(DOWN * ACROSS)))
        whole.paste(tile(path), (x, y))
        whole.save(to / "new" / "bad" / f"{i:02}.png", compress_level=1)
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        boxes[f"bad/{i:02}.png"] = (x + columns[0], y + rows[0], x + columns[-1] + 1, y + rows[-1] + 1)
    return boxes


def overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def highest(model: Detector, path: Path, box: Box) -> str:
    """The place where the map of a photograph is highest: on the defect in this box, elsewhere on its tile, or
    elsewhere."""
    maps, _ = model(data.read_batch([path], model.shape))
    y, x = np.unravel_index(int(maps[0].argmax()), model.shape)
    spot = (int(x), int(y), int(x) + 1, int(y) + 1)
    if overlap(spot, (box[0] - NEAR, box[1] - NEAR, box[2] + NEAR, box[3] + NEAR)):
        return "on it"
    left, top = box[0] // TILE * TILE, box[1] // TILE * TILE
    return "elsewhere on its tile" if overlap(spot, (left, top, left + TILE, top + TILE)) else "elsewhere"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("category", type=Path)
    parser.add_argument("--weights", required=True, help="file with ResNet18's ImageNet weights")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--method", default="clflow")
    parser.add_argument("--size", default="native")
    args = parser.parse_args()
    out = args.out.resolve()
    boxes = draw_all(args.category, out)
    run, found = out / f"run_{args.method}_{args.size}", out / f"found_{args.method}_{args.size}"
    options = ["--data", out / "train", "--size", args.size, "--method", args.method, "--out", run]
    command = [sys.executable, "train.py", *options, "--weights", Path(args.weights).resolve()]
    seconds, memory = run_measured([str(part) for part in command], out / "train.txt")
    print(f"training on {LEARNT_FROM} photographs of {ACROSS * TILE} x {DOWN * TILE}: {seconds:.0f} s, {memory:.0f} MB")
    command = [sys.executable, "evaluate.py", run, "--images", out / "new", "--out", found]
    seconds, memory = run_measured([str(part) for part in command], out / "judge.txt")
    print(f"judging {2 * TESTS}: {seconds / 2 / TESTS:.1f} s per image, with its pictures, {memory:.0f} MB")
    with open(found / "scores.csv") as file:
        rows = list(csv.DictReader(file))
    labels = np.array([row["file"] in boxes for row in rows])
    model = load(run / "model.pt")
    scores = np.array([float(row["score"]) for row in rows])
    print("image AUROC", metrics.image_metrics(labels, scores)["image_auroc"])
    for row in rows:
        if row["file"] in boxes:
            x0, y0, x1, y1 = box = boxes[row["file"]]
            said = "normal"
            if row["anomalous"] == "1":
                hit = overlap(box, tuple(int(row[name]) for name in ("x0", "y0", "x1", "y1")))
                said = "found" if hit else "anomalous, but elsewhere"
            place = highest(model, out / "new" / row["file"], box)
            print(f"{row['file']}: a defect of {x1 - x0} x {y1 - y0} pixels: {said}; the map is highest {place}")
    for rate in RATES:
        anomalous = scores > model.thresholds(rate).score
        bad, good = int(anomalous[labels].sum()), int(anomalous[~labels].sum())
        print(f"--false-alarm {rate}: {bad} of {TESTS} defective and {good} of {TESTS} good images flagged")


if __name__ == "__main__":
    main()
