"""Measure a detector: python evaluate.py runs/bottle; let it judge: ... --images new/; export: ... --export FILE"""

from kit import waiting  # noqa: F401 (first, before PyTorch is imported)

# isort: split
import argparse
import io
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from kit import data, draw, metrics, runs
from kit.calibration import recalibrate
from kit.detector import FALSE_ALARM, Detector
from kit.errors import InputError, run_script
from kit.files import write_atomically, write_text
from kit.images import load_image, photograph, read_image, read_mask, shape_of, turned
from kit.inspection import judge_new, print_skipped, sentence
from kit.options import Parser, flag_of, is_given, pick_device, refuse_inside, refuse_without_effect
from kit.processes import Processes, join_processes, keep_freed_memory
from kit.progress import counted
from kit.report import Entry, save_views, write_page
from kit.verdict import Thresholds, Verdict, basis
from kit.watching import watch
from methods import load

BATCH = 8
OPERATING_POINTS = (0.01, 0.02, 0.05, 0.1)
REPORTED = ("backbone", "size", "image_auroc", "pixel_auroc", "aupro", "ms_per_image")  # at the head of report.html


# ---------------------------------------------------------------- a labelled test set


@dataclass(frozen=True)
class Judged:
    """What a detector said of N test images: labels, scores (N,), maps and true masks (N, size, size), and the median
    of milliseconds an image, without decoding."""

    tests: list[data.LabelledImage]
    labels: np.ndarray
    scores: np.ndarray
    maps: np.ndarray
    masks: np.ndarray
    milliseconds: float


def judge_tests(model: Detector, tests: list[data.LabelledImage], processes: Processes) -> Judged:
    """Judge test images; each process judges a part, and all get the whole."""
    maps = torch.zeros(len(tests), model.size, model.size)
    scores = torch.zeros(len(tests))
    times = []
    mine = list(range(processes.rank, len(tests), processes.count))
    for start in counted(range(0, len(mine), BATCH), "judging test images", len(mine), BATCH):
        rows = mine[start : start + BATCH]
        images = data.read_batch([tests[i].path for i in rows], model.size)
        started = time.perf_counter()
        with torch.no_grad():
            found_maps, found_scores = model(images)
        maps[rows], scores[rows] = found_maps.cpu(), found_scores.cpu()
        times.append(1000 * (time.perf_counter() - started) / len(images))
    if processes.count > 1:  # each has filled rows of its own: their sum is the whole
        dist.all_reduce(maps)
        dist.all_reduce(scores)
    labels = np.array([test.anomalous for test in tests])
    masks = np.stack([read_mask(test.mask, model.size) for test in tests])
    return Judged(tests, labels, scores.numpy(), maps.numpy(), masks, float(np.median(times or [0])))


def unmasked(judged: Judged) -> int:
    """How many defective images have no mask, or an empty one: with any such, pixel metrics would be wrong."""
    return int((judged.labels & ~judged.masks.any(axis=(1, 2))).sum())


def measure(judged: Judged) -> dict[str, float | None]:
    """Image and pixel metrics; None where they are undefined."""
    pixel = metrics.pixel_metrics(judged.maps, judged.masks)
    if unmasked(judged):
        pixel = dict.fromkeys(pixel)
    return {**metrics.image_metrics(judged.labels, judged.scores), **pixel}


def readable_tests(category: Path, skip_bad: bool) -> list[data.LabelledImage]:
    """The test images of a category; with `skip_bad` less those that cannot be read, which are named and counted."""
    tests = data.labelled_images(category)
    good = set(usable([test.path for test in tests], skip_bad))
    if not good:
        raise InputError(f"--data {category}: not one of its test images can be read")
    return [test for test in tests if test.path in good]


def usable(files: list[Path], skip_bad: bool) -> list[Path]:
    """`files`; with `skip_bad` less those that cannot be read, which are named and counted."""
    if not skip_bad:
        return files
    good, complaints = data.readable(files)
    print_skipped(complaints, len(files))
    return good


