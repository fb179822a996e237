"""Measure a detector: python evaluate.py runs/bottle. Judge images: ... --images new/. Export: ... --export FILE"""

from kit import InputError  # first, before PyTorch is imported
from kit.command_line import evaluation_options, quit_on_signals, run_script

if __name__ == "__main__":
    quit_on_signals()
    run_script(evaluation_options)  # checks the options before the slow import of PyTorch

# isort: split
import argparse
import io
import json
import math
import re
import shlex
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bank import Prototypes
from kit import data, draw, folders, quantized
from kit.calibration import LIMIT, alike_in_order, is_series, measured_files, print_series
from kit.camera import usual
from kit.detector import Detector, read_checkpoint
from kit.files import (
    MODEL,
    RECALIBRATED,
    STATE,
    UNFINISHED,
    OwnFiles,
    checkpoint_of,
    folder_of,
    is_unfinished,
    locked,
    refuse_inside,
    single_file,
    write_atomically,
    write_text,
)
from kit.good import camera_copy
from kit.images import SUFFIXES, read_image, to_tensor
from kit.inspection import drift, findings_folder, judge_new, sentence
from kit.measuring import (
    Inspection,
    detector_fingerprint,
    figure_text,
    judge_tests,
    left_to_measure,
    measure,
    readable_tests,
    report,
)
from kit.processes import Processes, join_processes, pick_device
from kit.real_defects import files_of_training, is_among, without_copies
from kit.rows import origins, spread
from kit.search import CANDIDATES
from kit.settings import LEAST_IMAGES
from kit.verdict import Thresholds, basis, outliers
from kit.watching import watch
from kit.windows import keep_freed_memory
from methods import load
from methods.stages import explanation, stages_of

COMPARED = 100  # good images, to measure how another precision changes scores
BANK = 4000  # prototypes, to find out whether new images are a series


# ---------------------------------------------------------------- epoch by epoch


def curve(run: Path, device: str, skip_bad: bool, processes: Processes) -> None:
    """Measure every epoch_NN.pt below `run` on its category's test images. Writes curve.json and curve.png, with a line
    for each run."""
    lines: dict[str, dict[str, list]] = {"image_auroc": {}, "pixel_auroc": {}, "aupro": {}}
    for file in kept_epochs(run):
        model = load(file, device)
        tests = left_to_measure(model, readable_tests(own_category(model, file), skip_bad))
        judged = judge_tests(model, tests, processes)
        figures = measure(judged)
        folder = folder_of(file)
        label = run.resolve().name if folder == run else folder.relative_to(run).as_posix()
        epoch = epoch_of(file)
        print(
            f"{label}, epoch {epoch}: {', '.join(f'{name} {figure_text(figures[name])}' for name in lines)}", flush=True
        )
        for name in lines:
            if figures[name] is not None:
                lines[name].setdefault(label, []).append((epoch, figures[name]))
    charts = [draw.line_chart(f"{name} by epoch", by_run) for name, by_run in lines.items() if by_run]
    if not charts:
        raise InputError(
            f"{run}: contains no epoch_NN.pt, or its category has no test images; train with --keep-epochs "
            "on a category with test/"
        )
    if not processes.first:
        return
    own = OwnFiles(run, "measured")
    draw.save_picture(own.claim("curve.png"), draw.below_each_other(charts))
    write_text(own.claim("curve.json"), json.dumps(lines) + "\n")
    print(f"wrote {run / 'curve.png'} and {run / 'curve.json'}")


def epoch_of(path: Path) -> int:
    return int(path.stem.removeprefix("epoch_"))


def kept_epochs(out: Path) -> list[Path]:
    """The epoch checkpoints of all runs in a folder or below it, sorted by run and epoch."""
    found = out.glob("**/*.pt")
    kept = [path for path in found if re.fullmatch(r"epoch_\d+", path.stem) and not is_of_successor(path)]
    return sorted(kept, key=lambda path: (path.parent, epoch_of(path)))


def is_of_successor(path: Path) -> bool:
    """Whether a file belongs to an unfinished training in a folder that has a finished detector."""
    return path.parent.name == UNFINISHED and (folder_of(path) / MODEL).exists()


# ---------------------------------------------------------------- new good images


def unseen(model: Detector, files: list[Path]) -> list[Path]:
    """The files that were not part of the training of `model`, neither as good images (held out or not) nor as defects.
    Copies are recognised by their bytes. Prints a line on how many were left out."""
    known = files_of_training(model.settings)
    new = [path for path in files if not is_among(path, known)]
    if len(new) < len(files):
        print(
            f"left out {len(files) - len(new)} of {len(files)} images: the detector was trained or calibrated with them"
        )
    return new


