"""Train a detector on good images: python train.py --data mvtec/bottle; without --data, on a demo that it draws."""

from kit import waiting  # noqa: F401 (first, before PyTorch is imported)

# isort: split
import argparse
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn, optim

import clflow
import evaluate
from kit import data, draw, runs
from kit.backbone import BACKBONES
from kit.calibration import add_training_images, show_suspects
from kit.demo import draw_demo
from kit.detector import FALSE_ALARM, Detector, read_checkpoint
from kit.errors import InputError, run_script
from kit.files import write_atomically, write_table, write_text
from kit.options import Parser, check_range, is_given, pick_device, refuse_without_effect
from kit.pairs import PairFeed, Pairs
from kit.processes import ALONE, Processes, join_processes, keep_freed_memory
from kit.progress import counted
from kit.table import results_table
from methods import METHODS, load
from synth import synthesize


@dataclass(frozen=True)
class Run:
    """One training: of one category, with one seed, into one folder. `settings` are what the checkpoint keeps."""

    category: Path
    files: list[Path]  # its good images
    settings: dict
    out: Path


# ---------------------------------------------------------------- the loop


def train_epoch(
    losses: nn.Module,
    batches: Iterable[tuple[Tensor, ...]],
    optimizer: optim.Optimizer,
    schedule: optim.lr_scheduler.LRScheduler,
) -> dict[str, float]:
    """A step for each batch; the means of the losses by name. Raises InputError if training diverges."""
    parameters = optimizer.param_groups[0]["params"]
    steps = []
    for batch in batches:
        found = losses(*(part.to(parameters[0].device) for part in batch))
        loss = found["loss"]
        if not loss.isfinite():
            raise InputError(f"--lr: training diverged to {loss.item()}; try a lower learning rate")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        steps.append([value.item() for value in found.values()])
    return dict(zip(found, torch.tensor(steps).mean(dim=0).tolist(), strict=True))


def mean_over_processes(values: dict[str, float], processes: Processes) -> dict[str, float]:
    """The losses of all processes; each has seen its part of every batch."""
    if processes.count == 1:
        return values
    shared = torch.tensor(list(values.values())) / processes.count
    dist.all_reduce(shared)
    return dict(zip(values, shared.tolist(), strict=True))


def make_optimizer(
    losses: nn.Module, settings: dict, steps_per_epoch: int, progress: dict | None
) -> tuple[optim.Optimizer, optim.lr_scheduler.LRScheduler]:
    """Adam and one cycle of its learning rate over all epochs, where a stopped training left them."""
    parameters = [p for p in losses.parameters() if p.requires_grad]
    optimizer = optim.Adam(parameters, settings["lr"], weight_decay=losses.WEIGHT_DECAY)
    steps = settings["epochs"] * steps_per_epoch
    schedule = optim.lr_scheduler.OneCycleLR(optimizer, settings["lr"], steps, pct_start=0.11)
    if progress:
        optimizer.load_state_dict(progress["optimizer"])
        schedule.load_state_dict(progress["schedule"])
    return optimizer, schedule


