"""Does a detector hold when light, camera, file format or pose change?

A detector learns from the good images as they are. All test images are then changed in the same way, or (`mixed`)
each in another way. The benchmark reports image AUROC, false alarms and recall at the default threshold. Then it
recalibrates on up to 20 changed good images (at most half of the good test images), and measures the others again;
not if there are too few (NaN).

python benchmarks/shift.py mvtec/screw more/tire --weights FILE --out shift
python benchmarks/shift.py mvtec/screw --weights FILE --out shift --methods clflow nearest --few 10 20 40
python benchmarks/shift.py mvtec/screw --weights FILE --out shift --methods --rivals patchcore    # no method of ours
python benchmarks/shift.py mvtec/screw more/tire --out shift --table

OUT/results.jsonl gets a line for each category, seed, method and shift. The same call continues after a stop."""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from kit import folders, metrics  # noqa: E402
from kit.detector import Detector  # noqa: E402
from kit.files import MODEL  # noqa: E402
from kit.folders import LabelledImage  # noqa: E402
from kit.good import blurred, compressed, split  # noqa: E402
from kit.images import read_image, to_tensor  # noqa: E402
from kit.settings import LEAST_IMAGES, Shape  # noqa: E402
from methods import load  # noqa: E402

METHODS = {
    "clflow": [],
    "nearest": ["--method", "nearest"],
    "nearest, one scale": ["--method", "nearest", "--no-local"],
}
RIVALS = ("patchcore", "fastflow")
CLEAN = "as they are"
RECALIBRATED_ON = 20  # images
DRAWS = 3  # of few images


# ---------------------------------------------------------------- what changes


def light_across(image: np.ndarray) -> np.ndarray:
    """Light from the side: from 20 % darker at the left to 20 % brighter at the right."""
    return image * np.linspace(0.8, 1.2, image.shape[1], dtype=np.float32)[None, :, None]


def moved(image: np.ndarray, pixels: int = 8) -> np.ndarray:
    """Moved down and to the right; the border is repeated."""
    return np.pad(image, ((pixels, 0), (pixels, 0), (0, 0)), mode="edge")[: image.shape[0], : image.shape[1]]


def turned(image: np.ndarray) -> np.ndarray:
    """Turned by three degrees; the border is repeated."""
    return ndimage.rotate(image, 3, reshape=False, order=1, mode="nearest")


# Each is called with an image (H, W, 3) in [0, 1] and a random generator; the result is clipped to [0, 1].
SHIFTS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    CLEAN: lambda image, rng: image,
    "light x .8": lambda image, rng: image * 0.8,
    "light x 1.2": lambda image, rng: image * 1.2,
    "gamma .8": lambda image, rng: image**0.8,
    "gamma 1.25": lambda image, rng: image**1.25,
    "light from the side": lambda image, rng: light_across(image),
    "warmer": lambda image, rng: image * np.float32([1.1, 1, 0.9]),
    "colder": lambda image, rng: image * np.float32([0.9, 1, 1.1]),
    "noise .02": lambda image, rng: image + rng.normal(0, 0.02, image.shape),
    "blur 1 px": lambda image, rng: blurred(image, 1.0),
    "sharpened": lambda image, rng: image + (image - blurred(image, 1.0)),
    "JPEG 50": lambda image, rng: compressed(image, 50),
    "moved 8 px": lambda image, rng: moved(image),
    "turned 3 deg": lambda image, rng: turned(image),
}
MIXED = "mixed"


def shifted(image: np.ndarray, shift: str, number: int) -> np.ndarray:
    """The test image with this number, changed."""
    rng = np.random.default_rng([7, number])
    if shift == MIXED:
        shift = list(SHIFTS)[1 + number % (len(SHIFTS) - 1)]
    return np.float32(SHIFTS[shift](image, rng)).clip(0, 1)


# ---------------------------------------------------------------- measuring


def chosen_tests(category: Path, count: int) -> list[LabelledImage]:
    """At most `count` good and `count` defective test images, drawn at random."""
    tests = folders.labelled_images(category)
    chosen = []
    for anomalous in (False, True):
        some = [test for test in tests if test.anomalous == anomalous]
        order = np.random.default_rng(0).permutation(len(some))[:count]
        chosen += [some[i] for i in sorted(order)]
    return chosen


