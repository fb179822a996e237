"""Train a detector on good images: python train.py --data mvtec/bottle. Without --data it draws and uses a demo."""

from kit import InputError  # first, before PyTorch is imported
from kit.command_line import flag_of, quit_on_signals, refuse_without_effect, run_script, training_options

if __name__ == "__main__":
    quit_on_signals()
    run_script(training_options)  # checks the options before the slow import of PyTorch

# isort: split
import argparse
import contextlib
import json
import math
import shlex
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from kit import data, draw, folders, shapes
from kit.backbone import BACKBONES
from kit.calibration import judge_changed_copies, learn_usual
from kit.detector import Detector, read_checkpoint
from kit.files import (
    MODEL,
    STATE,
    OwnFiles,
    announce,
    check_out,
    epoch_file,
    install,
    is_unfinished,
    locked,
    resumable,
    unfinished_files,
    withdraw,
    write_atomically,
    write_rows,
    write_text,
)
from kit.good import Defect, GoodImages, held_out_count, quantize_backbone, split
from kit.images import load_image
from kit.processes import Processes, join_processes, pick_device
from kit.quantized import is_fast
from kit.real_defects import Corrections, fingerprints, list_defects, read_corrections, without_copies
from kit.settings import FALSE_ALARM, OPTIONS, Settings, Shape, as_shape
from kit.training import Epoch
from kit.verdict import basis, outliers
from kit.windows import keep_freed_memory
from methods import METHODS, load

SHOWN = 12  # suspects at most
SUSPECTS = "suspects.png"


@dataclass(frozen=True)
class Run:
    """One training: of one category, with one seed, into one folder."""

    category: Path
    files: list[Path]  # its good images
    settings: Settings
    out: Path
    roi: np.ndarray | None  # (H, W) bool; None for the whole image
    defects: list[Defect]  # real ones


# ---------------------------------------------------------------- one run


def train(run: Run, args: argparse.Namespace, textures: list[Path], processes: Processes) -> None:
    """Train on the run's good images, and calibrate on all of them. Writes model.pt and log.csv into the run's folder.

    During training all files are written to the subfolder `unfinished`; its state.pt has everything that --resume
    needs. An earlier detector stays in use until the new one is complete. So a kill costs at most one epoch, or the
    final calibration on all good images."""
    with locked(run.out) if processes.first else contextlib.nullcontext():
        try:
            train_held(run, args, textures, processes)
        except (InputError, OSError):
            if processes.first:
                withdraw(run.out)
            raise


def train_held(run: Run, args: argparse.Namespace, textures: list[Path], processes: Processes) -> None:
    """`train`, while the run's folder is locked against other calls."""
    method = METHODS[run.settings.method]
    model, progress = begin(run, args)
    if model is None:
        print(
            f"{run.out}: this training is already finished; to train again, for example with new images, leave out "
            "--resume"
        )
        return
    good = GoodImages(*split(run.files, run.settings.seed), textures, processes, run.defects)
    if len(good.trained_on) < processes.count:
        images = len(good.trained_on)
        raise InputError(
            f"torchrun started {processes.count} processes for {images} training images; start at most {images}"
        )
    beside = ""
    if run.defects:
        masks = sum(defect.mask is not None for defect in run.defects)
        beside = f", and {len(run.defects)} images with real defects ({masks} with masks)"
    print(f"reading {len(run.files)} good images ({len(good.held_out)} held out for calibration){beside}", flush=True)
    if run.roi is not None:
        print(f"--roi: {100 * run.roi.mean():.1f} % of the image is inspected")
    if unused := folders.unused_subfolders(folders.good_folder(run.category)):
        print(f"images in subfolders are not used: {', '.join(path.name for path in unused)}")
    if line := shapes.told(run.files, model.shape):
        print(line)
    shapes.print_others(run.files, model.shape)
    if progress is None:
        learn_usual(model, run.files)
        quantize_backbone(model, good.trained_on)
    log = progress["log"] if progress else []
    started = time.perf_counter()
    for epoch in method.train(model, good, progress):
        if epoch.losses:
            seconds = time.perf_counter() - started
            losses = {name: round(value, 5) for name, value in epoch.losses.items()}
            log.append({"epoch": epoch.number, **losses, "seconds": round(seconds, 2)})
        if processes.first:
            keep(epoch, model, log, run, args.keep_epochs)
        if epoch.losses:  # printed when it is on the disk
            print_epoch(epoch, run.settings.epochs, seconds)
        started = time.perf_counter()
    finish(model, good, run)
    print(f"wrote {run.out / MODEL}")
    if folders.good_folder(run.category) != run.category:  # it has the usual layout; training does not look for test/
        print(f"to measure it: python evaluate.py {shlex.quote(str(run.out))}")
    print(f"to judge new images: python evaluate.py {shlex.quote(str(run.out))} --images FOLDER")