@torch.no_grad()
def recalibrate(model: Detector, files: list[Path], alike: float) -> None:
    """Set the scale and the thresholds of `model` from these new good images. `alike` is the result of `alike_in_order`
    for them. Raises InputError if they are too few."""
    different = len(files)
    if is_series(alike, len(files)):
        different = round(len(files) / alike)
        print_series(len(files), different)
    if different < LEAST_IMAGES:
        raise InputError(
            f"--recalibrate: only {different} different new images; give at least {LEAST_IMAGES}, better 50"
        )
    energies = [model.energies_in_windows(images) for images in data.batches(files, model.shape)]
    scores = torch.cat([model.scores(batch)[0] for batch in energies]).cpu().numpy()
    if drift(scores, model.good_scores[0].cpu().numpy()) == "lower":
        print(
            "warning: these images score clearly lower than the good images that set the earlier threshold. If they "
            "are copies of training images, the new threshold is too low"
        )
    model.calibrate(energies)
    model.different = torch.tensor(different, device=model.device)
    measures = np.stack([measures for _, measures in measured_files(model, files)])
    model.camera = torch.from_numpy(usual(measures)).to(model.camera)


@torch.no_grad()
def alike_among(model: Detector, files: Sequence[Path]) -> float:
    """`alike_in_order` for images that the model has not seen, with a bank of their own features."""
    generator = torch.Generator().manual_seed(model.settings.seed)
    maps = map(model.features, data.batches(files, model.shape))
    rows, _ = spread(maps, len(files), model, math.ceil(CANDIDATES / len(files)), generator)
    images = origins(rows, range(len(files)))
    prototypes = Prototypes(rows.shape[1]).to(rows.device)
    prototypes.fit(rows, images, min(BANK, math.ceil(len(rows) / 10)), generator)
    return alike_in_order(prototypes, model.dtype, files, rows, images)


def write_recalibrated(work: Inspection, folder: Path) -> None:
    """Set the thresholds from the good images in `folder`, without training. Writes RUN/recalibrated.pt."""
    if not folder.is_dir():
        raise InputError(f"--recalibrate {folder}: no such folder")
    folders.print_unread(folder, subfolders=True)
    model = work.model
    files = unseen(model, folders.usable(folders.list_images(folder, subfolders=True), work.skip_bad))
    hashes = without_copies(files)
    files = list(hashes)
    if len(files) < LEAST_IMAGES:
        raise InputError(
            f"--recalibrate {folder}: only {len(files)} new images; give at least {LEAST_IMAGES}, better 50"
        )
    taken = files
    if len(files) > LIMIT:
        order = np.random.default_rng(0).permutation(len(files))[:LIMIT]
        taken = [files[i] for i in order]
        print(f"using {LIMIT} of {len(files)} images, chosen at random")
    recalibrate(model, taken, alike_among(model, taken))
    known = sorted({*model.settings.good, *(hashes[path] for path in taken)})
    model.settings = replace(model.settings, false_alarm=work.false_alarm, good=tuple(known))
    print(basis(model.thresholds()))
    odd = outliers(model.good_scores[0].cpu().numpy())
    if len(odd):
        print(
            f"{len(odd)} of these images look unlike the others: {', '.join(taken[index].name for index in odd[:3])}"
            f"{' ...' if len(odd) > 3 else ''}; if they are defective, remove them and recalibrate again"
        )
    to = OwnFiles(work.out, "trained").claim(RECALIBRATED)
    write_atomically(to, model.save)
    command = f"python evaluate.py {shlex.quote(str(to))} --images FOLDER"
    print(f"wrote {to}; to use the new threshold, give this file: {command}")


# ---------------------------------------------------------------- one image, explained


def explain(work: Inspection, path: Path) -> None:
    """Draw how an image is processed, step by step, into the file `work.out`."""
    model = work.model
    image = read_image(path, model.shape)
    images = to_tensor(image[None])
    stages = [(name, values.cpu().numpy()) for name, values in stages_of(model, images)]
    with torch.no_grad():
        maps, scores = model(images)
    limits = work.limits
    as_drawn = model.verdict(scores.item(), maps[0].cpu().numpy(), image.shape[:2], limits)
    photo = draw.dimmed(Image.fromarray(draw.as_bytes(image)), model.roi)
    draw.save_picture(work.out, explanation(photo, path.name, stages, as_drawn, limits))
    verdict = model.inspect(path, work.false_alarm)  # the same, but its boxes are in the photograph's own pixels
    height, width = verdict.anomaly_map.shape
    print(f"{path}, {width} x {height}, judged at {model.shape[1]} x {model.shape[0]}: {sentence(verdict)}")
    print(f"wrote {work.out}")


