"""Train CL-Flow on good images: python train.py --data mvtec/bottle; without --data, on a demo that it draws."""
import argparse
import json
import os
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from scipy import ndimage
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import clflow
import evaluate
from clflow import CLFlow
from synth import InputError, good_images, list_images, read_image, synthesize


class Pairs(Dataset):
    """x+, x- = synth(x+) and its mask: (3, size, size), (3, size, size) and (1, size, size) float32. Each is seeded by
    (seed, epoch, index), whatever the workers and the order. Small sets are repeated, to about EPOCH pairs in an epoch.
    Decoded images are kept, up to CACHE bytes in all."""
    EPOCH, CACHE = 100, 4e9

    def __init__(self, files: list[Path], textures: list[Path], size: int, seed: int):
        self.size, self.seed, self.epoch, self.files, self.textures, self.cache = size, seed, 0, files, textures, {}
        for path in (files + textures)[:int(self.CACHE / (6 * size * size))]:
            self.cache[path] = read_image(path, size).astype(np.float16)

    def image(self, path: Path) -> np.ndarray:
        return self.cache[path].astype(np.float32) if path in self.cache else read_image(path, self.size)

    def __len__(self) -> int:
        return len(self.files) * max(1, round(self.EPOCH / len(self.files)))

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        rng = np.random.default_rng([self.seed, self.epoch, index])
        image = self.image(self.files[index % len(self.files)])
        sources = self.textures if self.textures and rng.random() < 0.5 else self.files
        anomalous, mask, _ = synthesize(image, rng, self.image(sources[rng.integers(len(sources))]))
        return tuple(torch.from_numpy(x).permute(2, 0, 1) for x in (image, anomalous, np.float32(mask[..., None])))


def sample(values: Tensor, count: int = 512) -> Tensor:
    """`count` random rows of `values`, with replacement."""
    return values[torch.randint(len(values), (count,), device=values.device)]


def losses(scales: list[tuple[Tensor, Tensor]], mask: Tensor, args: argparse.Namespace) -> tuple[Tensor, ...]:
    """NLL, classification and contrast of a batch; scales: z and log_det of x+ and x-, stacked along the batch."""
    energies, classification, contrast = [], [], []
    for z, log_det in scales:
        normal, anomalous = clflow.energy(z, log_det).chunk(2)
        coverage = F.adaptive_max_pool2d(mask, z.shape[2:])  # the maximum: a thin scratch still marks its positions
        touched, near = coverage[:, 0] > 0, F.max_pool2d(coverage, 3, stride=1, padding=1)[:, 0] > 0
        # Beside a defect features should still be likely: the map then does not spill over.
        energies.append(torch.cat((normal.flatten(), clflow.tamed(anomalous[~near]))))
        a, n = (clflow.tamed(sample(e)) for e in (anomalous[touched], normal.flatten()))
        classification.append(clflow.classification_loss(n, a, args.smoothing, args.temperature))
        if args.contrast == "energy":
            contrast.append(clflow.contrast_energy(a, n, args.temperature))
        else:
            box = touched.any(dim=2, keepdim=True) & touched.any(dim=1, keepdim=True)
            places, (z_normal, z_anomalous) = sample(box.nonzero()).unbind(dim=1), z.permute(0, 2, 3, 1).chunk(2)
            contrast.append(clflow.contrast_cosine(
                z_normal[places], z_anomalous[places], sample(z_normal.flatten(0, 2)), args.temperature))
    return clflow.nll_loss(energies), torch.stack(classification).mean(), torch.stack(contrast).mean()


@torch.no_grad()
def fit_norms(model: CLFlow, files: list[Path]) -> None:
    """Fit the whitening of each scale on at most 64 normal images."""
    features = zip(*(model.features(images) for images in evaluate.batches(files[:64], model.size)), strict=True)
    for norm, maps in zip(model.norms, features, strict=True):
        norm.fit(torch.cat([m.permute(0, 2, 3, 1).flatten(0, 2) for m in maps]))


@torch.no_grad()
def calibrate(model: CLFlow, files: list[Path]) -> None:
    """What held-out normal images look like to the trained model: its `levels`, `normal_scores` and `normal_peaks`."""
    scales = zip(*(model.energies(images) for images in evaluate.batches(files, model.size)), strict=True)
    energies = [torch.cat(scale) for scale in scales]
    model.levels.copy_(torch.stack([e.median() for e in energies]))
    maps = clflow.combine(energies, model.levels, model.size)[:, 0]
    model.normal_scores, model.normal_peaks = clflow.image_score(maps), maps.amax(dim=(1, 2))


LOG = ("epoch", "loss", "nll", "classification", "contrast", "images_per_second")