def begin(run: Run, args: argparse.Namespace) -> tuple[Detector | None, dict | None]:
    """A new model with ImageNet weights; with --resume, the model and the progress of a stopped run. None if the run is
    finished."""
    detector = METHODS[run.settings.method].detector
    path = resumable(run.out) if args.resume else None
    checkpoint = read_checkpoint(path) if path else None
    if checkpoint is None:
        torch.manual_seed(run.settings.seed)
        model = detector(run.settings).eval()
        model.backbone.load_imagenet(args.weights)
        if run.roi is not None:
            model.set_roi(torch.from_numpy(run.roi))
        return model.to(args.device), None
    check_resumable(run, checkpoint)
    progress = checkpoint["progress"]
    if progress is None:
        return None, None
    return detector.restore(checkpoint, args.device), progress


def keep(epoch: Epoch, model: Detector, log: list[dict], run: Run, keep_epochs: bool) -> None:
    """Write log.csv, loss.png and state.pt into the subfolder `unfinished`, before the first step and after each epoch.

    state.pt is a checkpoint with everything that --resume needs. After the first epoch it can judge images, too."""
    own = unfinished_files(run.out)
    if epoch.number == 0:
        own.remove([name for name in own.names() if name != STATE])  # of an abandoned training
    if log:
        write_log(own, log)
    if keep_epochs and epoch.number > 0:
        write_atomically(own.claim(epoch_file(epoch.number)), model.save)
    progress = epoch.progress | {"log": log, "files": names(run)}
    write_atomically(own.claim(STATE), lambda to: model.save(to, progress))  # last: --resume continues after it


def print_epoch(epoch: Epoch, epochs: int, seconds: float) -> None:
    text = ", ".join(f"{name} {value:.3g}" for name, value in epoch.losses.items())
    left = seconds * (epochs - epoch.number)
    print(f"epoch {epoch.number}/{epochs}: {text}, {seconds:.1f} s, {left:.0f} s left", flush=True)


def write_log(own: OwnFiles, log: list[dict]) -> None:
    """log.csv, a row an epoch, and loss.png, a line for each part of the loss."""
    write_rows(own.claim("log.csv"), [list(log[0]), *(list(row.values()) for row in log)])
    parts = [name for name in log[0] if name not in ("epoch", "loss", "seconds")]
    lines = {name: [(row["epoch"], row[name]) for row in log] for name in parts}
    draw.save_picture(own.claim("loss.png"), draw.line_chart("losses by epoch", lines))


def finish(model: Detector, good: GoodImages, run: Run) -> None:
    """Write a trained model, show the good images that look unlike the others, and install the model in its folder."""
    if not good.processes.first:
        return
    own = unfinished_files(run.out)
    print(basis(model.thresholds()))
    judge_changed_copies(model, good.held_out)
    show_suspects(model, own, run.out)
    write_atomically(own.claim(MODEL), model.save)
    install(run.out)