# ---------------------------------------------------------------- to other programs


def export(model: Detector, file: Path) -> None:
    """Export a detector on the CPU: FILE.onnx for other runtimes, any other name as a torch.export program, which
    torch.export.load reads. It computes in float32, so that its scores are the same on any machine; activations that
    were rounded to 8 bits still are."""
    if file.suffix.lower() == ".onnx":
        need_onnx()
    limits = exported_limits(model)
    model.for_export()
    height, width = model.shape
    images = torch.zeros(2, 3, height, width)
    with torch.no_grad():
        program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    if file.suffix.lower() == ".onnx":
        contents = as_onnx(program, model, limits)
    else:
        buffer = io.BytesIO()  # a path would have to end in .pt2
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about weights that share memory
            torch.export.save(program, buffer)
        contents = buffer.getvalue()
    write_atomically(file, lambda to: to.write_bytes(contents))
    print(f"wrote {file}: images (batch, 3, {height}, {width}) in [0, 1] -> maps and scores")
    print(f"thresholds: {limits.score:.4f} for the score, {limits.anomaly_map:.4f} for the map")


def exported_limits(model: Detector) -> Thresholds:
    """The thresholds of a detector as it is exported. If it was calibrated in bfloat16 or with a backbone in int8, its
    scores were slightly different: then the thresholds are multiplied by the ratio of scores as exported and as they
    were before, both summed over camera copies of good images. (The good images themselves have near zero scores: their
    features are in the bank.) After such a comparison the model computes as it is exported."""
    limits = model.thresholds()
    if not model.halved and not model.backbone.has_int8:
        return limits
    name = "bfloat16" if model.halved else "int8"
    folder = Path(model.settings.data)
    reason = ""
    if model.precision_warning() or (model.backbone.has_int8 and not quantized.is_fast(model.device)):
        reason = f"this machine has no fast {name}"
    elif not (some := some_good(folder)):
        reason = f"there are no good images in {folder} any more"
    if reason:
        print(
            f"the exported detector computes in float32, but its thresholds were set in {name} and could not be "
            f"converted ({reason}): they may be off by a few hundredths"
        )
        return limits
    before = scores_and_peaks(model, some)
    model.for_export()
    score_ratio, map_ratio = scores_and_peaks(model, some) / before
    return replace(limits, score=float(limits.score * score_ratio), anomaly_map=float(limits.anomaly_map * map_ratio))


def some_good(category: Path) -> list[Path]:
    """At most COMPARED good images of a category, evenly spread, without those that cannot be read; none if it has no
    images any more."""
    try:
        files = folders.list_images(folders.good_folder(category))
    except InputError:
        return []
    return folders.usable(files[:: math.ceil(len(files) / COMPARED)], skip_bad=True)


@torch.no_grad()
def scores_and_peaks(model: Detector, files: list[Path]) -> np.ndarray:
    """The sums (2,) of the scores and of the maps' maxima, of a camera copy of each of these images."""
    sums = np.zeros(2)
    for number, path in enumerate(files):
        copy = camera_copy(read_image(path, model.shape), np.random.default_rng(number))
        sums += model.scores(model.energies_in_windows(to_tensor(copy[None])))[:, 0].cpu().numpy()
    return sums


def need_onnx() -> None:
    """Raises InputError if the packages that ONNX needs are missing: before the export, which takes seconds."""
    try:
        import onnxscript  # noqa: F401 (torch.onnx needs it)
    except ImportError as error:
        raise InputError("--export FILE.onnx: needs two more packages: pip install onnx onnxscript") from error


def as_onnx(program: torch.export.ExportedProgram, model: Detector, limits: Thresholds) -> bytes:
    """The program as an ONNX file. Its metadata hold the thresholds and describe the preprocessing of images."""
    names = {"input_names": ["images"], "output_names": ["maps", "scores"]}
    graph = torch.onnx.export(program, dynamo=True, verbose=False, **names).model_proto
    height, width = model.shape
    about = {
        "images": f"RGB in 0..1, (batch, 3, {height}, {width}), resized bilinear with antialiasing (Pillow)",
        "height": str(height),
        "width": str(width),
        "score_threshold": repr(limits.score),
        "map_threshold": repr(limits.anomaly_map),
        "false_alarm": repr(model.settings.false_alarm),
        "category": model.settings.category,
    }
    for key, value in about.items():
        entry = graph.metadata_props.add()
        entry.key, entry.value = key, value
    return graph.SerializeToString()


