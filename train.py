"""Train CL-Flow on a folder of good images: python train.py --data mvtec/bottle; without --data, on a drawn demo."""
import argparse
import csv
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from scipy import ndimage
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import evaluate
from clflow import (
    CLFlow,
    classification_loss,
    contrast_cosine,
    contrast_energy,
    energy,
    load_imagenet_weights,
    nll_loss,
    write_atomically,
)
from synth import InputError, good_images, list_images, read_image, synthesize

# ---------------------------------------------------------------- the embedded demo

DEMO = {"train/good": 80, "test/good": 20, "test/crack": 10, "test/chip": 10, "test/stain": 10, "test/blocked": 10}


def draw_button(rng: np.random.Generator, defect: str) -> tuple[np.ndarray, np.ndarray]:
    """A four-hole button on cloth, with natural variation, and the mask of its `defect` (or "good"), both at 256 x 256.

    Drawn with code of its own: were it shared with synth.py, the demo would test what it was trained on.
    """
    n = 512  # twice the final size; the reduction smooths the edges
    y, x = np.mgrid[:n, :n] - (n / 2 + rng.uniform(-16, 16, 2))[:, None, None]
    radius, turn, light = rng.uniform(184, 192), rng.uniform(0, np.pi), rng.uniform(-2.6, -2.1)
    distance = np.hypot(y, x)
    weave = np.sin(np.arange(n) * 0.55 + rng.uniform(0, 6))[:, None] + np.sin(np.arange(n) * 0.63)
    cloth = 0.82 + 0.02 * weave + rng.normal(0, 0.02, (n, n))
    relief = np.cos(distance / radius * 8)  # a rim, a groove and a raised middle
    body = 0.40 + 0.08 * relief + 0.05 * (x * np.cos(light) + y * np.sin(light)) / radius
    u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    body += 0.025 * np.sin(v / 9 + 2 * np.sin(u / 60 + rng.uniform(0, 6))) + rng.normal(0, 0.015, (n, n))  # grain
    disc = distance < radius
    holes = [np.hypot(u - i, v - j) < 20 for i in (-42, 42) for j in (-42, 42)]
    a, r = rng.uniform(0, 2 * np.pi), rng.uniform(70, 150)  # where the defect is
    near = np.hypot(y - r * np.sin(a), x - r * np.cos(a))
    mask = np.zeros((n, n), dtype=bool)
    if defect == "chip":
        mask = disc & (np.hypot(y - radius * np.sin(a), x - radius * np.cos(a))
                       < rng.uniform(18, 34) + 4 * np.sin(9 * np.arctan2(y, x)))
        disc &= ~mask
    elif defect == "blocked":
        mask = holes.pop(rng.integers(4))
    image = np.where(disc & ~np.any(holes, axis=0), body, cloth - 0.25 * np.any(holes, axis=0))
    tint = np.where(disc[..., None], [1.15, 0.95, 0.75], [0.98, 1.0, 1.02])
    image = image[..., None] * tint * rng.uniform(0.96, 1.04)
    if defect == "stain":
        mask = (near < rng.uniform(14, 28) * (1 + 0.3 * np.sin(3 * np.arctan2(y, x) * 2 + a))) & disc
        image *= 1 - rng.uniform(0.25, 0.45) * ndimage.gaussian_filter(mask.astype(float), 3)[..., None]
    elif defect == "crack":
        canvas = Image.new("1", (n, n))
        steps = np.cumsum(rng.normal([np.cos(a + 1.2), np.sin(a + 1.2)], 0.6, (14, 2)) * 9, axis=0)
        start = np.array([n / 2 + r * np.cos(a), n / 2 + r * np.sin(a)]) - steps[7]
        ImageDraw.Draw(canvas).line([tuple(p) for p in start + steps], fill=1, width=int(rng.integers(4, 8)))
        mask = np.asarray(canvas) & disc
        image *= np.where(mask, rng.uniform(0.3, 0.6), 1)[..., None]
    image = image.reshape(n // 2, 2, n // 2, 2, 3).mean(axis=(1, 3)).clip(0, 1)
    return (image * 255).astype(np.uint8), mask.reshape(n // 2, 2, n // 2, 2).any(axis=(1, 3))


def draw_demo(data: Path, counts: dict[str, int] = DEMO, seed: int = 0) -> None:
    """Draw the demo's category into `data`, in MVTec AD layout; the same files for the same seed."""
    for k, (name, count) in enumerate(counts.items()):
        folder, defect = data / name, Path(name).name
        truth = data / "ground_truth" / defect
        for path in (folder, truth) if defect != "good" else (folder,):
            path.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            image, mask = draw_button(np.random.default_rng([seed, k, i]), defect)
            Image.fromarray(image).save(folder / f"{i:03}.png")
            if defect != "good":
                Image.fromarray(mask).save(truth / f"{i:03}_mask.png")


# ---------------------------------------------------------------- training pairs

class Pairs(Dataset):
    """x+, x- = synth(x+), mask M: (3, size, size) float32, (3, size, size) float32, (1, size, size) float32.

    Each draw is seeded by (seed, epoch, index), so that it depends neither on the workers nor on the order. Small
    sets are repeated to at least `EPOCH` images: an epoch is then long enough to learn from, whatever the set.
    """

    EPOCH = 200
    CACHE = 4e9  # bytes of decoded images to keep; more files than that are decoded anew each time

    def __init__(self, files: list[Path], textures: list[Path], size: int, seed: int):
        self.size, self.seed, self.epoch, self.files, self.textures = size, seed, 0, files, textures
        fits = (len(files) + len(textures)) * size * size * 6 < self.CACHE
        self.cache = {path: self.read(path).astype(np.float16) for path in files + textures} if fits else {}

    def read(self, path: Path) -> np.ndarray:
        return read_image(path, self.size)

    def image(self, path: Path) -> np.ndarray:
        return self.cache[path].astype(np.float32) if path in self.cache else self.read(path)

    def __len__(self) -> int:
        return len(self.files) * math.ceil(self.EPOCH / len(self.files))

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        rng = np.random.default_rng([self.seed, self.epoch, index])
        image = self.image(self.files[index % len(self.files)])
        sources = self.textures if self.textures and rng.random() < 0.5 else self.files
        anomalous, mask, _ = synthesize(image, rng, self.image(sources[rng.integers(len(sources))]))
        return (*(torch.from_numpy(x).permute(2, 0, 1) for x in (image, anomalous)), torch.from_numpy(mask)[None].float())


def sample(values: Tensor, count: int) -> Tensor:
    """`count` random rows of `values`, with replacement."""
    return values[torch.randint(len(values), (count,), device=values.device)]


def losses(scales: list[tuple[Tensor, Tensor]], mask: Tensor, args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """NLL, classification and contrast of one batch; `scales` holds z, log_det of x+ and x- stacked along B."""
    energies, classification, contrast = [], [], []
    for z, log_det in scales:
        (z_normal, z_anomalous), (normal, anomalous) = z.chunk(2), energy(z, log_det).chunk(2)
        energies.append(normal)
        touched = F.adaptive_max_pool2d(mask, z.shape[2:])[:, 0] > 0  # a thin scratch still marks its positions
        a, n = sample(anomalous[touched], 512), sample(normal.flatten(), 512)
        classification.append(classification_loss(n, a, args.smoothing, args.temperature))
        if args.contrast == "energy":
            contrast.append(contrast_energy(a, n, args.temperature))
        else:
            places = sample(touched.nonzero(), 512).unbind(dim=1)
            box, negative, pull = (x.permute(0, 2, 3, 1) for x in (z_normal, z_anomalous, z_normal))
            contrast.append(contrast_cosine(box[places], negative[places], sample(pull.flatten(0, 2), 512), args.temperature))
    return nll_loss(energies), torch.stack(classification).mean(), torch.stack(contrast).mean()


# ---------------------------------------------------------------- the job

@torch.no_grad()
def fit_norms(model: CLFlow, files: list[Path], rng: np.random.Generator) -> None:
    """Fit the whitening of each scale on at most 64 normal images."""
    chosen = [files[i] for i in rng.permutation(len(files))[:64]]
    features = zip(*(model.features(images) for images in evaluate.batches(chosen, model.size)), strict=True)
    for norm, maps in zip(model.norms, features, strict=True):
        norm.fit(torch.cat([m.permute(0, 2, 3, 1).flatten(0, 2) for m in maps]))


@torch.no_grad()
def calibrate(model: CLFlow, files: list[Path]) -> None:
    """What held-out normal images look like to the trained model: their scores, and the typical level of their maps."""
    maps = torch.cat([model.anomaly_map(images) for images in evaluate.batches(files, model.size)])
    model.normal_scores = maps.amax(dim=(1, 2)).sort().values
    model.normal_level.copy_(maps.median())


def train(args: argparse.Namespace, data: Path, out: Path) -> CLFlow:
    """Train on the good images of `data`, calibrate on those held out, write model.pt and log.csv into `out`."""
    files = good_images(data)
    if len(files) < 2:
        raise InputError(f"--data {data}: one good image is not enough; training needs two, and better twenty")
    textures = texture_images(args.textures)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    order = rng.permutation(len(files))
    held_out = max(1, round(0.1 * len(files)))
    train_files, held_files = [files[i] for i in order[held_out:]], [files[i] for i in order[:held_out]]
    settings = {k: v for k, v in vars(args).items() if k not in ("data", "out", "weights", "textures", "device")}
    model = CLFlow({**settings, "data": str(data.resolve()), "category": data.resolve().name})
    load_imagenet_weights(model.backbone, args.backbone, args.weights)
    model.to(args.device)
    fit_norms(model, train_files, rng)
    pairs = Pairs(train_files, textures, args.size, args.seed)
    loader = DataLoader(pairs, args.batch, shuffle=True, drop_last=len(pairs) >= args.batch,
                        num_workers=min(4, os.cpu_count() or 1))
    optimizer = torch.optim.Adam(model.flows.parameters(), lr=args.lr, weight_decay=1e-5)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.epochs * len(loader), pct_start=0.1)
    start, rows = time.perf_counter(), []
    for epoch in range(1, args.epochs + 1):
        pairs.epoch, began, sums, seen = epoch, time.perf_counter(), np.zeros(4), 0
        for normal, anomalous, mask in loader:
            nll, classification, contrast = losses(model(torch.cat((normal, anomalous))), mask.to(args.device), args)
            loss = nll + args.classification_weight * classification + args.contrast_weight * contrast
            if not loss.isfinite():
                raise InputError(f"--lr {args.lr}: the loss is no longer finite in epoch {epoch}; try a lower one")
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.flows.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            seen += len(normal)
            sums += len(normal) * np.array([x.item() for x in (loss, nll, classification, contrast)])
        speed = seen / (time.perf_counter() - began)
        rows.append([epoch, *(sums / seen).round(5), round(speed, 2)])
        left = (time.perf_counter() - start) / epoch * (args.epochs - epoch)
        print(f"epoch {epoch}/{args.epochs}  loss {rows[-1][1]:.3f}  NLL per dimension {rows[-1][2]:.3f}  "
              f"classification {rows[-1][3]:.3f}  contrast {rows[-1][4]:.3f}  {speed:.1f} images/s  {left:.0f} s left", flush=True)
    calibrate(model.eval(), held_files)
    model.save(out / "model.pt")
    write_atomically(out / "log.csv", lambda file: write_log(file, rows))
    return model


def write_log(path: Path, rows: list[list[float]]) -> None:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["epoch", "loss", "nll", "classification", "contrast", "images_per_second"], *rows])