@torch.no_grad()
def show_suspects(model: Detector, own: OwnFiles, folder: Path) -> None:
    """Print a line and draw suspects.png if there are outliers among the images that calibrated the model: they may be
    defective. `folder` is the final folder of the picture, which the line names."""
    scores = model.good_scores[0].cpu().numpy()
    suspects = outliers(scores)
    if not len(suspects) or not model.calibrated_on:
        return
    limits = model.thresholds()
    names, pictures = [], []
    for index in suspects[:SHOWN]:
        path, excluded = model.calibrated_on[index]
        energies = model.energies_in_windows(data.read_batch([path], model.shape), excluded)
        anomaly_map = model.maps(energies)[0].cpu().numpy()
        photo = draw.photo_of(load_image(path), model.roi)
        verdict = model.verdict(float(scores[index]), anomaly_map, (photo.height, photo.width), limits)
        if anomaly_map.max() < limits.anomaly_map:  # this map is of the final detector, the score of cross-validation
            verdict = replace(verdict, found=np.zeros_like(verdict.found))
        names.append(path.name)
        pictures.append(draw.verdict_picture(photo, f"{path.name}, in cross-validation", verdict, limits))
    draw.save_picture(own.claim(SUSPECTS), draw.below_each_other(pictures))
    others = f" and {len(suspects) - len(names)} more" if len(suspects) > len(names) else ""
    print(
        f"{len(suspects)} of the good images look unlike the others: {', '.join(names)}{others}; see "
        f"{folder / SUSPECTS}. If they are defective, remove them and train again"
    )


def names(run: Run) -> list[str]:
    """The paths of the run's good images, relative to its category; those outside (false alarms) in full."""
    below = run.category.resolve()
    paths = [path.resolve() for path in run.files]
    return [(path.relative_to(below) if path.is_relative_to(below) else path).as_posix() for path in paths]


def check_resumable(run: Run, checkpoint: dict) -> None:
    """Raises InputError if the run had other options or, unless it is finished, other images."""
    then = checkpoint["settings"]
    for name in ("method", "seed", "roi", *OPTIONS[run.settings.method].defaults):
        if name != "size":
            check_same_option(run, then, name)
    if then.get("taught", ()) != run.settings.taught:
        raise InputError(
            f"--resume: {run.out} was started with other --defects or --corrections; give the same ones, or "
            "another --out"
        )
    if checkpoint["progress"] is not None:  # it is not finished
        check_same_images(run, checkpoint["progress"]["files"])
        if then.get("good", ()) != run.settings.good:
            raise InputError(
                f"--resume: good images of {run.out} have changed since it was started; put the earlier ones back, or "
                "give another --out"
            )
    check_same_option(run, then, "size")  # after the images, since their shape decides the size


def check_same_option(run: Run, then: dict, name: str) -> None:
    """Raises InputError, with the option as it must be typed, if it had another value in the settings `then`."""
    value = then.get(name)
    if value == getattr(run.settings, name):
        return
    if value is None:
        was = f"without {flag_of(name)}"
    elif isinstance(value, bool):
        was = f"with {flag_of(name if value else 'no_' + name)}"
    else:
        was = f"with {flag_of(name)} {shapes.size_text(value) if name == 'size' else value}"
    raise InputError(f"--resume: {run.out} was started {was}; give the same value, or another --out")


def check_same_images(run: Run, files: list[str]) -> None:
    """Raises InputError if these files, by name, are not the good images of the run."""
    before, now = set(files), set(names(run))
    for files, what, remedy in ((before - now, "missing", "put them back"), (now - before, "new", "remove them")):
        if not files:
            continue
        named = ", ".join(sorted(files)[:3])
        others = f" and {len(files) - 3} more" if len(files) > 3 else ""
        raise InputError(
            "--resume needs the same good images as before, or other images would be held out. These are "
            f"{what}: {named}{others}; {remedy}, or give another --out"
        )


# ---------------------------------------------------------------- all runs