def train_epoch(model: CLFlow, loader: DataLoader, optimizer: torch.optim.Optimizer,
                schedule: torch.optim.lr_scheduler.LRScheduler, args: argparse.Namespace, log: list) -> None:
    """One pass over the pairs; appends its row, the means of the losses, to `log`."""
    start, rows, epoch = time.perf_counter(), [], len(log) + 1
    loader.dataset.epoch = epoch
    torch.manual_seed(args.seed + 2**32 * epoch)  # so that --resume need not know the generator's state
    for normal, anomalous, mask in loader:
        nll, classification, contrast = losses(model(torch.cat((normal, anomalous))), mask.to(args.device), args)
        loss = nll + args.classification_weight * classification + args.contrast_weight * contrast
        if not loss.isfinite():
            raise InputError(f"--lr {args.lr}: training diverged, the loss is {loss.item()}; try a lower learning rate")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.flows.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        rows.append([x.item() for x in (loss, nll, classification, contrast)])
    seconds, means = time.perf_counter() - start, np.mean(rows, axis=0).round(5).tolist()
    log.append([epoch, *means, round(len(loader.dataset) / seconds, 2)])
    print(f"epoch {epoch}/{args.epochs}: loss {means[0]:.3f}, NLL per dimension {means[1]:.3f}, classification "
          f"{means[2]:.3f}, contrast {means[3]:.3f}, {log[-1][-1]:.1f} images/s, "
          f"{seconds * (args.epochs - epoch):.0f} s left", flush=True)


def write_log(log: list, out: Path) -> None:
    """log.csv and its picture, loss.png."""
    text = "".join(",".join(map(str, row)) + "\n" for row in (LOG, *log))
    evaluate.write_atomically(out / "log.csv", partial(Path.write_text, data=text))
    lines = {name: [(row[0], row[k]) for row in log] for k, name in enumerate(LOG) if 1 < k < 5}
    evaluate.save_picture(evaluate.draw_chart("losses by epoch", lines), out / "loss.png")


