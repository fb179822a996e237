"""What each part of CL-Flow is worth, on categories in MVTec AD's layout; features are computed once and kept.

python benchmarks/ablation.py mvtec/bottle mvtec/screw --weights FILE --seeds 3 --out ablation
python benchmarks/ablation.py mvtec/bottle mvtec/screw --out ablation --compare "the default" "8 epochs"

OUT/<category>.pt has the features. OUT/<category>.jsonl has the results, one line each, as soon as they are known. The
same call continues after a stop.

--compare reads the results. It prints the mean gain of the second variant over the first, and t and p of a paired test
over the categories. Each category counts once, with its mean over the seeds, since seeds of one category are not
independent."""

import argparse
import itertools
import json
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import clflow  # noqa: E402
from kit import data, folders, metrics  # noqa: E402
from kit.backbone import as_rows  # noqa: E402
from kit.detector import anomaly_map, image_score  # noqa: E402
from kit.files import write_atomically  # noqa: E402
from kit.good import GoodImages, Painter, held_out_count, quantize_backbone, split, with_camera_copies  # noqa: E402
from kit.processes import ALONE  # noqa: E402
from kit.rows import COPIED, Feed, GoodRows, Rows, candidates, origins, painted_rows  # noqa: E402
from kit.settings import CLFlowSettings  # noqa: E402
from kit.shapes import input_size  # noqa: E402
from methods.nearest import scaled_distances  # noqa: E402
from synth import synthesize  # noqa: E402

LIKELIHOOD = {"classification_weight": 0.0, "contrast_weight": 0.0}
VARIANTS = {
    "the default": {},
    "likelihood, one scale for all": LIKELIHOOD | {"local": False},
    "likelihood, local scale": LIKELIHOOD,
    "without the contrast": {"contrast_weight": 0.0},
    "without the classification": {"classification_weight": 0.0},
    "8 epochs": {"epochs": 8},
    "the default with 4 flow steps": {"steps": 4},
    "the default with 4,000 prototypes": {"bank": 4000},
    "the default with 8,000 prototypes": {"bank": 8000},
}