def plan_runs(args: argparse.Namespace, options: dict, categories: list[Path], out: Path, several: bool) -> list[Run]:
    """A run for each category and seed. Raises InputError, before anything is trained, if one is not possible."""
    corrections = read_corrections(args.corrections) if args.corrections else Corrections()
    defects = given_defects(args, corrections)
    taught = fingerprints([defect.path for defect in defects] + corrections.false_alarms)
    planned: list[Run] = []
    for category in categories:
        folder = folders.good_folder(category)
        folders.print_unread(folder)
        name = folders.category_name(category)
        read_folders = [folder, category / "test", category / "ground_truth"]
        if args.textures:
            read_folders.append(args.textures)
        read_folders += [folder for folder in (args.defects, args.defect_masks) if folder]
        files = corrections.of_good(folders.list_images(folder), [defect.path for defect in defects])
        not_good = [*(defect.path for defect in defects), *corrections.not_good]
        hashes = without_copies(folders.usable(files, args.skip_bad), not_good)
        files = list(hashes)
        least = OPTIONS[args.method].least_images
        if len(files) < least:
            raise InputError(f"--data {category}: only {len(files)} good images; give at least {least}, better 50")
        for seed in range(args.seed, args.seed + args.seeds):
            target = out / name / f"seed{seed}" if several else out
            refuse_shared(target, category, planned)
            check_out(target, category, read_folders, args.resume, options["epochs"] if args.keep_epochs else 0)
            size = shapes.input_size(options["size"], files)
            check_pixels(args.method, size)
            settings = OPTIONS[args.method].settings(
                seed=seed,
                data=str(category.resolve()),
                category=name,
                images=len(files),
                held_out=held_out_count(len(files)),
                taught=taught,
                good=tuple(sorted(hashes.values())),
                **options | {"size": size},
            )
            roi = region_of_interest(args.roi, files, as_shape(size))
            planned.append(Run(category, files, settings, target, roi, defects))
    return planned


def check_pixels(method: str, size: int | Shape) -> None:
    """Raises InputError if the method cannot process images of this size."""
    most = METHODS[method].detector.MOST_PIXELS
    if most is not None and math.prod(as_shape(size)) > most:
        text = shapes.size_text(size)
        raise InputError(f"--size {text}: --method {method} takes at most {most} pixels; give a smaller --size")


def refuse_shared(target: Path, category: Path, planned: list[Run]) -> None:
    """Raises InputError if another planned run has the same folder."""
    for run in planned:
        if run.out.resolve() == target.resolve():
            raise InputError(
                f"--out {target}: this folder would contain the runs of both {run.category} and {category}; rename one "
                "of these two categories"
            )


def given_defects(args: argparse.Namespace, corrections: Corrections) -> list[Defect]:
    """The defects in --defects and those that --corrections lists as missed, without duplicates."""
    found = list_defects(args.defects, args.defect_masks) if args.defects else []
    there = {defect.path.resolve() for defect in found}
    found += [Defect(path, None) for path in corrections.missed if path.resolve() not in there]
    good = set(folders.usable([defect.path for defect in found], args.skip_bad))
    return [defect for defect in found if defect.path in good]


def region_of_interest(mask: Path | None, files: list[Path], judged_in: Shape) -> np.ndarray | None:
    """The region of interest that --roi marks, at the shape in which images are judged: (H, W) bool. Raises InputError
    if the mask has another shape than the images `files`."""
    if mask is None:
        return None
    shape, usual = shapes.shape_in_file(mask), shapes.usual_shape(files)
    if shape and usual and shapes.is_other(shape, usual):
        raise InputError(
            f"--roi {mask}: has {shape[1]} x {shape[0]} pixels, but the good images have {usual[1]} x {usual[0]}; give "
            "a mask with the same aspect ratio, and mark the area to inspect in white"
        )
    return data.read_region(mask, judged_in)


def train_all(args: argparse.Namespace, options: dict, out: Path, processes: Processes) -> None:
    """Train every category in args.data, or args.data itself, with every seed. Evaluate them if there are
    several, or if it is the demo.

    Several processes (torchrun) train a single run together. Several runs are distributed over the processes: each run
    is trained by one process, into a folder of its own below `out`."""
    textures = texture_files(args)
    categories = folders.category_folders(args.data)
    if categories != [args.data] and (args.defects or args.corrections):
        flag = "--defects" if args.defects else "--corrections"
        raise InputError(
            f"{flag}: applies to one category only, but --data {args.data} contains several; give one of them as --data"
        )
    several = categories != [args.data] or args.seeds > 1
    planned = plan_runs(args, options, categories, out, several)
    if args.weights and args.resume and all(resumable(run.out) for run in planned):
        refuse_without_effect(
            args, ["weights"], "with --resume: the checkpoint already contains the backbone's weights"
        )
    if processes.count > 1:
        dist.barrier()  # all processes have planned before one of them changes files
    if several:
        mine = planned[processes.rank :: processes.count]
    else:
        mine = planned if processes.first else []
    for run in mine:
        with locked(run.out):
            install(run.out)  # completes what a kill left half done
            if not args.resume:
                announce(run.out)
    if processes.count > 1:
        dist.barrier()  # so that no process mistakes old metrics for new ones
    if several:
        for number, run in enumerate(mine, start=1):
            print(f"{run.settings.category}, seed {run.settings.seed} (training {number} of {len(mine)})")
            train(run, args, textures, processes.alone())
    else:
        train(planned[0], args, textures, processes)
    if several or args.is_demo:
        for run in mine:
            evaluate_run(run, args)
    if several:
        tested = [run for run in planned if folders.has_tests(run.category)]
        without = sorted({run.settings.category for run in planned if run not in tested})
        if without:
            print(f"not in table.md, since they have no test images: {', '.join(without)}")
        write_results(tested, out)


