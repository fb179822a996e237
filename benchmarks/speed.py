"""How long do training and judging take, and how much memory? One table, measured on one machine in one run.

python benchmarks/speed.py mvtec/bottle mvtec/screw --weights resnet18.pth             # ours
python benchmarks/speed.py mvtec/bottle mvtec/screw --weights resnet18.pth --rivals    # and anomalib's, 256x256
python benchmarks/speed.py mvtec/screw --weights resnet18.pth --stages                 # each stage of judging

Milliseconds per image are medians over a batch of the category's test images; the column `one, ms` has the same images
one by one. `beyond` is everything after the backbone. Images that are far from normal take longer to judge, so real
good and defective images are used."""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from clflow import CLFlow, energy  # noqa: E402
from kit import data, folders, metrics  # noqa: E402
from kit.backbone import as_rows  # noqa: E402
from kit.search import search_parts  # noqa: E402
from kit.settings import Shape  # noqa: E402
from kit.windows import in_strips, keep_freed_memory  # noqa: E402
from methods import load  # noqa: E402

SIZE = 256  # pixels a side, for the comparison with anomalib
REPEATS = 15
COLUMNS = [
    "training, s",
    "memory, MB",
    "image AUROC",
    "decoding, ms",
    "backbone, ms",
    "beyond, ms",
    "all, ms",
    "one, ms",
    "file, MB",
]


# ---------------------------------------------------------------- what is measured


def median_ms(run: Callable[[Tensor], object], batches: Sequence[Tensor], device: str) -> float:
    """The median time of `run` in milliseconds per image, over batches (B, 3, H, W) in turn, without the first two
    calls. The batches are in the processor's memory, like decoded images."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    times = []
    for images in itertools.islice(itertools.cycle(batches), REPEATS + 2):
        started = time.perf_counter()
        run(images)
        wait()
        times.append(1000 * (time.perf_counter() - started) / len(images))
    return float(np.median(times[2:]))


def decoding_ms(category: Path, shape: Shape) -> float:
    """Milliseconds to read one of the category's images."""
    files = folders.list_images(folders.good_folder(category))[:40]
    started = time.perf_counter()
    data.read_batch(files, shape)
    return 1000 * (time.perf_counter() - started) / len(files)


def tests_auroc(scores: Callable[[Tensor], Tensor], category: Path, shape: Shape) -> float:
    tests = folders.labelled_images(category)
    found = torch.cat([scores(images) for images in data.batches([test.path for test in tests], shape)])
    labels = np.array([test.anomalous for test in tests])
    return metrics.image_metrics(labels, found.cpu().numpy())["image_auroc"]