def texture_images(folder: str | None) -> list[Path]:
    """Images in `folder` and in its subfolders (as DTD has them); none without a folder."""
    if folder is None:
        return []
    if not Path(folder).is_dir():
        raise InputError(f"--textures {folder}: no such folder")
    files = [f for d in [Path(folder), *sorted(p for p in Path(folder).rglob("*") if p.is_dir())] for f in list_images(d)]
    if not files:
        raise InputError(f"--textures {folder}: no images in it")
    return files


def options() -> argparse.ArgumentParser:
    parser = evaluate.Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, help="category with train/good; without it, a demo is drawn and evaluated")
    add("--out", type=Path, help="folder for model.pt and log.csv (default: runs/<category>)")
    add("--backbone", help="a ResNet of torchvision or efficientnet_lite0 (default: resnet18; for the demo the latter)")
    add("--weights", help="file with the backbone's ImageNet weights, instead of a download")
    add("--textures", help="folder of texture photographs to paint defects from, beside the normal images themselves")
    add("--epochs", type=int, default=12)
    add("--batch", type=int, default=16)
    add("--lr", type=float, default=2e-3, help="peak learning rate of a one-cycle schedule")
    add("--size", type=int, default=256, help="images are resized to SIZE x SIZE pixels")
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="auto, cpu, cuda, ...")
    paper = parser.add_argument_group("what the paper leaves open")
    add = paper.add_argument
    add("--classification-weight", type=float, default=0.02, help="weight a of the smoothed classification")
    add("--contrast-weight", type=float, default=0.02, help="weight b of the contrastive loss")
    add("--contrast", choices=("energy", "cosine"), default="energy", help="form of the InfoNCE loss")
    add("--smoothing", type=float, default=0.1, help="label smoothing of the classification")
    add("--temperature", type=float, default=1.0, help="temperature of both proxy tasks")
    add("--score", choices=("nll", "fastflow"), default="nll", help="anomaly map: exact likelihood or FastFlow's form")
    add("--steps", type=int, default=8, help="flow steps per scale")
    add("--kernels", type=int, nargs="+", default=[3], help="kernel sizes, alternating over the steps")
    add("--hidden-ratio", type=float, default=1.0, help="width of the subnets")
    return parser


def main() -> None:
    args = options().parse_args()
    demo = args.data is None
    for flag, low, high in (("epochs", 1, 100000), ("size", 64, 4096), ("batch", 1, 4096), ("steps", 1, 64)):
        if not low <= (value := getattr(args, flag)) <= high:
            raise InputError(f"--{flag} {value}: out of range, give {low} to {high}")
    args.backbone = args.backbone or ("efficientnet_lite0" if demo else "resnet18")
    args.device = evaluate.pick_device(args.device)
    out = args.out or Path("runs", "demo" if demo else args.data.resolve().name)
    out.mkdir(parents=True, exist_ok=True)
    data = args.data
    if demo:
        data = out / "data"
        draw_demo(data)
    model = train(args, data, out)
    print(f"wrote {out / 'model.pt'}; next: python evaluate.py {out}")
    if demo:
        evaluate.report(model, data, out)


if __name__ == "__main__":
    evaluate.run(main)