def report(
    model: Detector,
    checkpoint: Path,
    category: Path,
    out: Path,
    false_alarm: float,
    skip_bad: bool,
    processes: Processes,
) -> None:
    """Measure the `model` of a checkpoint on a category's test images; `out` gets metrics.json, report.html and
    pictures/."""
    judged = judge_tests(model, readable_tests(category, skip_bad), processes)
    if not processes.first:
        return  # its part is done
    limits = model.thresholds(false_alarm)
    print(basis(limits))
    if missing := unmasked(judged):
        print(f"pixel metrics are n/a: {missing} defective images have no mask, or an empty one")
    found = {
        "checkpoint": checkpoint.name,
        "category": category.resolve().name,
        "data": str(category.resolve()),
        **{name: model.settings.get(name) for name in ("method", "backbone", "size", "seed", "epochs")},
        **measure(judged),
        "ms_per_image": judged.milliseconds,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "false_alarm": false_alarm,
        "threshold": limits.score,
        "at_most": limits.at_most,
        **metrics.shares_at(limits.score, judged.labels, judged.scores),
    }
    for name, value in found.items():
        print(f"{name:14} {as_text(value)}")
    found["operating_points"] = operating_points(model, judged)
    for point in found["operating_points"]:
        print("operating point", {name: as_text(value) for name, value in point.items()})
    facts = {name: as_text(found[name]) for name in REPORTED}
    draw_tests(model, judged, out, limits, facts | {"calibration": basis(limits)})
    write_text(out / "metrics.json", json.dumps(found, indent=2) + "\n")
    print(f"wrote metrics.json, report.html (open it in a browser) and {len(judged.tests)} pictures into {out}")


def as_text(value: object) -> str:
    if value is None:
        return "n/a"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def operating_points(model: Detector, judged: Judged) -> list[dict[str, float | None]]:
    """What other rates of false alarms would give: their threshold, and what it does on the test images."""
    points = []
    for rate in OPERATING_POINTS:
        limit = model.thresholds(rate).score
        shares = metrics.shares_at(limit, judged.labels, judged.scores)
        points.append({"false_alarm": rate, "threshold": limit, **shares})
    return points


def draw_tests(model: Detector, judged: Judged, out: Path, limits: Thresholds, facts: dict[str, str]) -> None:
    """report.html, with `facts` at its head, and pictures/<kind>/<file>.png of every test image. Those of an earlier
    evaluation are removed."""
    runs.remove(out, ("pictures", "report_files"))
    entries = []
    found = zip(judged.tests, judged.scores, judged.maps, judged.masks, strict=True)
    for test, score, heat, true in counted(found, "drawing pictures", len(judged.tests)):
        name = f"{test.kind}/{test.path.name}"
        image = turned(load_image(test.path))
        verdict = model.verdict(float(score), heat, shape_of(image), limits)
        photo = photograph(image, draw.LARGE)
        mask = true if test.mask or not test.anomalous else None
        title = f"{miss(verdict, test.anomalous)}{name}"
        picture = draw.verdict_picture(photo, title, verdict, limits, mask)
        draw.save_picture(out / "pictures" / test.kind / f"{test.path.name}.png", picture)
        save_views(out, name, photo, verdict, limits, mask)
        entries.append(Entry(name, test.kind, test.anomalous, float(score)))
    title = f"{model.settings['category']}, {model.settings['method']}: {len(entries)} test images"
    write_page(out, title, facts, limits.score, entries)


def miss(verdict: Verdict, anomalous: bool) -> str:
    """What went wrong, in capitals; nothing if the verdict is right."""
    if verdict.anomalous == anomalous:
        return ""
    return "MISSED " if anomalous else "FALSE ALARM "


def curve(run: Path, device: str, skip_bad: bool, processes: Processes) -> None:
    """Measure every epoch_NN.pt below `run` on its category's test images; curve.json and curve.png, a line per run."""
    lines: dict[str, dict[str, list]] = {"image_auroc": {}, "pixel_auroc": {}, "aupro": {}}
    for file in runs.kept_epochs(run, subfolders=True):
        model = load(file, device)
        judged = judge_tests(model, readable_tests(Path(model.settings["data"]), skip_bad), processes)
        found = measure(judged)
        label = "/".join(file.resolve().parent.parts[-2:])
        epoch = runs.epoch_of(file)
        print(f"{label}, epoch {epoch}:", {name: found[name] for name in lines}, flush=True)
        for name in lines:
            if found[name] is not None:
                lines[name].setdefault(label, []).append((epoch, found[name]))
    charts = [draw.line_chart(f"{name} by epoch", by_run) for name, by_run in lines.items() if by_run]
    if not charts:
        raise InputError(f"{run}: no epoch_NN.pt in it, or nothing to measure it on; train with --keep-epochs")
    if not processes.first:
        return
    draw.save_picture(run / "curve.png", draw.below_each_other(charts))
    write_text(run / "curve.json", json.dumps(lines) + "\n")
    print(f"wrote {run / 'curve.png'} and {run / 'curve.json'}")


