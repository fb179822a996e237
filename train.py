"""Train a detector on good images: python train.py --data mvtec/bottle; without --data, on a demo that it draws."""
import argparse
import json
import os
import sys
import time
from pathlib import Path
from pkgutil import resolve_name

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader, Dataset

import autoencoder
import clflow
import evaluate
from clflow import CLFlow, Detector
from synth import InputError, good_images, list_images, read_image, synthesize


class Pairs(Dataset):
    """Batches of x+, and of x- = synth(x+) for half of them, seeded by (seed, epoch, index), whatever the processes and
    the order. Small sets are repeated, to about `images` per epoch. Decoded images are kept, up to CACHE bytes."""
    CACHE = 4e9

    def __init__(self, files: list[Path], textures: list[Path], size: int, seed: int, images: int):
        self.size, self.seed, self.epoch, self.files, self.textures, self.cache = size, seed, 0, files, textures, {}
        (self.rank, self.world), share = evaluate.processes(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        for path in (files + textures)[:int(self.CACHE / share / (6 * size * size))]:
            self.cache[path] = read_image(path, size).astype(np.float16)
        self.passes = max(1, round(images / len(files)))

    def image(self, path: Path) -> np.ndarray:
        return self.cache[path].astype(np.float32) if path in self.cache else read_image(path, self.size)

    def __len__(self) -> int:
        return len(self.files) * self.passes

    def anomaly(self, index: int, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng([self.seed, self.epoch, index])
        sources = self.textures if self.textures and rng.random() < 0.5 else self.files
        return synthesize(image, rng, self.image(sources[rng.integers(len(sources))]))[:2]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """This process's part of a batch, float32: B images x+, then A = B / 2 ones x- made from the first of them
        (twice as many teach no more), (B + A, 3, size, size), and the masks, (A, 1, size, size)."""
        mine = indices[self.rank % len(indices)::self.world]
        normal = [self.image(self.files[i % len(self.files)]) for i in mine]
        some = max(1, len(range(self.rank, -(-len(indices) // 2), self.world)))
        anomalous, masks = zip(*map(self.anomaly, mine[:some], normal), strict=True)
        images, masks = np.stack([*normal, *anomalous]), np.float32(masks)[..., None]
        return tuple(torch.from_numpy(x).permute(0, 3, 1, 2) for x in (images, masks))


def sample(where: Tensor, count: int) -> Tensor:
    """(B, count) places, with replacement, of those that `where` (B, N) marks: small defects count like large ones."""
    return torch.multinomial(where.float(), count, replacement=True)


def tamed(e: Tensor) -> Tensor:
    """E up to 1, 1 + log E above: on x- E knows no bounds, and few outliers would be all that clipped gradients see."""
    return torch.where(e <= 1, e, 1 + e.clamp(min=1).log())


class Losses(nn.Module):
    """CL-Flow's losses of a batch, by name. A module, since that is what DistributedDataParallel wraps."""
    DEFAULTS, DEMO, EPOCH, DECAY = {"backbone": "resnet18"}, {"backbone": clflow.LITE0}, 100, 1e-5  # EPOCH: images

    def __init__(self, model: CLFlow, args: argparse.Namespace):
        super().__init__()
        self.model, self.args = model, args

    @torch.no_grad()
    def prepare(self, files: list[Path]) -> None:
        """Load the backbone's weights; fit the whitening of each scale on at most 64 normal images."""
        clflow.load_imagenet_weights(self.model.backbone, self.args.backbone, self.args.weights)
        features = zip(*map(self.model.features, evaluate.batches(files[:64], self.model.size)), strict=True)
        for norm, maps in zip(self.model.norms, features, strict=True):
            norm.fit(torch.cat([m.permute(0, 2, 3, 1).flatten(0, 2) for m in maps]))

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """images: B ones x+, then A <= B ones x- that were made from the first of them; mask (A, 1, size, size)."""
        energies, classification, contrast, args = [], [], [], self.args
        for z, log_det in self.model.latents(images):
            normal, anomalous = clflow.energy(z, log_det).flatten(1).split((len(z) - len(mask), len(mask)))
            coverage = F.adaptive_max_pool2d(mask, z.shape[2:])  # the maximum: a thin scratch still marks its positions
            touched, near = coverage > 0, F.max_pool2d(coverage, 3, stride=1, padding=1).flatten(1) > 0
            # Beside a defect features should still be likely: the map then does not spill over.
            energies.append(torch.cat((normal.flatten(), tamed(anomalous[~near]))).mean())
            a, n = tamed(anomalous).gather(1, sample(touched.flatten(1), 128)), tamed(normal[:len(mask)])
            # An image's score is that of its worst positions: half of the sample is from the highest 5 % of x+.
            worst = n.topk(-(-n.shape[1] // 20), dim=1).values
            hard = torch.cat([x.gather(1, sample(torch.ones_like(x), 128)) for x in (n, worst)], dim=1)
            middle = (n.mean(dim=1, keepdim=True) + 4 * n.std(dim=1, keepdim=True)).detach()
            classification.append(clflow.classification_loss(hard, a, middle, args.smoothing, args.temperature))
            if args.contrast == "energy":
                contrast.append(clflow.info_nce(a.flatten(), hard.repeat_interleave(a.shape[1], 0), args.temperature))
            else:
                box = touched.any(dim=2, keepdim=True) & touched.any(dim=3, keepdim=True)
                places, anywhere = (sample(x, -(-512 // len(mask))) for x in (box.flatten(1), torch.ones_like(n)))
                rows = [x.flatten(2).gather(2, i[:, None].expand(-1, x.shape[1], -1)).mT.flatten(0, 1) for x, i in (
                    (z[:len(mask)], places), (z[-len(mask):], places), (z[:len(mask)], anywhere))]
                contrast.append(clflow.contrast_cosine(*rows, args.temperature))
        nll, smooth, info = (torch.stack(values).mean() for values in (energies, classification, contrast))
        loss = nll + args.classification_weight * smooth + args.contrast_weight * info
        return {"loss": loss, "nll": nll, "classification": smooth, "contrast": info}


@torch.no_grad()
def calibrate(model: Detector, files: list[Path]) -> None:
    """What held-out normal images look like to the model: its `levels` and `normal`."""
    energies = [model.energies(images) for images in evaluate.batches(files, model.size)]
    model.levels.copy_(torch.stack([torch.cat(scale).median() for scale in zip(*energies, strict=True)]))
    maps = (clflow.combine(e, model.levels, model.size)[:, 0] for e in energies)
    model.normal = torch.cat([torch.stack((clflow.image_score(x), x.amax(dim=(1, 2)))) for x in maps], dim=1)


def train_epoch(losses: nn.Module, loader: DataLoader, optimizer: optim.Optimizer,
                schedule: optim.lr_scheduler.LRScheduler, args: argparse.Namespace, log: list[dict]) -> None:
    """One pass over the images; appends its row, the means of the losses, to `log`."""
    start, rows, epoch, world = time.perf_counter(), [], len(log) + 1, loader.dataset.world
    loader.dataset.epoch = epoch
    torch.manual_seed(args.seed + 10_000 * epoch)  # so that --resume need not know the generator's state
    for images, mask in loader:
        found = losses(images.to(args.device), mask.to(args.device))
        if not found["loss"].isfinite():
            raise InputError(f"--lr {args.lr}: training diverged to {found['loss'].item()}; try a lower learning rate")
        optimizer.zero_grad()
        found["loss"].backward()
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        schedule.step()
        rows.append([x.item() / world for x in found.values()])
    seconds, means = time.perf_counter() - start, torch.tensor(rows).mean(dim=0)
    if world > 1:
        dist.all_reduce(means)
    row = {**dict(zip(found, means.tolist(), strict=True)), "images_per_second": len(loader.dataset) / seconds}
    log.append({"epoch": epoch, **{name: round(value, 5) for name, value in row.items()}})
    text = ", ".join(f"{name} {value:.3g}" for name, value in row.items())
    print(f"epoch {epoch}/{args.epochs}: {text}, {seconds * (args.epochs - epoch):.0f} s left", flush=True)


def fit(losses: nn.Module, pairs: Pairs, held_files: list[Path], args: argparse.Namespace, out: Path) -> None:
    """The training loop, from `model.progress` on; state.pt has all that --resume needs until model.pt is complete."""
    workers = min(4, os.cpu_count() or 1) if sys.platform == "linux" else 0  # elsewhere each would copy the cache
    loader = DataLoader(pairs, args.batch, shuffle=True, collate_fn=tuple, worker_init_fn=lambda _: os.nice(19),
                        num_workers=workers, multiprocessing_context="fork" if workers else None)  # steps come first
    optimizer = optim.Adam((p for p in losses.parameters() if p.requires_grad), args.lr, weight_decay=losses.DECAY)
    model, losses = losses.model, nn.parallel.DistributedDataParallel(losses) if pairs.world > 1 else losses
    schedule = optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.epochs * len(loader), pct_start=0.11)
    log = model.progress["log"] if model.progress else []
    if model.progress:
        optimizer.load_state_dict(model.progress["optimizer"])
        schedule.load_state_dict(model.progress["schedule"])
    while True:
        calibrate(model, held_files)  # so that state.pt is usable, whenever training is stopped
        state = {"log": log, "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        evaluate.write_atomically(out / "state.pt", lambda file, state=state: model.save(file, state))
        if log and args.keep_epochs:
            evaluate.write_atomically(out / f"epoch_{len(log):02}.pt", model.save)
        if len(log) == args.epochs:
            break
        train_epoch(losses, loader, optimizer, schedule, args, log)
        text = "".join(",".join(map(str, row)) + "\n" for row in (log[0], *(row.values() for row in log)))
        evaluate.write_atomically(out / "log.csv", lambda file, text=text: file.write_text(text))
        lines = {name: [(row["epoch"], row[name]) for row in log] for name in list(log[0])[2:-1]}
        evaluate.save_pictures(out / "loss.png", evaluate.draw_chart("losses by epoch", lines))
    evaluate.write_atomically(out / "model.pt", model.save)
    for name in ("metrics.json", "state.pt") if pairs.rank == 0 else ():  # stale metrics, and nothing to resume
        (out / name).unlink(missing_ok=True)


def train(args: argparse.Namespace, files: list[Path], out: Path) -> None:
    """Train on good images `files`, calibrate on some that are held out; model.pt, log.csv and loss.png in `out`."""
    textures = evaluate.usable(list_images(Path(args.textures), "**/*"), args.skip_bad) if args.textures else []
    if len(files) < 2:
        raise InputError(f"--data {args.data}: one good image is not enough; training takes two, and better twenty")
    if args.textures and not textures:
        raise InputError(f"--textures {args.textures}: no such folder, or no images in it")
    held_out = max(1, min(1000, round(len(files) / 10)), min(8, len(files) // 4))  # a tenth, or more of a few
    order = np.random.default_rng(args.seed).permutation(len(files))
    held_files, train_files = ([files[i] for i in part] for part in (order[:held_out], order[held_out:]))
    passing = ("out", "weights", "device", "seeds", "resume", "keep_epochs", "skip_bad")  # no part of what is learnt
    settings = {**{k: v for k, v in vars(args).items() if k not in passing}, "data": str(args.data.resolve()),
                "category": args.data.resolve().name, "number of images": len(files), "held_out": held_out}
    stopped = [file for file in (out / "state.pt", out / "model.pt") if args.resume and file.exists()]
    if stopped:
        model = Detector.load(stopped[0])
        if changed := [k for k, v in settings.items() if model.settings.get(k) != v]:
            raise InputError(f"--resume: {out} was started with another {changed[0]}; give the same one, or --out")
        if not model.progress:
            return print(f"{out} is finished already")
    else:
        torch.manual_seed(args.seed)
        model = resolve_name(clflow.METHODS[args.method])(settings).eval()
    losses = LOSSES[args.method](model.to(args.device), args)
    if not stopped:
        losses.prepare(train_files)
    fit(losses, Pairs(train_files, textures, args.size, args.seed, losses.EPOCH), held_files, args, out)
    print(f"wrote {out / 'model.pt'}; try python evaluate.py {out}, or with --images FOLDER")


LOSSES = {"clflow": Losses, "autoencoder": autoencoder.Losses}  # by --method, as the detectors in clflow.METHODS
DEMO = {"train/good": 80, "test/good": 20, "test/crack": 10, "test/chip": 10, "test/stain": 10, "test/blocked": 10}


def draw_button(rng: np.random.Generator, defect: str) -> tuple[np.ndarray, np.ndarray]:
    """A four-hole button on cloth, (256, 256, 3) uint8, and the mask of its `defect` ("good": none), (256, 256) bool.
    Drawn with code of its own: shared with synth.py, the demo would test nothing but what it was trained on."""
    y, x = np.mgrid[:256, :256] - 128 - rng.uniform(-8, 8, 2)[:, None, None]
    turn, reach, extent = rng.uniform((0, 35, 7), (2 * np.pi, 75, 16))
    u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    noise, disc = rng.normal(0, 0.01, (256, 256)), np.hypot(u, v) < 94
    cloth = 0.82 + 0.02 * (np.sin(1.1 * x) + np.sin(1.3 * y)) + noise
    grain = 0.08 * np.cos(np.hypot(u, v) / 12) + 0.025 * np.sin(v / 5 + np.sin(u / 15))
    body = 0.40 + grain - 0.0006 * (x + 1.5 * y) + noise
    spot = disc & (np.hypot(u, v - (94 if defect == "chip" else reach)) < extent)
    holes = [np.hypot(u - i, v - j) < 10 for i in (-21, 21) for j in (-21, 21)]
    crack = disc & (np.abs(v - reach + 5 * np.sin(u / 8)) < extent / 8) & (np.abs(u) < 2 * extent)
    mask = {"good": disc & False, "chip": spot, "stain": spot, "crack": crack, "blocked": holes[0]}[defect]
    shade = {"stain": 0.75, "crack": 0.45, "blocked": 1.5}.get(defect, 1)
    body, disc = np.where(mask, body * shade, body), disc & ~(mask & (defect == "chip"))
    hole = np.any(holes[defect == "blocked":], axis=0)
    tint = np.where(disc[..., None], (1.15, 0.95, 0.75), (0.98, 1.0, 1.02)) * rng.uniform(0.96, 1.04)
    image = np.where(disc & ~hole, body, cloth - 0.25 * hole)[..., None] * tint
    return (image.clip(0, 1) * 255).astype(np.uint8), mask


def draw_demo(data: Path, counts: dict[str, int] = DEMO) -> None:
    """Draw the demo's category into `data`, in MVTec AD layout; the same images every time."""
    for k, (name, count) in enumerate(counts.items()):
        for i in range(count):
            image, mask = draw_button(np.random.default_rng([k, i]), Path(name).name)
            for folder, pixels in ((data / name, image), (data / name.replace("test", "ground_truth"), mask)):
                if pixels.any():  # good images have no mask
                    folder.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels).save(folder / f"{i:03}.png")


def options() -> argparse.ArgumentParser:
    parser = evaluate.Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, help="folder with train/good, or of good images, or of such folders; else a drawn demo")
    add("--method", choices=LOSSES, default="clflow", help="autoencoder: the other detector, in autoencoder.py")
    add("--out", type=Path, help="folder for model.pt and log.csv; runs/<category> if not given")
    add("--backbone", choices=clflow.BACKBONES, metavar="NAME", help="a ResNet of torchvision, or efficientnet_lite0")
    add("--weights", help="file with the backbone's ImageNet weights, instead of a download")
    add("--textures", help="folder of texture photographs to paint defects from, beside the normal images")
    add("--epochs", type=int, default=12)
    add("--batch", type=int, default=8)
    add("--lr", type=float, default=2e-3, help="peak learning rate of a one-cycle schedule")
    add("--size", type=int, default=320, help="images are resized to SIZE x SIZE pixels")
    add("--seed", type=int, default=0)
    add("--seeds", type=int, default=1, help="train this many, from SEED on, and write the table of their results")
    add("--resume", action="store_true", help="go on where a stopped run was after its last whole epoch")
    add("--keep-epochs", action="store_true", help="keep epoch_NN.pt of each epoch, for evaluate.py --curve")
    add("--skip-bad", action="store_true", help="go on without images that cannot be read")
    add("--device", default="auto", help="auto, cpu, cuda, ...")
    add = parser.add_argument_group("CL-Flow: what the paper leaves open").add_argument
    add("--classification-weight", type=float, default=0.02, help="weight a of the smoothed classification")
    add("--contrast-weight", type=float, default=0.02, help="weight b of the contrastive loss")
    add("--contrast", choices=("energy", "cosine"), default="energy", help="form of the InfoNCE loss")
    add("--smoothing", type=float, default=0.1, help="label smoothing of the classification")
    add("--temperature", type=float, default=1.0, help="temperature of both proxy tasks")
    add("--score", choices=("nll", "fastflow"), default="nll", help="anomaly map: exact likelihood, or FastFlow's form")
    add("--steps", type=int, default=4, help="flow steps per scale")
    add("--kernels", type=int, nargs="+", default=[3], choices=range(1, 16, 2), help="alternate over the steps")
    return parser


def train_all(args: argparse.Namespace, out: Path, demo: bool) -> None:
    """Train every category in args.data, or args.data itself, with every seed; then evaluate, if there are several.
    The processes of torchrun train a single one together; several are spread over them."""
    rank, world = evaluate.processes()
    folders = sorted({p.parents[1] for p in args.data.glob("*/train/*") if p.name in ("good", "ok")}) or [args.data]
    files = {folder: evaluate.usable(good_images(folder), args.skip_bad) for folder in folders}
    if several := folders != [args.data] or args.seeds > 1:
        os.environ.update(RANK="0", WORLD_SIZE="1")  # each process trains alone
    runs = [(folder, seed, out / folder.resolve().name / f"seed{seed}" if several else out)
            for folder in folders for seed in range(args.seed, args.seed + args.seeds)]
    for folder, seed, target in runs[rank::world] if several else runs:
        train(argparse.Namespace(**{**vars(args), "data": folder, "seed": seed}), files[folder], target)
    os.environ.update(RANK="0", WORLD_SIZE="1")  # a single model is evaluated by the first process
    for folder, _, target in runs[rank::world] if several or demo else []:
        if (folder / "test").is_dir() and not (target / "metrics.json").exists():
            model = Detector.load(target / "model.pt", args.device)
            evaluate.report(model, folder, target, skip_bad=args.skip_bad)
    metrics = [target / "metrics.json" for folder, _, target in runs if (folder / "test").is_dir()]
    if several and metrics and all(file.exists() for file in metrics):  # the last process finds all of them
        evaluate.summarize([json.loads(file.read_text()) for file in metrics], out)


def main() -> None:
    parser = options()
    first = parser.parse_known_args([x for x in sys.argv[1:] if x not in ("-h", "--help")])[0]
    parser.set_defaults(**(LOSSES[first.method].DEFAULTS if first.data else LOSSES[first.method].DEMO))
    args, demo = parser.parse_args(), first.data is None
    for flag, (low, high) in dict(epochs=(1, 9999), size=(64, 4096), batch=(1, 4096), steps=(1, 64), seed=(0, 2**31),
                                  seeds=(1, 99), lr=(1e-9, 1), temperature=(1e-3, 1e3), smoothing=(0, 0.9)).items():
        if not low <= getattr(args, flag) <= high:
            raise InputError(f"--{flag} {getattr(args, flag)}: out of range, give {low} to {high}")
    args.device = evaluate.pick_device(args.device)
    out = args.out or Path("runs", "demo" if demo else args.data.resolve().name)
    if demo:
        args.data = out / "data" / "demo"
        if os.environ.get("RANK", "0") == "0":  # other processes meet this one after it has drawn
            draw_demo(args.data)
    train_all(args, out, demo)


if __name__ == "__main__":
    evaluate.run(main)