def fit(model: CLFlow, pairs: Pairs, held_files: list[Path], args: argparse.Namespace, out: Path) -> None:
    """The training loop, from the epoch that `model.progress` has reached. Until it ends, state.pt has all that
    --resume needs; stopped by Ctrl-C, it leaves a calibrated model.pt too."""
    loader = DataLoader(pairs, args.batch, shuffle=True, num_workers=min(4, os.cpu_count() or 1))
    optimizer = torch.optim.Adam(model.flows.parameters(), lr=args.lr, weight_decay=1e-5)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.epochs * len(loader), pct_start=0.11)
    log, interrupt = [], None
    if model.progress:
        log = model.progress["log"]
        optimizer.load_state_dict(model.progress["optimizer"])
        schedule.load_state_dict(model.progress["schedule"])

    def save() -> None:
        state = {"log": log, "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        evaluate.write_atomically(out / "state.pt", partial(model.save, progress=state))

    save()
    try:
        while len(log) < args.epochs:
            train_epoch(model, loader, optimizer, schedule, args, log)
            save()
            write_log(log, out)
            if args.keep_epochs:
                calibrate(model, held_files)
                evaluate.write_atomically(out / f"epoch_{len(log):02}.pt", model.save)
    except KeyboardInterrupt as error:
        interrupt = error
        print(f"stopped; {out / 'model.pt'} gets what was learnt so far, --resume goes on after epoch {len(log)}")
    calibrate(model, held_files)
    evaluate.write_atomically(out / "model.pt", model.save)
    if interrupt:
        raise interrupt
    (out / "state.pt").unlink()  # a run without it is finished


def resumed(out: Path, settings: dict) -> CLFlow | None:
    """What --resume goes on from: the unfinished run in `out`, or the finished one (without `progress`), or None.
    Raises InputError if it was started with other options."""
    for file in (out / "state.pt", out / "model.pt"):
        if file.exists():
            model = CLFlow.load(file)
            if changed := [k for k, v in settings.items() if model.settings.get(k) != v]:
                raise InputError(f"--resume: {out} was started with {changed[0]} {model.settings.get(changed[0])}, not "
                                 f"{settings[changed[0]]}; give the same options, or another --out")
            return model
    return None


def train(args: argparse.Namespace, out: Path) -> bool:
    """Train on good images and calibrate on a tenth of them that is held out; model.pt, log.csv and loss.png in `out`.
    Returns whether there was anything left to do."""
    files = evaluate.usable(good_images(args.data), args.skip_bad)
    textures = list_images(Path(args.textures), "**/*") if args.textures else []
    if len(files) < 2:
        raise InputError(f"--data {args.data}: one good image is not enough; training takes two, and better twenty")
    if args.textures and not textures:
        raise InputError(f"--textures {args.textures}: no such folder, or no images in it")
    order, held_out = np.random.default_rng(args.seed).permutation(len(files)), max(1, round(len(files) / 10))
    held_files, train_files = ([files[i] for i in part] for part in (order[:held_out], order[held_out:]))
    passing = ("out", "weights", "device", "seeds", "resume", "keep_epochs")  # no part of what is learnt
    settings = {**{k: v for k, v in vars(args).items() if k not in passing},
                "data": str(args.data.resolve()), "held_out": held_out}
    model = resumed(out, settings) if args.resume else None
    if model and not model.progress:
        print(f"{out} is finished already")
        return False
    pairs = Pairs(train_files, textures, args.size, args.seed)
    if model:
        print(f"resuming {out} after epoch {len(model.progress['log'])}")
        model.to(args.device)
    else:
        torch.manual_seed(args.seed)
        model = CLFlow(settings).eval()
        clflow.load_imagenet_weights(model.backbone, args.backbone, args.weights)
        fit_norms(model.to(args.device), train_files)
    fit(model, pairs, held_files, args, out)
    print(f"wrote {out / 'model.pt'}; python evaluate.py {out} judges it")
    return True


DEMO = {"train/good": 80, "test/good": 20, "test/crack": 10, "test/chip": 10, "test/stain": 10, "test/blocked": 10}


def draw_button(rng: np.random.Generator, defect: str) -> tuple[np.ndarray, np.ndarray]:
    """A four-hole button on cloth, (256, 256, 3) uint8, and the mask of its `defect` ("good": none), (256, 256) bool.
    Drawn with code of its own: shared with synth.py, the demo would test nothing but what it was trained on."""
    n = 512  # drawn at twice the size; the reduction smooths the edges
    y, x = np.mgrid[:n, :n] - (n / 2 + rng.uniform(-16, 16, 2))[:, None, None]
    radius, turn, place, reach = rng.uniform((184, 0, 0, 70), (192, np.pi, 2 * np.pi, 150))
    u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    distance, angle, noise = np.hypot(y, x), np.arctan2(y, x), rng.normal(0, 0.015, (n, n))
    weave = np.sin(0.55 * np.arange(n) + rng.uniform(0, 6))[:, None] + np.sin(0.63 * np.arange(n))
    grain = np.sin(v / 9 + 2 * np.sin(u / 60 + rng.uniform(0, 6)))
    cloth = 0.82 + 0.02 * weave + noise
    body = 0.40 + 0.08 * np.cos(distance / radius * 8) - 0.05 * (x + 1.5 * y) / radius + 0.025 * grain + noise
    disc, mask = distance < radius, np.zeros((n, n), dtype=bool)
    holes = [np.hypot(u - i, v - j) < 20 for i in (-42, 42) for j in (-42, 42)]
    to_rim, to_spot = (np.hypot(y - r * np.sin(place), x - r * np.cos(place)) for r in (radius, reach))
    if defect == "chip":
        mask = disc & (to_rim < rng.uniform(18, 34) + 4 * np.sin(9 * angle))
        disc = disc & ~mask
    elif defect == "blocked":
        mask = holes.pop(rng.integers(4))
        body = np.where(mask, rng.uniform(0.55, 0.7), body)  # with glue
    elif defect == "stain":
        mask = disc & (to_spot < rng.uniform(14, 28) * (1 + 0.3 * np.sin(6 * angle)))
        body -= 0.2 * rng.uniform(0.6, 1) * ndimage.gaussian_filter(mask.astype(float), 3)
    elif defect == "crack":
        steps = np.cumsum(rng.normal((np.cos(place + 1.2), np.sin(place + 1.2)), 0.6, (14, 2)) * 9, axis=0)
        points = n / 2 + reach * np.array([np.cos(place), np.sin(place)]) + steps - steps[7]
        canvas = Image.new("1", (n, n))
        ImageDraw.Draw(canvas).line([tuple(p) for p in points], fill=1, width=int(rng.integers(4, 8)))
        mask = np.asarray(canvas) & disc
        body = np.where(mask, body * rng.uniform(0.3, 0.6), body)
    hole = np.any(holes, axis=0)
    tint = rng.uniform(0.96, 1.04) * np.where(disc[..., None], (1.15, 0.95, 0.75), (0.98, 1.0, 1.02))
    image = (np.where(disc & ~hole, body, cloth - 0.25 * hole)[..., None] * tint).reshape(n // 2, 2, n // 2, 2, 3)
    return (image.mean(axis=(1, 3)).clip(0, 1) * 255).astype(np.uint8), mask[::2, ::2]


def draw_demo(data: Path, counts: dict[str, int] = DEMO) -> None:
    """Draw the demo's category into `data`, in MVTec AD layout; the same images every time."""
    for k, (name, count) in enumerate(counts.items()):
        defect = Path(name).name
        for i in range(count):
            image, mask = draw_button(np.random.default_rng([k, i]), defect)
            files = {f"{name}/{i:03}.png": image, f"ground_truth/{defect}/{i:03}_mask.png": mask}
            for file, pixels in files.items() if mask.any() else [*files.items()][:1]:
                (data / file).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(data / file)


def options() -> argparse.ArgumentParser:
    parser = evaluate.Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, help="folder with train/good, or of good images, or of such folders; without it, "
        "a demo is drawn, learnt and evaluated")
    add("--out", type=Path, help="folder for model.pt and log.csv; runs/<category> if not given")
    add("--backbone", help="a ResNet of torchvision, or efficientnet_lite0; resnet18 if not given (demo: the latter)")
    add("--weights", help="file with the backbone's ImageNet weights, instead of a download")
    add("--textures", help="folder of texture photographs to paint defects from, beside the normal images")
    add("--epochs", type=int, default=12)
    add("--batch", type=int, default=8)
    add("--lr", type=float, default=2e-3, help="peak learning rate of a one-cycle schedule")
    add("--size", type=int, default=256, help="images are resized to SIZE x SIZE pixels")
    add("--seed", type=int, default=0)
    add("--seeds", type=int, default=1, help="train this many, from SEED on, and write the table of their results")
    add("--resume", action="store_true", help="go on where a stopped run was after its last whole epoch")
    add("--keep-epochs", action="store_true", help="keep epoch_NN.pt of each epoch, for evaluate.py --curve")
    add("--skip-bad", action="store_true", help="go on without images that cannot be read")
    add("--device", default="auto", help="auto, cpu, cuda, ...")
    add = parser.add_argument_group("what the paper leaves open").add_argument
    add("--classification-weight", type=float, default=0.05, help="weight a of the smoothed classification")
    add("--contrast-weight", type=float, default=0.05, help="weight b of the contrastive loss")
    add("--contrast", choices=("energy", "cosine"), default="energy", help="form of the InfoNCE loss")
    add("--smoothing", type=float, default=0.1, help="label smoothing of the classification")
    add("--temperature", type=float, default=1.0, help="temperature of both proxy tasks")
    add("--score", choices=("nll", "fastflow"), default="nll", help="anomaly map: exact likelihood, or FastFlow's form")
    add("--steps", type=int, default=8, help="flow steps per scale")
    add("--kernels", type=int, nargs="+", default=[3], choices=range(1, 16, 2), help="alternate over the steps")
    return parser


def train_all(args: argparse.Namespace, out: Path, demo: bool) -> None:
    """Train every category in args.data, or args.data itself, with every seed; then evaluate, if there are several."""
    folders = sorted({p.parents[1] for p in args.data.glob("*/train/*") if p.name in ("good", "ok")}) or [args.data]
    several, rows, runs = len(folders) > 1 or args.seeds > 1, [], []
    for folder in folders:
        good_images(folder)  # before hours of training: is there anything in each?
    for folder in folders:
        for seed in range(args.seed, args.seed + args.seeds):
            target = out / folder.name / f"seed{seed}" if several else out
            category = "demo" if demo else folder.resolve().name
            one = argparse.Namespace(**{**vars(args), "data": folder, "seed": seed, "category": category})
            runs.append((folder, target, train(one, target)))
    for folder, target, fresh in runs if several or demo else []:
        if not (folder / "test").is_dir():
            print(f"{folder}: no test images, so nothing to evaluate")
        elif fresh or not (target / "metrics.json").exists():
            rows.append(evaluate.report(CLFlow.load(target / "model.pt", args.device), folder, target))
        else:
            rows.append(json.loads((target / "metrics.json").read_text()))
    if several and rows:
        evaluate.summarize(rows, out)


def main() -> None:
    args = options().parse_args()
    demo = args.data is None
    for flag, low, high in (("epochs", 1, 10000), ("size", 64, 4096), ("batch", 1, 4096), ("steps", 1, 64),
                            ("seed", 0, 2**31), ("seeds", 1, 1000), ("lr", 1e-9, 1), ("temperature", 1e-3, 1e3), ("smoothing", 0, 0.9)):
        if not low <= getattr(args, flag) <= high:
            raise InputError(f"--{flag} {getattr(args, flag)}: out of range, give {low} to {high}")
    args.backbone = args.backbone or ("efficientnet_lite0" if demo else "resnet18")
    args.device = evaluate.pick_device(args.device)
    out = args.out or Path("runs", "demo" if demo else args.data.resolve().name)
    if demo:
        args.data = out / "data"
        draw_demo(args.data)
    train_all(args, out, demo)


if __name__ == "__main__":
    evaluate.run(main)
