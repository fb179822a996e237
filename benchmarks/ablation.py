"""What each part of CL-Flow is worth, on categories in MVTec AD's layout; features are computed once and kept.

python benchmarks/ablation.py mvtec/bottle mvtec/screw --weights FILE --seeds 3 --out ablation

OUT/<category>.pt are the features, OUT/<category>.jsonl the results, a line as each comes. Called again, it goes on."""

import argparse
import itertools
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import clflow  # noqa: E402
from clflow import CLFlowSettings  # noqa: E402
from kit import data, metrics  # noqa: E402
from kit.detector import anomaly_map, image_score  # noqa: E402
from kit.files import write_atomically  # noqa: E402
from kit.good import GoodImages, Pairs, held_out_count, split  # noqa: E402
from kit.images import read_mask  # noqa: E402
from kit.training import Descent, seed_epoch  # noqa: E402
from synth import synthesize  # noqa: E402

GLOBAL = {"local": False, "classification_weight": 0.0}
LIKELIHOOD = {"classification_weight": 0.0}
VARIANTS = {
    "+ classification (the default)": {},
    "likelihood, one scale for all": GLOBAL,
    "likelihood, local scale": LIKELIHOOD,
    "+ contrast of energies 0.1": {"contrast_weight": 0.1},
    "+ contrast by the cosine 0.1": {"contrast_weight": 0.1, "contrast": "cosine"},
    "likelihood and contrast of energies 0.1, without classification": LIKELIHOOD | {"contrast_weight": 0.1},
    "the default with 4 flow steps": {"steps": 4},
    "the default with 4,000 prototypes": {"bank": 4000},
    "the default with 16,000 prototypes": {"bank": 16000},
}


@torch.no_grad()
def extract(category: Path, settings: CLFlowSettings, weights: str | None, device: str) -> dict[str, Tensor]:
    """All features of a category that an experiment needs, with half the bits. Good images are those of seed 0."""
    model = clflow.CLFlow(replace(settings, contrast="cosine", contrast_weight=1.0)).eval()
    model.backbone.load_imagenet(weights)
    model.to(device)
    good = GoodImages(*split(data.list_images(data.good_folder(category)), seed=0))
    tests = data.labelled_images(category)
    pairs = Pairs(good, synthesize, model.settings, clflow.IMAGES_PER_EPOCH)
    normal, _ = clflow.good_rows(model, pairs)
    painted = clflow.painted_rows(model, pairs)

    def features(files: list[Path]) -> Tensor:
        return torch.cat([model.features(batch).half() for batch in data.batches(files, model.size)])

    return {
        "normal": normal,
        "anomalous": painted.anomalous,
        "untouched": painted.untouched,
        "held_out": features(good.held_out),
        "tests": features([test.path for test in tests]),
        "labels": torch.tensor([test.anomalous for test in tests]),
        "masks": torch.stack([torch.from_numpy(read_mask(test.mask, model.size)) for test in tests]),
        "images": torch.tensor(len(good.held_out) + len(good.trained_on)),
    }


def measure(maps: Tensor, kept: dict[str, Tensor]) -> dict[str, float]:
    """Image AUROC; pixel AUROC and AUPRO at half the resolution, to save time."""
    image = metrics.image_metrics(kept["labels"].numpy(), image_score(maps).cpu().numpy())
    pixel = metrics.pixel_metrics(maps[:, ::2, ::2].cpu().numpy(), kept["masks"][:, ::2, ::2].numpy())
    found = image | pixel
    return {name: round(found[name], 5) for name in ("image_auroc", "pixel_auroc", "aupro")}


@torch.no_grad()
def judged(model: clflow.CLFlow, kept: dict[str, Tensor]) -> list[list[Tensor]]:
    """The experts' energies of the test images, batch by batch, after a calibration on the held-out ones."""
    codes = [[model.whitened_map(x.float()) for x in kept[name].split(8)] for name in ("held_out", "tests")]
    model.calibrate(map(model.experts, codes[0]))
    return [model.experts(code) for code in codes[1]]


@torch.no_grad()
def joined_maps(model: clflow.CLFlow, energies: list[list[Tensor]]) -> Tensor:
    return torch.cat([model.maps(batch) for batch in energies])