# ---------------------------------------------------------------- the command line


def main(arguments: list[str] | None = None) -> None:
    args = evaluation_options(arguments)
    processes = join_processes()
    device = pick_device(args.device, processes.local_rank)
    if args.curve:
        return curve(args.run, device, args.skip_bad, processes)
    checkpoint = checkpoint_of(args.run)
    tell_unfinished(args.run, checkpoint)
    if args.export:
        if args.export.suffix.lower() in SUFFIXES:
            raise InputError(f"--export {args.export}: is the name of an image; give FILE.onnx or FILE.pt2")
        if processes.first:
            model = load(checkpoint, "cpu")
            if args.false_alarm:
                model.settings = replace(model.settings, false_alarm=args.false_alarm)
            export(model, single_file(args.export, args.export, "--export", [checkpoint]))
        return None
    model = load(checkpoint, device)
    tell_precision(model, args, processes)
    work = Inspection(
        model,
        checkpoint,
        out=output(args, checkpoint, model),
        false_alarm=args.false_alarm or model.settings.false_alarm,
        skip_bad=bool(args.skip_bad),
        processes=processes,
    )
    if is_test(args):
        category = args.data or own_category(model, args.run)
        refuse_inside(work.out, category / "test")
        return report(work, category)
    if not processes.first:  # one process alone judges new images
        return None
    if args.explain:
        return explain(work, args.explain)
    if args.recalibrate:
        with locked(work.out):
            return write_recalibrated(work, args.recalibrate)
    if args.watch:
        return watch(work, args.images)
    return judge_new(work, args.images)


def tell_unfinished(run: Path, checkpoint: Path) -> None:
    """Print a line if the training in this run folder is not finished. Raises InputError if `checkpoint` was saved
    before its first epoch: that detector is untrained."""
    if checkpoint.name == STATE:
        saved = read_checkpoint(checkpoint)
        if saved["progress"]["epoch"] == 0 and "epochs" in saved["settings"]:
            raise InputError(f"{run}: training stopped before the first epoch ended; continue with train.py --resume")
        print(f"{run}: training is not finished; this uses its last complete epoch")
    elif checkpoint == run / MODEL and checkpoint.exists() and is_unfinished(run):
        print(
            f"{run}: a later training in this folder is not finished (train.py --resume continues it); this uses the "
            "detector that was complete before"
        )


def tell_precision(model: Detector, args: argparse.Namespace, processes: Processes) -> None:
    """Print a line if the threshold was calibrated in another precision. --recalibrate sets a new one anyway."""
    line = model.precision_warning()
    if line and processes.first and not args.recalibrate:
        print(line)
    model.is_precision_told = True


def own_category(model: Detector, run: Path) -> Path:
    """The category that a detector was trained on. Raises InputError, naming its run, if this folder is gone."""
    category = Path(model.settings.data)
    if not category.is_dir():
        raise InputError(
            f"{run}: the images it was trained on ({category}) are gone; put them back, or, without --curve, give the "
            "folder that contains test/ with --data"
        )
    return category


def is_test(args: argparse.Namespace) -> bool:
    """Whether to measure on a labelled test set."""
    return not (args.explain or args.recalibrate or args.images)


def output(args: argparse.Namespace, checkpoint: Path, model: Detector) -> Path:
    """Where the results go: --out, or its default."""
    if args.explain:
        return single_file(args.out, Path("explained.png"), "--out", [args.explain, checkpoint])
    if args.out:
        return args.out
    run = folder_of(checkpoint)
    if args.recalibrate:
        return run
    if args.images:
        return findings_folder(
            run.resolve().name, args.images, detector_fingerprint(model.state_dict()), bool(args.watch)
        )
    own_data = Path(model.settings.data)
    return results_folder(checkpoint, args.data or own_data, own_data)


def results_folder(checkpoint: Path, category: Path, own_data: Path) -> Path:
    """Where the metrics go: into the run folder if they are those of its final checkpoint on its own category. Others
    get a folder of their own, so that nobody confuses them: RUN/tests/CHECKPOINT, RUN/tests/CATEGORY, or
    RUN/tests/CHECKPOINT-CATEGORY."""
    run = folder_of(checkpoint)
    parts = []
    if checkpoint.name not in (MODEL, STATE):
        parts.append(checkpoint.stem)
    if category.resolve() != own_data:
        parts.append(folders.category_name(category))
    return run / "tests" / "-".join(parts) if parts else run


if __name__ == "__main__":
    keep_freed_memory()
    run_script(main, on_interrupt="stopped; with --images, the same command continues from there")