# ---------------------------------------------------------------- new good images


def write_recalibrated(model: Detector, run: Path, folder: Path, false_alarm: float, skip_bad: bool) -> None:
    """Take the thresholds from the good images in `folder`: RUN/recalibrated.pt, without training."""
    files = usable(data.list_images(folder, subfolders=True), skip_bad)
    if len(files) < 2:
        raise InputError(f"--recalibrate {folder}: {len(files)} images there; give at least 2 good ones, better 50")
    taken = recalibrate(model, files)
    if len(taken) < len(files):
        print(f"took {len(taken)} of {len(files)} images, drawn at random")
    model.settings["false_alarm"] = false_alarm
    print(basis(model.thresholds()))
    to = run / runs.RECALIBRATED
    write_atomically(to, model.save)
    print(f"wrote {to}, which counts where it is named: python evaluate.py {to} --images FOLDER")


# ---------------------------------------------------------------- one image, explained


def explain(model: Detector, path: Path, out: Path, false_alarm: float) -> None:
    """A picture of what happens to an image, step by step."""
    image = read_image(path, model.size)
    images = torch.from_numpy(image).permute(2, 0, 1)[None]
    stages = [(name, values.cpu().numpy()) for name, values in model.stages(images)]
    with torch.no_grad():
        maps, scores = model(images)
    limits = model.thresholds(false_alarm)
    as_drawn = model.verdict(scores.item(), maps[0].cpu().numpy(), image.shape[:2], limits)
    draw.save_picture(out, draw.explanation(image, path.name, stages, as_drawn, limits))
    verdict = model.inspect(path, false_alarm)  # the same, but its boxes are in the photograph's own pixels
    print(f"{path}: {sentence(verdict)}\nwrote {out}")


# ---------------------------------------------------------------- to other programs


def export(model: Detector, file: Path) -> None:
    """Write the detector, on the CPU: to FILE.onnx for other runtimes, else as a torch.export program, which
    torch.export.load reads. In float32 throughout: its scores are the same on any machine."""
    model.full_precision = True
    images = torch.zeros(2, 3, model.size, model.size)
    with torch.no_grad():
        program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    if file.suffix == ".onnx":
        contents = as_onnx(program, model)
    else:
        buffer = io.BytesIO()  # a path would have to end in .pt2
        torch.export.save(program, buffer)
        contents = buffer.getvalue()
    write_atomically(file, lambda to: to.write_bytes(contents))
    print(f"wrote {file}: images (batch, 3, {model.size}, {model.size}) in [0, 1] -> maps and scores")


def as_onnx(program: torch.export.ExportedProgram, model: Detector) -> bytes:
    """The program as an ONNX file; its metadata hold the thresholds, and what is to be done to an image."""
    try:
        import onnxscript  # noqa: F401 (torch.onnx needs it)
    except ImportError as error:
        raise InputError("--export FILE.onnx: needs two more packages, pip install onnx onnxscript") from error
    names = {"input_names": ["images"], "output_names": ["maps", "scores"]}
    found = torch.onnx.export(program, dynamo=True, verbose=False, **names).model_proto
    limits = model.thresholds()
    about = {
        "images": f"RGB in 0..1, (batch, 3, {model.size}, {model.size}), resized bilinear with antialiasing (Pillow)",
        "score_threshold": repr(limits.score),
        "map_threshold": repr(limits.heat),
        "false_alarm": repr(model.false_alarm),
        "category": str(model.settings.get("category")),
    }
    for key, value in about.items():
        entry = found.metadata_props.add()
        entry.key, entry.value = key, value
    return found.SerializeToString()


# ---------------------------------------------------------------- the command line