def fit(
    model: Detector,
    losses: nn.Module,
    feed: clflow.RowFeed | PairFeed,
    held_out: list[Path],
    trained_on: list[Path],
    run: Run,
    progress: dict | None,
    keep_epochs: bool,
    processes: Processes,
) -> None:
    """Train `model`, from `progress` on if there is one. The number of epochs is fixed, and the last one counts; it is
    calibrated after each, on held-out images.

    As long as there is a state.pt in the run's folder, it counts, and has all that --resume needs: it is written before
    anything of an earlier run is removed, and removed after model.pt is complete. So a kill costs an epoch at most."""
    settings = run.settings
    codes = [model.encode(images).half() for images in data.batches(held_out, model.size)]
    optimizer, schedule = make_optimizer(losses, settings, len(feed), progress)
    log = progress["log"] if progress else []
    if processes.count > 1:
        losses = nn.parallel.DistributedDataParallel(losses)

    def save_state() -> None:
        """A usable checkpoint, whenever training is stopped, and what it takes to go on."""
        model.refit(data.batches(trained_on, model.size))
        model.calibrate(code.float() for code in codes)
        state = {"log": log, "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        state["files"] = names(run)
        if processes.first:
            write_atomically(run.out / runs.STATE, lambda to: model.save(to, state))

    save_state()
    if processes.first and not log:
        runs.remove_stale(run.out)
    for epoch in range(len(log) + 1, settings["epochs"] + 1):
        started = time.perf_counter()
        torch.manual_seed(settings["seed"] + 10_000 * epoch)  # so that --resume need not know the generator's state
        batches = counted(feed.batches(epoch), f"epoch {epoch}/{settings['epochs']}, steps", len(feed))
        means = mean_over_processes(train_epoch(losses, batches, optimizer, schedule), processes)
        seconds = time.perf_counter() - started
        means["steps_per_second"] = len(feed) / seconds
        print_epoch(epoch, settings["epochs"], means, seconds)
        log.append({"epoch": epoch, **{name: round(value, 5) for name, value in means.items()}})
        if processes.first:
            write_log(run.out, log)
        save_state()
        if keep_epochs and processes.first:
            write_atomically(runs.epoch_file(run.out, epoch), model.save)


def print_epoch(epoch: int, epochs: int, means: dict[str, float], seconds: float) -> None:
    text = ", ".join(f"{name} {value:.3g}" for name, value in means.items())
    print(f"epoch {epoch}/{epochs}: {text}, {seconds * (epochs - epoch):.0f} s left", flush=True)


def write_log(out: Path, log: list[dict]) -> None:
    """log.csv, a row an epoch, and loss.png, a line for each part of the loss."""
    write_table(out / "log.csv", log)
    parts = [name for name in log[0] if name not in ("epoch", "loss", "steps_per_second")]
    lines = {name: [(row["epoch"], row[name]) for row in log] for name in parts}
    draw.save_picture(out / "loss.png", draw.line_chart("losses by epoch", lines))


# ---------------------------------------------------------------- one run


def split(files: list[Path], seed: int) -> tuple[list[Path], list[Path]]:
    """(held out, trained on), at random. A tenth is held out for the calibration; of few images at least eight, or a
    quarter; at most 1000."""
    count = held_out_count(len(files))
    order = np.random.default_rng(seed).permutation(len(files))
    return [files[i] for i in order[:count]], [files[i] for i in order[count:]]


def held_out_count(images: int) -> int:
    tenth = min(1000, round(images / 10))
    return max(1, tenth, min(8, images // 4))


def names(run: Run) -> list[str]:
    """The run's good images, as they lie below its category."""
    return [path.relative_to(run.category).as_posix() for path in run.files]


def check_resumable(run: Run, checkpoint: dict) -> None:
    """Raises InputError if the run had other settings or, as far as the checkpoint still tells, other images."""
    then = checkpoint["settings"]
    for name, value in run.settings.items():
        if name not in ("images", "held_out") and then.get(name) != value:
            was = then.get(name)
            raise InputError(f"--resume: {run.out} was started with another {name} ({was}); give the same, or --out")
    if checkpoint["progress"] is None:  # it is finished
        return
    before, now = set(checkpoint["progress"]["files"]), set(names(run))
    complain_of_files(before - now, "is missing")
    complain_of_files(now - before, "is new")


def complain_of_files(files: set[str], what: str) -> None:
    """Raises InputError, naming the first, if there are any of these."""
    if not files:
        return
    others = f", and {len(files) - 1} more" if len(files) > 1 else ""
    consequence = "other images would be held out; give the same ones, or another --out"
    raise InputError(f"--resume: {min(files)} {what}{others}: {consequence}")


def train(run: Run, args: argparse.Namespace, textures: list[Path], processes: Processes) -> None:
    """Train on the run's good images, calibrate on some that are held out; its folder gets model.pt and log.csv."""
    method = METHODS[run.settings["method"]]
    progress = None
    if args.resume and runs.checkpoint_of(run.out).exists():
        checkpoint = read_checkpoint(runs.checkpoint_of(run.out))
        check_resumable(run, checkpoint)
        progress = checkpoint["progress"]
        if progress is None:
            print(f"{run.out} is finished already")
            return
        model = method.detector.restore(checkpoint)
    else:
        torch.manual_seed(run.settings["seed"])
        model = method.detector(run.settings).eval()
    model.to(args.device)
    held_out, trained_on = split(run.files, run.settings["seed"])
    if len(trained_on) < processes.count:
        raise InputError(f"{processes.count} processes, and {len(trained_on)} images to train on: start fewer")
    print(f"reading {len(run.files)} images, of which {len(held_out)} are held out", flush=True)
    if not progress:
        batches = counted(data.batches(trained_on, model.size), "features of images", len(trained_on), each=8)
        model.prepare(batches, args.weights)
    if method.losses is None:
        model.calibrate(model.encode(images) for images in data.batches(held_out, model.size))
        if processes.first:
            runs.remove_stale(run.out)
    else:
        losses = method.losses(model)
        pairs = Pairs(
            trained_on, textures, synthesize, model.size, run.settings["seed"], losses.IMAGES_PER_EPOCH, processes
        )
        feed = losses.feed(pairs, run.settings["batch"], fresh=progress is None)
        fit(model, losses, feed, held_out, trained_on, run, progress, args.keep_epochs, processes)
    finish(model, held_out, trained_on, run, processes)
    print(f"wrote {run.out / runs.MODEL}; try python evaluate.py {run.out}, or with --images FOLDER")


def finish(model: Detector, held_out: list[Path], trained_on: list[Path], run: Run, processes: Processes) -> None:
    """Calibrate a trained model on all good images, and write it."""
    numbers = add_training_images(model, trained_on, processes)
    if not processes.first:
        return
    show_suspects(model, held_out, trained_on, numbers, run.out)
    write_atomically(run.out / runs.MODEL, model.save)
    runs.remove(run.out, (runs.STATE, *runs.MEASURED))  # nothing to resume; what was measured was another epoch


# ---------------------------------------------------------------- all runs


def plan_runs(args: argparse.Namespace, options: dict, categories: list[Path], out: Path, several: bool) -> list[Run]:
    """A run for each category and seed. Raises InputError, before anything is trained, if one cannot be."""
    planned = []
    for category in categories:
        folder = data.good_folder(category)
        read_folders = [folder, category / "test", category / "ground_truth"]
        if args.textures:
            read_folders.append(args.textures)
        files = evaluate.usable(data.list_images(folder), args.skip_bad)
        if len(files) < 2:
            raise InputError(f"--data {category}: one good image is not enough; training takes two, and better twenty")
        for seed in range(args.seed, args.seed + args.seeds):
            target = out / category.resolve().name / f"seed{seed}" if several else out
            runs.check_out(target, category, read_folders, args.resume)
            settings = {
                "method": args.method,
                **options,
                "seed": seed,
                "data": str(category.resolve()),
                "category": category.resolve().name,
                "images": len(files),
                "held_out": held_out_count(len(files)),
            }
            planned.append(Run(category, files, settings, target))
    return planned


def train_all(args: argparse.Namespace, options: dict, out: Path, processes: Processes) -> None:
    """Train every category in args.data, or args.data itself, with every seed; then evaluate, if there are several.

    The processes of torchrun train a single run together; several are spread over them, each trained by one alone. Then
    each has a folder of its own below `out`."""
    textures = texture_files(args)
    categories = data.category_folders(args.data)
    several = categories != [args.data] or args.seeds > 1
    planned = plan_runs(args, options, categories, out, several)
    if several:
        mine = planned[processes.rank :: processes.count]
        if not args.resume:
            for run in mine:
                runs.remove(run.out, runs.MEASURED)  # or another process could take old figures for new ones
        if processes.count > 1:
            dist.barrier()  # all have planned, before one changes what the others look at
        for run in mine:
            train(run, args, textures, processes.alone())
    else:
        train(planned[0], args, textures, processes)
        mine = planned if processes.first else []
    if several or args.is_demo:
        for run in mine:
            evaluate_run(run, args)
    if several:
        write_results([run for run in planned if data.has_tests(run.category)], out)


def measured(run: Run) -> dict | None:
    """The run's metrics.json, if it tells of the finished model, its own test images and the default threshold."""
    path = run.out / "metrics.json"
    if not path.exists():
        return None
    metrics = json.loads(path.read_text())
    expected = {"checkpoint": runs.MODEL, "data": run.settings["data"], "false_alarm": FALSE_ALARM}
    return metrics if all(metrics.get(name) == value for name, value in expected.items()) else None


def evaluate_run(run: Run, args: argparse.Namespace) -> None:
    """Measure a run on its category's test images, unless there are none, or it has been done."""
    if data.has_tests(run.category) and measured(run) is None:
        checkpoint = run.out / runs.MODEL
        model = load(checkpoint, args.device)
        evaluate.report(model, checkpoint, run.category, run.out, FALSE_ALARM, args.skip_bad, ALONE)


def write_results(planned: list[Run], out: Path) -> None:
    """results.json, the metrics of all runs, and table.md; by the process that finishes last and so finds them all."""
    rows = [measured(run) for run in planned]
    if not rows or None in rows:
        return
    write_text(out / "results.json", json.dumps(rows, indent=2) + "\n")
    table = results_table(rows)
    write_text(out / "table.md", table)
    print(f"{table}wrote {out / 'results.json'} and {out / 'table.md'}")


# ---------------------------------------------------------------- the command line


def option_parser() -> Parser:
    """All options; the defaults of those that belong to a method stand in methods.py, and here they are None."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, help="folder with train/good, or of good images, or of such folders; else a drawn demo")
    add(
        "--method",
        choices=METHODS,
        default="clflow",
        help="patchcore: nearest.py; autoencoder: autoencoder.py (clflow)",
    )
    add("--out", type=Path, help="folder for model.pt and log.csv; runs/<category> if not given")
    add("--textures", type=Path, help="folder of texture photographs to paint defects from, beside the normal images")
    add("--epochs", type=int, help=default_text("epochs"))
    add("--batch", type=int, help=default_text("batch", "of images; of rows, single positions' features, for CL-Flow"))
    add("--lr", type=float, help=default_text("lr", "peak learning rate of a one-cycle schedule"))
    add("--size", type=int, help=default_text("size", "images are resized to SIZE x SIZE pixels"))
    add("--seed", type=int, default=0, help="(0)")
    add("--seeds", type=int, default=1, help="train this many, from SEED on, and write the table of their results (1)")
    add("--resume", action="store_true", default=None, help="go on where a stopped run was after its last whole epoch")
    add(
        "--keep-epochs",
        action="store_true",
        default=None,
        help="keep epoch_NN.pt of each epoch, for evaluate.py --curve",
    )
    add("--skip-bad", action="store_true", default=None, help="go on without images that cannot be read")
    add("--device", help="cpu, cuda, ... (a GPU, if there is one)")
    add = parser.add_argument_group("the backbone and its prototypes").add_argument
    backbones = "a ResNet of torchvision, or efficientnet_lite0"
    add("--backbone", choices=BACKBONES, metavar="NAME", help=default_text("backbone", backbones))
    add("--weights", help="file with the backbone's ImageNet weights, instead of a download")
    add("--bank", type=int, help=default_text("bank", "prototypes, normal features that cover all others"))
    local = "see features on the scale of the prototypes' spacing there"
    add("--local", action=argparse.BooleanOptionalAction, help=default_text("local", local))
    add = parser.add_argument_group("CL-Flow: what the paper leaves open").add_argument
    add("--steps", type=int, help=default_text("steps", "flow steps"))
    add("--classification-weight", type=float, help=default_text("classification_weight", "weight a of L_cls"))
    add("--smoothing", type=float, help=default_text("smoothing", "label smoothing of L_cls"))
    add("--contrast-weight", type=float, help=default_text("contrast_weight", "weight b of L_con"))
    add("--contrast", choices=("energy", "cosine"), help=default_text("contrast", "form of the InfoNCE loss"))
    add("--temperature", type=float, help=default_text("temperature", "temperature of L_con"))
    return parser


def default_text(name: str, meaning: str = "") -> str:
    """The help of an option: its meaning, and its default for each method and for the demo, where they differ."""
    found = []
    for label, method in METHODS.items():
        if name in method.defaults:
            text = f"{label} {method.defaults[name]}"
            if name in method.demo_defaults:
                text += f", demo {method.demo_defaults[name]}"
            found.append(text)
    return f"{meaning} ({'; '.join(found)})".strip()


RANGES = {
    "seed": (0, 2**31),
    "seeds": (1, 99),
    "epochs": (1, 9999),
    "size": (64, 4096),
    "batch": (1, 1_000_000),
    "lr": (1e-9, 1),
    "bank": (10, 100_000),
    "steps": (1, 64),
    "temperature": (1e-3, 1e3),
    "smoothing": (0, 0.9),
    "classification_weight": (0, 1e3),
    "contrast_weight": (0, 1e3),
}


def method_options(args: argparse.Namespace) -> dict:
    """The options of args.method, given or by default. Raises InputError if one is out of range or has no effect."""
    method = METHODS[args.method]
    others = {name for other in METHODS.values() for name in other.defaults} - set(method.defaults)
    refuse_without_effect(args, sorted(others), f"with --method {args.method}")
    options = dict(method.defaults)
    if args.is_demo:
        options.update(method.demo_defaults)
    for name in options:
        if is_given(getattr(args, name)):
            options[name] = getattr(args, name)
    for name, (low, high) in RANGES.items():
        if name in options or name in ("seed", "seeds"):
            check_range(name, options.get(name, getattr(args, name)), low, high)
    classifies = options.get("classification_weight") != 0
    contrasts = options.get("contrast_weight") != 0
    if not classifies:
        refuse_without_effect(args, ["smoothing"], "with --classification-weight 0")
    if not contrasts:
        refuse_without_effect(args, ["contrast", "temperature"], "with --contrast-weight 0")
    if args.method == "clflow" and not options["local"]:
        refuse_without_effect(args, ["bank"], "with --no-local")
    options.pop("weights", None)  # not what is learnt, but where it lies
    if args.textures:
        options["textures"] = str(args.textures.resolve())
    if method.losses is None:
        refuse_without_effect(args, ["keep_epochs"], f"with --method {args.method}")
    return options


def texture_files(args: argparse.Namespace) -> list[Path]:
    """The photographs below --textures. Raises InputError if there are none."""
    if not args.textures:
        return []
    found = evaluate.usable(data.list_images(args.textures, subfolders=True), args.skip_bad)
    if not found:
        raise InputError(f"--textures {args.textures}: no such folder, or no images in it")
    return found


def main(arguments: list[str] | None = None) -> None:
    args = option_parser().parse_args(arguments)
    args.is_demo = args.data is None
    options = method_options(args)
    processes = join_processes()
    args.device = pick_device(args.device, processes.local_rank)
    out = args.out or Path("runs", "demo" if args.is_demo else args.data.resolve().name)
    if args.is_demo:
        args.data = out / "data" / "demo"
        runs.check_out(out, args.data, [], args.resume)  # before anything is drawn into it
        if processes.first:
            draw_demo(args.data)
        if processes.count > 1:
            dist.barrier()  # the others read what the first has drawn
    train_all(args, options, out, processes)


if __name__ == "__main__":
    keep_freed_memory()
    run_script(main, on_interrupt="stopped; go on with --resume")