def run_measured(command: list[str], log: Path) -> tuple[float, float]:
    """Run a command in the repository's root; (seconds, peak memory in MB) of its process. Exits if it fails."""
    started = time.perf_counter()
    with open(log, "w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"error: {' '.join(command)} failed:\n{log.read_text()[-2000:]}")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


# ---------------------------------------------------------------- rows of the table


@torch.no_grad()
def milliseconds_of(
    whole: Callable, backbone: Callable, category: Path, shape: Shape, batch: int, device: str
) -> dict[str, float]:
    """Milliseconds per image: the backbone, everything, and everything for a single image."""
    tests = folders.labelled_images(category)
    images = data.read_batch([tests[i * len(tests) // batch].path for i in range(batch)], shape)
    return {
        "backbone": median_ms(backbone, [images], device),
        "all": median_ms(whole, [images], device),
        "one": median_ms(whole, images.split(1), device),
    }


def ours(category: Path, options: list[str], folder: Path, batch: int, device: str) -> dict[str, float]:
    out = folder / "run"
    command = [sys.executable, "train.py", "--data", str(category), "--out", str(out), "--device", device, *options]
    seconds, memory = run_measured(command, folder / "log.txt")
    model = load(out / "model.pt", device)
    with torch.no_grad():
        found = {"image_auroc": tests_auroc(lambda images: model(images)[1], category, model.shape)}
    found |= {"seconds": seconds, "memory": memory, "megabytes": (out / "model.pt").stat().st_size / 1e6}
    backbone = getattr(model, "phi", model.features)  # the autoencoder's backbone sees larger images
    found |= milliseconds_of(model, backbone, category, model.shape, batch, device)
    return found | {"decoding": decoding_ms(category, model.shape)}


@torch.no_grad()
def stages(model: CLFlow, images: Tensor) -> dict[str, float]:
    """Milliseconds an image of each stage of judging a batch."""
    x = model.features(images)
    rows, parts = as_rows(x), search_parts(*x.shape[2:])
    r = model.residual(rows, parts)
    code = model.code_map(x)
    w = code[:, :-1]
    energies = model.expert_energies(code)
    maps = model.maps(energies)
    runs = {
        "backbone": lambda: model.features(images),
        "search for the nearest prototypes": lambda: model.residual(rows, parts),
        "whitening": lambda: model.code_of(r),
        "flow": lambda: in_strips(lambda part: [energy(*model.latents(part))], w),
        "classifier": lambda: in_strips(lambda part: [model.log_odds(as_rows(part)).view_as(part[:, 0])], w),
        "map": lambda: model.maps(energies),
        "score": lambda: model.score(maps),
    }
    return {name: median_ms(lambda _, run=run: run(), [images], "cpu") for name, run in runs.items()}


def print_stages(category: Path, weights: list[str], batch: int) -> None:
    """Train CL-Flow, and print the milliseconds of each stage with one thread and with all of them."""
    tests = folders.labelled_images(category)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "train.py", "--data", str(category), "--out", str(out), "--device", "cpu", *weights]
        run_measured(command, Path(folder) / "log.txt")
        model = load(out / "model.pt")
    images = data.read_batch([tests[i * len(tests) // batch].path for i in range(batch)], model.shape)
    several = torch.get_num_threads()
    found = {}
    for threads in (1, several):
        torch.set_num_threads(threads)
        found[threads] = stages(model, images)
    numbers = "int8" if model.backbone.has_int8 else "float32"
    print(f"| {category.name}, {numbers} | 1 thread, ms | {several} threads, ms |")
    print("|---|---|---|")
    for name in found[1]:
        print(f"| {name} | {found[1][name]:.2f} | {found[several][name]:.2f} |", flush=True)


def rival(name: str, category: Path, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    log = folder / "log.txt"
    command = [sys.executable, "benchmarks/rivals.py", name, str(category), "--weights", args.weights]
    command += ["--batch", str(args.batch), "--device", args.device]
    _, memory = run_measured(command, log)
    found = json.loads(log.read_text().splitlines()[-1])
    return found | {"memory": memory, "decoding": decoding_ms(category, (SIZE, SIZE))}


def print_row(category: str, name: str, found: dict[str, float]) -> None:
    beyond = found["all"] - found["backbone"]
    cells = [
        f"{found['seconds']:.0f}",
        f"{found['memory']:.0f}",
        f"{found['image_auroc']:.3f}",
        *(f"{ms:.3g}" for ms in (found["decoding"], found["backbone"], beyond, found["all"], found["one"])),
        f"{found['megabytes']:.0f}",
    ]
    print(f"| {category} | {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("categories", type=Path, nargs="+")
    add("--weights", required=True, help="file with ResNet18's ImageNet weights")
    add("--autoencoder", action="store_true", help="also the autoencoder, which takes 15 minutes per category")
    add("--rivals", action="store_true", help="also anomalib's FastFlow and PatchCore, and ours at 256x256")
    add("--stages", action="store_true", help="only the time of each stage of CL-Flow's judging, on the CPU")
    add("--batch", type=int, default=8, help="batch size in images (default: 8)")
    add("--device", default="cpu")
    args = parser.parse_args()
    keep_freed_memory()  # as train.py and evaluate.py do
    weights = ["--backbone", "resnet18", "--weights", args.weights]
    variants = {
        "CL-Flow, 384": weights,
        "CL-Flow, 384, --no-int8": [*weights, "--no-int8"],
        "nearest, 384": ["--method", "nearest", *weights],
    }
    if args.autoencoder:
        variants["autoencoder, 256"] = ["--method", "autoencoder", *weights]
    if args.rivals:
        variants["CL-Flow, 256"] = [*weights, "--size", str(SIZE)]
        variants["nearest, 256, 2,000 prototypes"] = [
            "--method",
            "nearest",
            *weights,
            "--size",
            "256",
            "--bank",
            "2000",
        ]
    if args.stages:
        for category in args.categories:
            print_stages(category, weights, args.batch)
        return
    print(f"| | | {' | '.join(COLUMNS)} |\n|{'---|' * (2 + len(COLUMNS))}")
    for category in args.categories:
        for name, options in variants.items():
            with tempfile.TemporaryDirectory() as folder:
                print_row(category.name, name, ours(category, options, Path(folder), args.batch, args.device))
        for name in ("patchcore", "fastflow") if args.rivals else ():
            with tempfile.TemporaryDirectory() as folder:
                print_row(category.name, f"anomalib {name}, 256", rival(name, category, Path(folder), args))


if __name__ == "__main__":
    main()