def measured(run: Run) -> dict | None:
    """The run's metrics.json, if it belongs to the present model, its own test images and the default threshold, and no
    new training is unfinished."""
    path = run.out / "metrics.json"
    if not path.exists() or is_unfinished(run.out):
        return None
    from kit.measuring import detector_fingerprint  # see `evaluate_run`

    metrics = json.loads(path.read_text())
    detector = detector_fingerprint(read_checkpoint(run.out / MODEL)["state"])
    expected = {"checkpoint": MODEL, "detector": detector, "data": run.settings.data, "false_alarm": FALSE_ALARM}
    return metrics if all(metrics.get(name) == value for name, value in expected.items()) else None


def evaluate_run(run: Run, args: argparse.Namespace) -> None:
    """Measure a run on its category's test images, unless there are none, or this has been done."""
    from kit.measuring import Inspection, report  # imported here: training alone does not need it

    if folders.has_tests(run.category) and measured(run) is None:
        checkpoint = run.out / MODEL
        model = load(checkpoint, args.device)
        report(Inspection(model, checkpoint, run.out, FALSE_ALARM, bool(args.skip_bad)), run.category)


def write_results(planned: list[Run], out: Path) -> None:
    """Write results.json, the metrics of all runs, and table.md. Only the process that finishes last finds them all."""
    from kit.measuring import results_table

    rows = [measured(run) for run in planned]
    if not rows or None in rows:
        return
    own = OwnFiles(out, "trained")
    write_text(own.claim("results.json"), json.dumps(rows, indent=2) + "\n")
    table = results_table(rows)
    write_text(own.claim("table.md"), table)
    print(f"{table}wrote {out / 'results.json'} and {out / 'table.md'}")


def texture_files(args: argparse.Namespace) -> list[Path]:
    """The images in --textures and its subfolders. Raises InputError if there are none."""
    if not args.textures:
        return []
    folders.print_unread(args.textures, subfolders=True)
    textures = folders.usable(folders.list_images(args.textures, subfolders=True), args.skip_bad)
    if not textures:
        raise InputError(
            f"--textures {args.textures}: no such folder, or no images in it; give a folder of texture images"
        )
    return textures


def main(arguments: list[str] | None = None) -> None:
    args, options = training_options(arguments)
    if options["backbone"] not in BACKBONES:
        raise InputError(f"--backbone {options['backbone']}: unknown backbone; choose from {', '.join(BACKBONES)}")
    processes = join_processes()
    args.device = pick_device(args.device, processes.local_rank)
    if args.int8 and not is_fast(torch.device(args.device)):
        raise InputError(f"--int8: this device ({args.device}) is not fast at 8-bit integers (VNNI); leave it out")
    out = args.out or Path("runs", "demo" if args.is_demo else folders.category_name(args.data))
    if args.is_demo:
        from kit.demo import draw_demo

        args.data = out / "data" / "demo"
        check_out(out, args.data, [], args.resume)  # before the demo is drawn into it
        if processes.first:
            draw_demo(args.data)
        if processes.count > 1:
            dist.barrier()  # the other processes read what the first one draws
    train_all(args, options, out, processes)


if __name__ == "__main__":
    keep_freed_memory()
    run_script(main, on_interrupt="stopped; to continue, add --resume to the same command")