@torch.no_grad()
def nearest_maps(model: clflow.CLFlow, x: Tensor, local: bool) -> Tensor:
    """The maps of nearest.py on the same prototypes."""
    energies = (model.prototypes.energies(batch.float(), local, model.dtype) for batch in x.split(8))
    return torch.cat([anomaly_map(e, model.size) for e in energies])


def experiment(kept: dict[str, Tensor], settings: CLFlowSettings, device: str, is_default: bool) -> dict:
    """Train on kept features; the figures of the last epoch. Of the default also the image AUROC of each epoch, with
    seed 0, and what single experts and the nearest neighbour alone give."""
    torch.manual_seed(settings.seed)
    model = clflow.CLFlow(settings).eval().to(device)
    unknown = torch.zeros(len(kept["normal"]), dtype=torch.long)  # no image is judged as if it were new
    model.fit(*clflow.candidates(kept["normal"], unknown, GoodImages([], []), settings.seed))
    painted = clflow.PaintedRows(kept["anomalous"], kept["untouched"] if settings.needs_untouched else None)
    feed = clflow.RowFeed(model, kept["normal"], painted, settings.batch)
    losses = clflow.Losses(model)
    descent = Descent(losses, settings.lr, settings.epochs * clflow.STEPS_PER_EPOCH, clflow.WEIGHT_DECAY)
    by_epoch = []
    for epoch in range(1, settings.epochs + 1):
        seed_epoch(settings.seed, epoch)
        for _ in range(clflow.STEPS_PER_EPOCH):
            descent.step(losses(*feed.draw()))
        if (is_default and settings.seed == 0) or epoch == settings.epochs:
            energies = judged(model, kept)
            maps = joined_maps(model, energies)
            scores = image_score(maps).cpu().numpy()
            by_epoch.append(round(metrics.image_metrics(kept["labels"].numpy(), scores)["image_auroc"], 5))
    found = measure(maps, kept) | {"by_epoch": by_epoch}
    if is_default:
        for expert, name in enumerate(("flow", "classifier")):
            alone = torch.cat([anomaly_map(batch[expert], model.size) for batch in energies])
            found[name] = measure(alone, kept)
        for name, local in (("nearest, local scale", True), ("nearest", False)):
            found[name] = measure(nearest_maps(model, kept["tests"], local), kept)
    return found


def kept_features(category: Path, args: argparse.Namespace) -> dict[str, Tensor]:
    """What `extract` found, now or in an earlier call; features on args.device."""
    cache = args.out / f"{category.resolve().name}.pt"
    if not cache.exists():
        images = len(data.list_images(data.good_folder(category)))
        settings = CLFlowSettings(images=images, held_out=held_out_count(images), backbone=args.backbone)
        write_atomically(cache, lambda to: torch.save(extract(category, settings, args.weights, args.device), to))
    kept = torch.load(cache, weights_only=True)
    for part in ("normal", "anomalous", "untouched", "held_out", "tests"):
        kept[part] = kept[part].to(args.device)
    return kept


def run_category(category: Path, args: argparse.Namespace) -> None:
    """All that is missing of a category's results, seed by seed."""
    name = category.resolve().name
    results = args.out / f"{name}.jsonl"
    rows = results.read_text().splitlines() if results.exists() else []
    done = {(row["variant"], row["seed"]) for row in map(json.loads, rows)}
    kept = kept_features(category, args)
    for seed, variant in itertools.product(range(args.seeds), args.variants):
        if (variant, seed) in done:
            continue
        started = time.perf_counter()
        changed = VARIANTS[variant]
        facts = {"images": int(kept["images"]), "held_out": len(kept["held_out"])}
        settings = CLFlowSettings(seed=seed, backbone=args.backbone, **facts, **changed)
        row = {"category": name, "variant": variant, "seed": seed}
        row |= experiment(kept, settings, args.device, is_default=not changed)
        with open(results, "a") as file:
            file.write(json.dumps(row) + "\n")
        seconds = time.perf_counter() - started
        print(f"{name}, seed {seed}, {variant}: {row['image_auroc']:.4f}, {seconds:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("categories", type=Path, nargs="+")
    add("--out", type=Path, required=True, help="folder for features and results")
    add("--weights", help="file with the backbone's ImageNet weights")
    add("--backbone", default="resnet18")
    add("--seeds", type=int, default=3)
    add("--device", default="cpu")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for category in args.categories:
        run_category(category, args)


if __name__ == "__main__":
    main()