def option_parser() -> Parser:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("run", type=Path, help="run folder with model.pt in it, or a checkpoint")
    add("--data", type=Path, help="category with test/, instead of the one it was trained on")
    add("--images", type=Path, help="judge this image, or those in this folder and its subfolders, instead")
    add("--watch", action="store_true", default=None, help="with --images FOLDER: judge what arrives there, too")
    add("--explain", type=Path, metavar="IMAGE", help="draw what happens to this image, step by step, instead")
    add("--export", type=Path, metavar="FILE", help="write a torch.export program instead, or FILE.onnx")
    add(
        "--curve",
        action="store_true",
        default=None,
        help="measure each epoch that train.py --keep-epochs kept, instead",
    )
    add("--recalibrate", type=Path, metavar="FOLDER", help="take the threshold from these new good images instead")
    add(
        "--out",
        type=Path,
        help="folder for what --images (predictions) or --data (RUN/tests/NAME) finds, or file for --explain",
    )
    add("--false-alarm", type=float, help=f"share of good images that may be flagged ({FALSE_ALARM})")
    add("--skip-bad", action="store_true", default=None, help="go on without images that cannot be read")
    add("--device", help="cpu, cuda, ... (a GPU, if there is one)")
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Raises InputError if options contradict each other, or have no effect beside each other."""
    modes = [
        name
        for name in ("data", "images", "explain", "export", "curve", "recalibrate")
        if is_given(getattr(args, name))
    ]
    if len(modes) > 1:
        raise InputError(f"{flag_of(modes[0])} and {flag_of(modes[1])} are two different things to do; give one")
    if args.export:
        refuse_without_effect(args, ["out", "false_alarm", "skip_bad", "device"], "with --export")
    if args.curve:
        refuse_without_effect(args, ["out", "false_alarm"], "with --curve")
    if args.recalibrate:
        refuse_without_effect(args, ["out"], "with --recalibrate")
    if args.explain:
        refuse_without_effect(args, ["skip_bad"], "with --explain")
    if args.watch:
        refuse_without_effect(args, ["skip_bad"], "with --watch")
    if not args.images:
        refuse_without_effect(args, ["watch"], "without --images FOLDER")
    if not modes:
        refuse_without_effect(args, ["out"], "without --images, --data or --explain")
    if args.false_alarm is not None and not 0 < args.false_alarm < 1:
        raise InputError(f"--false-alarm {args.false_alarm}: out of range, give a share between 0 and 1")


def main(arguments: list[str] | None = None) -> None:
    args = option_parser().parse_args(arguments)
    check_options(args)
    processes = join_processes()
    device = pick_device(args.device, processes.local_rank)
    if args.curve:
        return curve(args.run, device, args.skip_bad, processes)
    checkpoint = runs.checkpoint_of(args.run)
    if args.export:
        if processes.first:
            export(load(checkpoint, "cpu"), args.export)
        return None
    if checkpoint.name == runs.STATE:
        print(f"{args.run}: its training is not finished; this is its last whole epoch")
    model = load(checkpoint, device)
    false_alarm = args.false_alarm or model.false_alarm
    if args.explain:
        if processes.first:
            explain(model, args.explain, args.out or Path("explained.png"), false_alarm)
        return None
    if args.recalibrate:
        if processes.first:
            write_recalibrated(model, checkpoint.parent, args.recalibrate, false_alarm, args.skip_bad)
        return None
    if args.watch:
        if processes.first:
            watch(model, checkpoint, args.images, args.out or Path("predictions"), false_alarm)
        return None
    if args.images:
        if processes.first:
            judge_new(model, checkpoint, args.images, args.out or Path("predictions"), false_alarm, args.skip_bad)
        return None
    own_data = Path(model.settings["data"])
    category = args.data or own_data
    out = args.out or results_folder(checkpoint, category, own_data)
    refuse_inside(out, category / "test")
    if args.out and (out / "pictures").exists() and not (out / "report_files").exists():
        raise InputError(f"--out {out}: has pictures in it, which are no evaluation's; give another --out")
    report(model, checkpoint, category, out, false_alarm, args.skip_bad, processes)
    return None


def results_folder(checkpoint: Path, category: Path, own_data: Path) -> Path:
    """Where the figures go: into the run, if they are those of its last checkpoint on its own category; others stay
    apart, so that nobody takes the one for the other."""
    if checkpoint.name not in (runs.MODEL, runs.STATE):
        return checkpoint.parent / "tests" / checkpoint.stem
    if category.resolve() != own_data:
        return checkpoint.parent / "tests" / category.resolve().name
    return checkpoint.parent


if __name__ == "__main__":
    keep_freed_memory()
    run_script(main, on_interrupt="stopped; the same call with --images goes on where it was")