@torch.no_grad()
def extract(category: Path, settings: CLFlowSettings, weights: str | None, device: str) -> dict[str, Tensor | float]:
    """All features of a category that an experiment needs, in float16.

    They are those of all good images (each seed holds out others), of a camera copy of each, of the defects that are
    painted on them, and of the test images. `seconds` is the time for all of these except the test images."""
    model = clflow.CLFlow(settings).eval()
    model.backbone.load_imagenet(weights)
    model.to(device)
    files = folders.list_images(folders.good_folder(category))
    tests = folders.labelled_images(category)
    started = time.perf_counter()
    quantize_backbone(model, files)
    paint = with_camera_copies(partial(synthesize, defects=clflow.DEFECTS_PER_IMAGE))
    painter = Painter(GoodImages([], files), paint, model)
    painted = painted_rows(model, painter, clflow.PAINTED // clflow.DEFECTS_PER_IMAGE)

    def features(files: list[Path]) -> Tensor:
        return torch.cat([model.features(batch).half() for batch in data.batches(files, model.shape)])

    good = features(files)
    copies = torch.cat([model.features(batch).half() for batch in painter.copies()])
    return {
        "good": good,
        "copies": copies,
        "copied_from": painter.image_index(torch.arange(len(copies))),
        "seconds": time.perf_counter() - started,
        "anomalous": painted.y,
        "painted_on": painted.image_indices,
        "tests": features([test.path for test in tests]),
        "labels": torch.tensor([test.anomalous for test in tests]),
        "masks": torch.stack([torch.from_numpy(data.read_mask(test.mask, model.shape)) for test in tests]),
    }


def measure(maps: Tensor, kept: dict[str, Tensor]) -> dict[str, float]:
    """Image AUROC; pixel AUROC and AUPRO at half the resolution, to save time."""
    image = metrics.image_metrics(kept["labels"].numpy(), image_score(maps).cpu().numpy())
    masks = kept["masks"][:, ::2, ::2].numpy()
    if not masks[kept["labels"].numpy()].any(axis=(1, 2)).all():  # some defects have no mask
        return {"image_auroc": round(image["image_auroc"], 5)}
    figures = image | metrics.pixel_metrics(maps[:, ::2, ::2].cpu().numpy(), masks)
    return {name: round(figures[name], 5) for name in ("image_auroc", "pixel_auroc", "aupro")}


@torch.no_grad()
def judged(model: clflow.CLFlow, held_out: Tensor, tests: Tensor) -> list[list[Tensor]]:
    """The experts' energies of the test images, batch by batch, after a calibration on the held-out ones."""
    model.calibrate(model.expert_energies(model.code_map(x.float())) for x in held_out.split(8))
    return [model.expert_energies(model.code_map(x.float())) for x in tests.split(8)]


@torch.no_grad()
def joined_maps(model: clflow.CLFlow, energies: list[list[Tensor]]) -> Tensor:
    return torch.cat([model.maps(batch) for batch in energies])


@torch.no_grad()
def nearest_maps(model: clflow.CLFlow, x: Tensor, local: bool) -> Tensor:
    """The maps of methods/nearest.py on the same prototypes."""
    energies = (scaled_distances(model.prototypes, batch.float(), local, model.dtype) for batch in x.split(8))
    return torch.cat([anomaly_map(e, model.shape) for e in energies])


def training_rows(kept: dict[str, Tensor], trained_on: list[int]) -> tuple[GoodRows, Rows]:
    """Rows of the good images that are trained on, and of the defects that are painted on these."""
    good = as_rows(kept["good"][trained_on])
    numbers = torch.full((len(kept["good"]),), -1)
    numbers[trained_on] = torch.arange(len(trained_on))
    copied_from = numbers[kept["copied_from"]]
    copies = as_rows(kept["copies"][copied_from >= 0])
    copied_images = origins(copies, copied_from[copied_from >= 0])
    painted_on = numbers[kept["painted_on"]]
    order = painted_on.argsort(stable=True)
    order = order[painted_on[order] >= 0]
    painted = Rows(kept["anomalous"][order], painted_on[order])
    everywhere = torch.ones(kept["good"].shape[2:], dtype=torch.bool)
    images = origins(good, range(len(trained_on)))
    normal_images = torch.cat((images, copied_images[::COPIED]))
    normal = GoodRows(torch.cat((good, copies[::COPIED])), normal_images, len(good), everywhere)
    return normal, painted


def experiment(kept: dict[str, Tensor], settings: CLFlowSettings, device: str, is_default: bool) -> dict:
    """Train on kept features. Returns the metrics after the last epoch, and the seconds for bank and training. For the
    default it also returns the metrics of each single expert and of the nearest neighbour."""
    torch.manual_seed(settings.seed)
    model = clflow.CLFlow(settings).eval().to(device)
    held_out, trained_on = split(list(range(len(kept["good"]))), settings.seed)
    trained_on = sorted(trained_on)
    normal, painted = training_rows(kept, trained_on)
    started = time.perf_counter()
    model.fit(*candidates(model, normal, GoodImages([], trained_on)), int(normal.inside.sum()))
    for _ in clflow.epochs(model, Feed(model, normal, painted), ALONE):
        pass
    seconds = round(time.perf_counter() - started, 1)
    energies = judged(model, kept["good"][held_out], kept["tests"])
    figures = measure(joined_maps(model, energies), kept) | {"seconds": seconds}
    if is_default:
        for expert, name in enumerate(("flow", "distance", "classifier")):
            alone = torch.cat([anomaly_map(batch[expert], model.shape) for batch in energies])
            figures[name] = measure(alone, kept)
        for name, local in (("nearest, local scale", True), ("nearest", False)):
            figures[name] = measure(nearest_maps(model, kept["tests"], local), kept)
    return figures


def kept_features(
    category: Path, args: argparse.Namespace, size: int = CLFlowSettings.size
) -> dict[str, Tensor | float]:
    """The result of `extract`, made now or in an earlier call; its features are on args.device."""
    cache = args.out / f"{category.resolve().name}.pt"
    if not cache.exists():
        images = len(folders.list_images(folders.good_folder(category)))
        size = input_size(size, folders.list_images(folders.good_folder(category)))
        facts = {"images": images, "held_out": held_out_count(images), "size": size}
        settings = CLFlowSettings(backbone=args.backbone, int8=args.int8, **facts)
        write_atomically(cache, lambda to: torch.save(extract(category, settings, args.weights, args.device), to))
    kept = torch.load(cache, weights_only=True)
    if "copied_from" not in kept:
        sys.exit(f"error: {cache} comes from an earlier version; remove it")
    for part in ("good", "copies", "anomalous", "tests"):
        kept[part] = kept[part].to(args.device)
    return kept


def settings_of(kept: dict[str, Tensor | float], backbone: str, seed: int, changed: dict) -> CLFlowSettings:
    """The default settings of an experiment on kept features, with some settings `changed`."""
    images = len(kept["good"])
    facts = {"images": images, "held_out": held_out_count(images)}
    size = tuple(kept["masks"].shape[1:])
    return CLFlowSettings(seed=seed, backbone=backbone, size=size, **facts, **changed)


def run_category(category: Path, args: argparse.Namespace) -> None:
    """Compute the missing results of a category, seed by seed."""
    name = category.resolve().name
    results = args.out / f"{name}.jsonl"
    done = {(row["variant"], row["seed"]) for row in read_results(results)}
    kept = kept_features(category, args)
    for seed, variant in itertools.product(range(args.seeds), args.variants):
        if (variant, seed) in done:
            continue
        started = time.perf_counter()
        changed = VARIANTS[variant]
        settings = settings_of(kept, args.backbone, seed, changed)
        row = {"category": name, "variant": variant, "seed": seed}
        row |= experiment(kept, settings, args.device, is_default=not changed)
        with open(results, "a") as file:
            file.write(json.dumps(row) + "\n")
        seconds = time.perf_counter() - started
        print(f"{name}, seed {seed}, {variant}: {row['image_auroc']:.4f}, {seconds:.0f} s", flush=True)


def read_results(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def compare(categories: list[Path], out: Path, before: str, after: str) -> None:
    """Print one line per category, then the paired test over the categories."""
    means = []
    for category in categories:
        name = category.resolve().name
        found = {(row["variant"], row["seed"]): row["image_auroc"] for row in read_results(out / f"{name}.jsonl")}
        seeds = sorted(seed for variant, seed in found if variant == before and (after, seed) in found)
        if not seeds:
            continue
        pairs = np.array([(found[before, seed], found[after, seed]) for seed in seeds])
        means.append(pairs.mean(axis=0))
        print(f"{name}: {pairs[:, 0].mean():.4f} -> {pairs[:, 1].mean():.4f}, {len(seeds)} seeds")
    gains = np.diff(means, axis=1)[:, 0]
    t, p = stats.ttest_1samp(gains, 0)
    first, second = np.mean(means, axis=0)
    print(
        f"mean {first:.4f} -> {second:.4f}; gain {gains.mean():+.4f} over {len(gains)} categories, "
        f"t = {t:.2f}, p = {p:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("categories", type=Path, nargs="+")
    add("--out", type=Path, required=True, help="folder for features and results")
    add("--weights", help="file with the backbone's ImageNet weights")
    add("--backbone", default="resnet18")
    int8 = "features in 8-bit integers where that is fast, as in train.py (default: yes)"
    add("--int8", action=argparse.BooleanOptionalAction, default=True, help=int8)
    add("--seeds", type=int, default=3)
    add("--device", default="cpu")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    add(
        "--compare",
        nargs=2,
        metavar=("BEFORE", "AFTER"),
        help="compare the results of two variants; nothing is trained",
    )
    args = parser.parse_args()
    if args.compare:
        compare(args.categories, args.out, *args.compare)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    for category in args.categories:
        run_category(category, args)


if __name__ == "__main__":
    main()