@torch.no_grad()
def judged(model: Detector, images: np.ndarray) -> tuple[np.ndarray, list[list[torch.Tensor]]]:
    """Scores (N,) of images (N, H, W, 3), and their energies, batch by batch."""
    batches = to_tensor(images).split(8)
    energies = [model.energies_in_windows(batch) for batch in batches]
    scores = torch.cat([model.scores(batch)[0] for batch in energies])
    allowed = torch.cat([model.allowance_of(batch).flatten() for batch in batches])
    return (scores / allowed).cpu().numpy(), energies


def figures(
    labels: np.ndarray, scores: np.ndarray, limit: float, recalibrate: Callable[[np.ndarray], tuple[np.ndarray, float]]
) -> dict:
    """The metrics of the scores (N,) of test images at the threshold `limit`. `recalibrate` gives the scores and the
    threshold after a calibration on the test images with these indices."""
    row = {"image_auroc": metrics.image_metrics(labels, scores)["image_auroc"]}
    row |= metrics.shares_at(limit, labels, scores)
    good = np.flatnonzero(~labels)
    new = good[: min(RECALIBRATED_ON, len(good) // 2)]
    if len(new) < LEAST_IMAGES:
        return row | {"recalibrated_false_alarms": math.nan, "recalibrated_recall": math.nan}
    scores, limit = recalibrate(new)
    left = np.setdiff1d(np.arange(len(labels)), new)
    after = metrics.shares_at(limit, labels[left], scores[left])
    return row | {f"recalibrated_{name}": value for name, value in after.items()}


def shifted_tests(tests: list[LabelledImage], shift: str, shape: Shape) -> np.ndarray:
    """The test images, changed: (N, H, W, 3)."""
    return np.stack([shifted(read_image(test.path, shape), shift, i) for i, test in enumerate(tests)])


def measured(run: Path, tests: list[LabelledImage], shift: str, device: str) -> dict:
    """The metrics of a trained run on shifted test images."""
    model = load(run / MODEL, device)
    scores, energies = judged(model, shifted_tests(tests, shift, model.shape))

    def recalibrate(new: np.ndarray) -> tuple[np.ndarray, float]:
        model.calibrate([[e[n % 8 : n % 8 + 1] for e in energies[n // 8]] for n in new])
        scores = torch.cat([model.scores(batch)[0] for batch in energies])
        return scores.cpu().numpy(), model.thresholds().score

    labels = np.array([test.anomalous for test in tests])
    return figures(labels, scores, model.thresholds().score, recalibrate)


def few_images(category: Path, count: int, draw: int, to: Path) -> Path:
    """A category with `count` of the good images, drawn at random: links to these and to the test images."""
    folder = to / f"{category.name}-{count}-{draw}"
    if not folder.exists():
        files = folders.list_images(folders.good_folder(category))
        (folder / "train" / "good").mkdir(parents=True)
        for i in np.random.default_rng([draw, count]).permutation(len(files))[:count]:
            (folder / "train" / "good" / files[i].name).symlink_to(files[i].resolve())
        for name in ("test", "ground_truth"):
            if (category / name).exists():
                (folder / name).symlink_to((category / name).resolve())
    return folder


def trained(category: Path, method: str, seed: int, args: argparse.Namespace) -> Path:
    """The run folder of a category, trained now or in an earlier call."""
    run = args.out / "runs" / category.name / method.replace(", ", "-").replace(" ", "-") / f"seed{seed}"
    if not (run / MODEL).exists():
        options = ["--data", str(category), "--out", str(run), "--seed", str(seed), *METHODS[method]]
        if args.weights:
            options += ["--weights", args.weights]
        if args.device:
            options += ["--device", args.device]
        train.main(options)
    return run


def measure_category(category: Path, shifts: list[str], args: argparse.Namespace) -> None:
    """Add the lines of a category that are missing in results.jsonl."""
    tests = chosen_tests(category, args.tests)
    for seed in range(args.seeds):
        for method in args.methods:
            for shift in missing(category, seed, method, shifts, args.out):
                run = trained(category, method, seed, args)
                add_line(category, seed, method, shift, measured(run, tests, shift, args.device or "cpu"), args.out)


@torch.no_grad()
def measure_rivals(category: Path, shifts: list[str], args: argparse.Namespace) -> None:
    """Add the missing lines of anomalib's models, at 256x256. Their threshold is the highest score of the held-out good
    images. Their trainings are not kept: after a stop, a model is trained again."""
    from benchmarks import rivals  # exits if anomalib is not installed

    shape = (rivals.SIZE, rivals.SIZE)
    device = args.device or "cpu"
    tests = chosen_tests(category, args.tests)
    held_out, files = split(folders.list_images(folders.good_folder(category)), seed=0)
    for name in args.rivals:
        method = f"anomalib {name}"
        left = missing(category, 0, method, shifts, args.out)
        if not left:
            continue
        with torch.enable_grad():
            model = rivals.trained(name, files, args.weights, device)

        def scores_of(images: np.ndarray, model: nn.Module = model) -> np.ndarray:
            batches = to_tensor(images).split(8)
            return torch.cat([rivals.scores_of(model, batch, device) for batch in batches]).cpu().numpy()

        limit = scores_of(np.stack([read_image(file, shape) for file in held_out])).max()
        for shift in left:
            row = measured_rival(scores_of, limit, tests, shift, shape)
            add_line(category, 0, method, shift, row, args.out)


def measured_rival(
    scores_of: Callable[[np.ndarray], np.ndarray], limit: float, tests: list[LabelledImage], shift: str, shape: Shape
) -> dict:
    """The metrics of a rival on shifted test images. After a recalibration, its threshold is the highest new score."""
    scores = scores_of(shifted_tests(tests, shift, shape))
    labels = np.array([test.anomalous for test in tests])
    return figures(labels, scores, limit, lambda new: (scores, scores[new].max()))


def missing(category: Path, seed: int, method: str, shifts: list[str], out: Path) -> list[str]:
    """The shifts that have no line in results.jsonl yet."""
    key = {"category": category.name, "seed": seed, "method": method}
    done = {row["shift"] for row in read_results(out) if key.items() <= row.items()}
    return [shift for shift in shifts if shift not in done]


def add_line(category: Path, seed: int, method: str, shift: str, row: dict, out: Path) -> None:
    """Print a result, and add it to results.jsonl."""
    row = {"category": category.name, "seed": seed, "method": method, "shift": shift} | row
    with open(out / "results.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    print(" ".join(f"{k} {round(v, 3) if isinstance(v, float) else v}" for k, v in row.items()), flush=True)


def read_results(out: Path) -> list[dict]:
    file = out / "results.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def print_table(rows: list[dict], shifts: list[str]) -> None:
    """Print a Markdown table for each method, with a row for each shift: means over seeds, then over categories."""
    names = ("image_auroc", "false_alarms", "recall", "recalibrated_false_alarms", "recalibrated_recall")
    for method in dict.fromkeys(row["method"] for row in rows):
        print(f"\n| {method} | {' | '.join(names)} | worst AUROC | most false alarms |\n|{'---|' * (len(names) + 3)}")
        for shift in shifts:
            means = []
            for category in dict.fromkeys(row["category"] for row in rows):
                mine = [r for r in rows if (r["method"], r["shift"], r["category"]) == (method, shift, category)]
                if mine:
                    means.append(np.mean([[row[name] for name in names] for row in mine], axis=0))
            if means:
                values = np.array(means)
                cells = [*np.nanmean(values, axis=0), values[:, 0].min(), values[:, 1].max()]
                print(f"| {shift} | {' | '.join(f'{cell:.3f}' for cell in cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("categories", type=Path, nargs="+", help="folders in MVTec AD's layout")
    add("--out", type=Path, required=True, help="folder for runs and results.jsonl")
    add("--weights", help="file with the backbone's ImageNet weights")
    add("--methods", nargs="*", choices=METHODS, default=list(METHODS), metavar="NAME")
    add("--shifts", nargs="+", choices=[*SHIFTS, MIXED], default=[*SHIFTS, MIXED], metavar="NAME")
    add("--seeds", type=int, default=1, help="number of seeds (default: 1)")
    add("--tests", type=int, default=30, help="good and defective test images of each category (default: 30 each)")
    add("--few", type=int, nargs="*", default=[], help="also train on this many good images, drawn three times")
    add("--rivals", nargs="+", choices=RIVALS, default=[], help="also these models of anomalib; needs --weights")
    add("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    add("--table", action="store_true", help="print the table of the results; train nothing")
    args = parser.parse_args()
    if args.rivals and not args.weights:
        parser.error("--rivals needs --weights FILE, a file with ResNet18's ImageNet weights")
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.table:
        for category in args.categories:
            measure_category(category.resolve(), args.shifts, args)
            if args.rivals:  # else anomalib need not be installed
                measure_rivals(category.resolve(), args.shifts, args)
            for count in args.few:
                for draw in range(DRAWS):
                    few = few_images(category.resolve(), count, draw, args.out / "few")
                    measure_category(few, [CLEAN], args)
    print_table(read_results(args.out), args.shifts)


if __name__ == "__main__":
    main()
