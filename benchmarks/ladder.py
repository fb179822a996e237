"""How much is each difference between the paper's form of CL-Flow and ours worth? A ladder, one difference per step.

python benchmarks/ladder.py FOLDER/* --weights FILE --out ladder     # 20 to 30 minutes a category
python benchmarks/ladder.py FOLDER/* --out ladder --table            # reads the results; nothing is trained

The first two steps are trainings by train.py --method paper, in OUT/paper. The others train on kept features, as
benchmarks/ablation.py does, in OUT/<size>. Each result is a line in OUT/<category>.jsonl, written as soon as it is
known. The same call continues after a stop, also after the last complete epoch of the paper's form.

Seconds are those of training alone: features of good images, painting, bank and epochs. In our form, train.py trains
three more times to set the threshold; image AUROC does not depend on that."""

import argparse
import csv
import json
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import ablation  # noqa: E402
from ablation import LIKELIHOOD, read_results  # noqa: E402

import clflow  # noqa: E402
import train  # noqa: E402
from kit import data, folders  # noqa: E402
from kit.files import MODEL, resumable  # noqa: E402
from kit.settings import CLFlowSettings, PaperSettings  # noqa: E402
from kit.windows import keep_freed_memory  # noqa: E402
from methods import load  # noqa: E402

SMALL, LARGE = PaperSettings.size, CLFlowSettings.size

# Options of train.py --method paper.
PAPER = {
    "the paper's form": [],
    "its likelihood alone": ["--classification-weight", 0, "--contrast-weight", 0],
}
# Settings of CL-Flow, and the size of its images. Each step keeps what the step before has changed.
OURS = {
    "joined scales, 1x1 kernels": (SMALL, LIKELIHOOD | {"local": False}),
    "the local scale": (SMALL, LIKELIHOOD),
    "a classifier of its own": (SMALL, {"contrast_weight": 0.0}),
    "noise as anomalous rows": (SMALL, {"contrast_weight": 0.0}),
    "contrast on its log-odds": (SMALL, {}),
    "larger images: the default": (LARGE, {}),
}
WITHOUT_NOISE = ("a classifier of its own",)
STEPS = [*PAPER, *OURS]


class LossesWithoutNoise(clflow.Losses):
    """CL-Flow's losses, but rows of painted defects are the only anomalous ones."""

    def log_odds(self, normal: Tensor, anomalous: Tensor) -> tuple[Tensor, Tensor]:
        odds = self.model.log_odds(torch.cat((normal, anomalous)))
        return odds[: len(normal)], odds[len(normal) :]


def climb(category: Path, step: str, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """The metrics of one step on one category."""
    if step in PAPER:
        return paper_step(category, step, seed, args)
    size, changed = OURS[step]
    kept = features(category, size, args)
    settings = ablation.settings_of(kept, args.backbone, seed, changed)
    losses = LossesWithoutNoise if step in WITHOUT_NOISE else clflow.Losses
    with patch.object(clflow, "Losses", losses):
        figures = ablation.experiment(kept, settings, args.device, is_default=False)
    return figures | {"seconds": round(figures["seconds"] + kept["seconds"], 1)}


def paper_step(category: Path, step: str, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Train with the script, or continue a stopped training; measure in the same way as the other steps."""
    out = args.out / "paper" / step.replace(" ", "_").replace("'", "") / category.resolve().name / f"seed{seed}"
    options = ["--method", "paper", "--data", category, "--out", out, "--seed", seed, "--resume"]
    options += ["--size", SMALL, "--backbone", args.backbone, "--device", args.device, *PAPER[step]]
    if args.weights and resumable(out) is None:  # a checkpoint has the backbone's weights
        options += ["--weights", args.weights]
    train.main([str(option) for option in options])
    model = load(out / MODEL, args.device)
    tests = [test.path for test in folders.labelled_images(category)]
    with torch.no_grad():
        maps = torch.cat([model(images)[0] for images in data.batches(tests, model.shape)])
    with open(out / "log.csv") as file:
        seconds = sum(float(row["seconds"]) for row in csv.DictReader(file))
    return ablation.measure(maps, features(category, SMALL, args)) | {"seconds": round(seconds, 1)}


def features(category: Path, size: int, args: argparse.Namespace) -> dict[str, Tensor | float]:
    """The kept features of a category's images at this size, with the labels and masks of its test images."""
    folder = args.out / str(size)
    folder.mkdir(parents=True, exist_ok=True)
    there = argparse.Namespace(**vars(args) | {"out": folder})
    return ablation.kept_features(category, there, size)


def run_category(category: Path, args: argparse.Namespace) -> None:
    """Compute the missing results of a category."""
    name = category.resolve().name
    results = args.out / f"{name}.jsonl"
    done = {(row["step"], row["seed"]) for row in read_results(results)}
    for seed in range(args.seeds):
        for step in args.steps:
            if (step, seed) in done:
                continue
            row = {"category": name, "step": step, "seed": seed} | climb(category, step, seed, args)
            with open(results, "a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{name}, seed {seed}, {step}: {row['image_auroc']:.4f}, {row['seconds']:.0f} s", flush=True)


def table(out: Path) -> str:
    """A row for each step: mean image AUROC over categories and seeds, image AUROC of the worst category, and the mean
    training time per category in seconds. Only categories with results of all steps count."""
    found = {file.stem: read_results(file) for file in sorted(out.glob("*.jsonl"))}
    steps = [step for step in STEPS if any(row["step"] == step for rows in found.values() for row in rows)]
    complete = [rows for rows in found.values() if {row["step"] for row in rows} >= set(steps)]
    lines = [f"| step | mean of {len(complete)} | worst | training, s |", "|---|---|---|---|"]
    if not complete:
        return "no category has results of all steps yet\n"
    for step in steps:
        chosen = [[row for row in rows if row["step"] == step] for rows in complete]
        aurocs = [np.mean([row["image_auroc"] for row in rows]) for rows in chosen]
        worst = int(np.argmin(aurocs))
        seconds = np.mean([row["seconds"] for rows in chosen for row in rows])
        worst_text = f"{aurocs[worst]:.3f} ({chosen[worst][0]['category']})"
        lines.append(f"| {step} | {np.mean(aurocs):.4f} | {worst_text} | {seconds:.0f} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("categories", type=Path, nargs="+", help="folders in MVTec AD's layout")
    add("--out", type=Path, required=True, help="folder for features, runs and results")
    add("--weights", help="file with the backbone's ImageNet weights")
    add("--backbone", default="resnet18")
    int8 = "features of our form in 8-bit integers where that is fast, as in train.py (default: yes)"
    add("--int8", action=argparse.BooleanOptionalAction, default=True, help=int8)
    add("--seeds", type=int, default=1)
    add("--device", default="cpu")
    add("--steps", nargs="+", choices=STEPS, default=STEPS, metavar="STEP")
    add("--table", action="store_true", help="print the table of the results so far; nothing is trained")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.table:
        for category in args.categories:
            run_category(category, args)
    print(table(args.out), end="")


if __name__ == "__main__":
    keep_freed_memory()
    main()
