"""Measuring on a labelled test set: judging, metrics, pictures; and the table over categories and seeds."""

import functools
import hashlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from kit import InputError, data, draw, folders, metrics, shapes
from kit.detector import Detector
from kit.draw import Entry, save_views, views_of, write_page
from kit.files import OwnFiles, checkpoint_of, fitting, folder_of, is_inside, locked, write_text
from kit.images import load_image, shape_of, turned
from kit.processes import ALONE, Processes, counted
from kit.real_defects import files_of_training, is_among
from kit.settings import Settings
from kit.verdict import Thresholds, Verdict, basis
from kit.windows import at_once

KEPT = 250_000_000  # pixels of the maps of all test images together: 1 GB
CURVE = ("curve.png", "curve.json")  # files of evaluate.py --curve
OPERATING_POINTS = (0.01, 0.02, 0.05, 0.1)
REPORTED = ("backbone", "size", "image_auroc", "pixel_auroc", "aupro", "ms_per_image")  # at the head of report.html
COLUMNS = ("image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "aupro", "recall", "false_alarms")  # of the table


@dataclass(frozen=True)
class Inspection:
    """One call of evaluate.py: a detector and its checkpoint, the folder for the results, and the accepted false-alarm
    rate."""

    model: Detector
    checkpoint: Path
    out: Path
    false_alarm: float
    skip_bad: bool = False
    processes: Processes = ALONE

    @property
    def limits(self) -> Thresholds:
        return self.model.thresholds(self.false_alarm)

    @functools.cached_property
    def detector(self) -> str:
        """The fingerprint of the detector."""
        return detector_fingerprint(self.model.state_dict())


def detector_fingerprint(state: dict[str, torch.Tensor]) -> str:
    """Twelve hexadecimal digits that identify a detector: a hash of weights, bank and calibration, the "state" of a
    checkpoint. A copy of a checkpoint has the same fingerprint."""
    found = hashlib.sha1()
    for name, values in state.items():
        found.update(f"{name} {tuple(values.shape)}".encode())
        found.update(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:12]


@dataclass(frozen=True)
class Judged:
    """The results of a detector on N test images: labels, scores (N,), maps and true masks (N, H, W), and the median
    time per image in milliseconds, without decoding."""

    tests: list[folders.LabelledImage]
    labels: np.ndarray
    scores: np.ndarray
    maps: np.ndarray
    masks: np.ndarray
    milliseconds: float


def judge_tests(model: Detector, tests: list[folders.LabelledImage], processes: Processes) -> Judged:
    """Judge test images. Each process judges a part, and all get the whole result."""
    step = math.ceil(math.sqrt(len(tests) * math.prod(model.shape) / KEPT))
    maps = torch.zeros(len(tests), *(math.ceil(side / step) for side in model.shape))
    scores = torch.zeros(len(tests))
    times = []
    mine = list(range(processes.rank, len(tests), processes.count))
    batch = at_once(model.shape)
    for start in counted(range(0, len(mine), batch), "judging test images", len(mine), batch):
        rows = mine[start : start + batch]
        images = data.read_batch([tests[i].path for i in rows], model.shape)
        started = time.perf_counter()
        with torch.no_grad():
            found_maps, found_scores = model(images)
        maps[rows], scores[rows] = found_maps[:, ::step, ::step].cpu(), found_scores.cpu()
        times.append(1000 * (time.perf_counter() - started) / len(images))
    if processes.count > 1:  # each has filled only its own rows, so the sum is the whole
        dist.all_reduce(maps)
        dist.all_reduce(scores)
    labels = np.array([test.anomalous for test in tests])
    if step > 1 and processes.first:
        print(f"to save memory, maps are compared with the masks at 1/{step} of the size")
    masks = np.stack([data.read_mask(test.mask, maps.shape[1:]) for test in tests])
    return Judged(tests, labels, scores.numpy(), maps.numpy(), masks, float(np.median(times or [0])))


def unmasked(judged: Judged) -> list[folders.LabelledImage]:
    """The defective images without a mask, or with an empty one. If there are any, pixel metrics would be wrong."""
    return [judged.tests[i] for i in np.flatnonzero(judged.labels & ~judged.masks.any(axis=(1, 2)))]


def stretched_masks(tests: list[folders.LabelledImage]) -> list[Path]:
    """The masks that have another aspect ratio than their images."""
    found = []
    for test in tests:
        if test.mask:
            image, mask = shapes.shape_in_file(test.path), shapes.shape_in_file(test.mask)
            if image and mask and shapes.is_other(mask, image):
                found.append(test.mask)
    return found


def measure(judged: Judged) -> dict[str, float | None]:
    """Image and pixel metrics; None where they are undefined."""
    pixel = metrics.pixel_metrics(judged.maps, judged.masks)
    if unmasked(judged):
        pixel = dict.fromkeys(pixel)
    return {**metrics.image_metrics(judged.labels, judged.scores), **pixel}


def readable_tests(category: Path, skip_bad: bool) -> list[folders.LabelledImage]:
    """The test images of a category. With `skip_bad`, a line is printed for each unreadable one, and it is left out."""
    for folder in folders.test_folders(category):
        folders.print_unread(folder)
    tests = folders.labelled_images(category)
    good = set(folders.usable([test.path for test in tests], skip_bad))
    if not good:
        raise InputError(f"--data {category}: none of the test images can be read; replace them")
    return [test for test in tests if test.path in good]


def left_to_measure(model: Detector, tests: list[folders.LabelledImage]) -> list[folders.LabelledImage]:
    """The test images without those that the detector was trained with, or copies of them; a line names these. Raises
    InputError if none is left."""
    known = files_of_training(model.settings)
    seen = [test for test in tests if is_among(test.path, known)]
    if seen:
        names = ", ".join(f"{test.defect_type}/{test.path.name}" for test in seen)
        print(f"left out {len(seen)} test images, since the detector was trained with them: {names}")
    left = [test for test in tests if test not in seen]
    if not left:
        raise InputError("--data: the detector was trained with all of its test images; give other test images")
    return left


def report(work: Inspection, category: Path) -> None:
    """Measure a detector on a category's test images. Writes metrics.json, report.html and pictures/."""
    model, out = work.model, work.out
    refuse_other_figures(work, category)
    tests = left_to_measure(model, readable_tests(category, work.skip_bad))
    if work.processes.first:  # a folder that cannot be written is refused before the images are judged
        with locked(out):
            OwnFiles(out, "measured").claim("metrics.json")
    judged = judge_tests(model, tests, work.processes)
    if not work.processes.first:
        return  # its part is done
    limits = work.limits
    print(basis(limits))
    shapes.print_others([test.path for test in judged.tests], model.shape)
    print_mask_warnings(judged)
    figures = figures_of(work, category, judged)
    for name, value in figures.items():
        print(f"{name:14} {figure_text(value)}")
    figures["operating_points"] = operating_points(model, judged)
    for point in figures["operating_points"]:
        shares = ", ".join(f"{name} {figure_text(point[name])}" for name in ("recall", "precision", "false_alarms"))
        print(f"with --false-alarm {point['false_alarm']}: threshold {figure_text(point['threshold'])}, {shares}")
    facts = {name: figure_text(figures[name]) for name in REPORTED}
    with locked(out):
        own = OwnFiles(out, "measured")
        unwritten = draw_tests(model, judged, own, limits, facts | {"calibration": basis(limits)})
        write_text(own.claim("metrics.json"), json.dumps(figures, indent=2) + "\n")
    written = len(judged.tests) - unwritten
    print(f"wrote metrics.json, report.html (open it in a browser) and {written} pictures into {out}")
    if unwritten:
        raise InputError(f"--out {out}: {unwritten} pictures were not written; check permissions and free disk space")


def print_mask_warnings(judged: Judged) -> None:
    """Print a line on masks that are missing, and one on masks that do not fit their images."""
    if missing := unmasked(judged):
        print(
            f"pixel metrics are n/a: {len(missing)} defective images have no mask or an empty one, for example "
            f"{missing[0].path}"
        )
    if stretched := stretched_masks(judged.tests):
        print(
            f"{len(stretched)} masks have another aspect ratio than their images, for example {stretched[0]}: they are "
            "stretched, so pixel metrics may be wrong"
        )


def figures_of(work: Inspection, category: Path, judged: Judged) -> dict:
    """What metrics.json says of a detector: where it comes from, its metrics, and its threshold."""
    model, limits = work.model, work.limits
    settings = model.settings
    return {
        "checkpoint": work.checkpoint.name,
        "detector": work.detector,
        "category": folders.category_name(category),
        "data": str(category.resolve()),
        "method": settings.method,
        "backbone": settings.backbone,
        "size": size_of(settings),
        "seed": settings.seed,
        "epochs": getattr(settings, "epochs", None),
        **measure(judged),
        "ms_per_image": judged.milliseconds,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "false_alarm": work.false_alarm,
        "threshold": limits.score,
        "at_most": limits.at_most,
        **metrics.shares_at(limits.score, judged.labels, judged.scores),
    }


def refuse_other_figures(work: Inspection, category: Path) -> None:
    """Raises InputError if the folder contains metrics of other test images, or, unless it belongs to the run, of
    another detector."""
    OwnFiles(work.out, "measured").refuse_foreign("metrics.json")
    path = work.out / "metrics.json"
    there = json.loads(path.read_text()) if path.exists() else {}
    if there.get("data", str(category.resolve())) != str(category.resolve()):
        raise InputError(f"--out {work.out}: contains metrics of {there['data']}; give --data with another --out")
    is_of_run = is_inside(work.out, folder_of(work.checkpoint))
    if not is_of_run and work.out.is_dir() and checkpoint_of(work.out).exists():
        raise InputError(f"--out {work.out}: is the folder of another run; give another --out")
    if not is_of_run and there.get("detector", work.detector) != work.detector:
        raise InputError(f"--out {work.out}: contains metrics of another detector; give another --out")


def size_of(settings: Settings) -> int | str:
    """The value that --size would take."""
    return settings.size if isinstance(settings.size, int) else shapes.size_text(settings.size)


def figure_text(value: object) -> str:
    if value is None:
        return "n/a"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def operating_points(model: Detector, judged: Judged) -> list[dict[str, float | None]]:
    """For other false-alarm rates: the threshold, and recall, precision and false alarms on the test images."""
    points = []
    for rate in OPERATING_POINTS:
        limit = model.thresholds(rate).score
        shares = metrics.shares_at(limit, judged.labels, judged.scores)
        points.append({"false_alarm": rate, "threshold": limit, **shares})
    return points


def draw_tests(model: Detector, judged: Judged, own: OwnFiles, limits: Thresholds, facts: dict[str, str]) -> int:
    """Draw report.html, with `facts` at its top, and pictures/<kind>/<file>.png of every test image. The files of an
    earlier evaluation are removed, but not those of --curve."""
    own.remove_all(but=CURVE)
    entries, unwritten = [], 0
    all_of_them = zip(judged.tests, judged.scores, judged.maps, judged.masks, strict=True)
    for test, score, anomaly_map, true in counted(all_of_them, "drawing pictures", len(judged.tests)):
        name = f"{test.defect_type}/{test.path.name}"
        image = turned(load_image(test.path))
        verdict = model.verdict(float(score), anomaly_map, shape_of(image), limits)
        photo = draw.photo_of(image, model.roi)
        mask = true if test.mask or not test.anomalous else None
        title = f"{miss(verdict, test.anomalous)}{name}"
        try:
            picture = draw.verdict_picture(photo, title, verdict, limits, mask)
            draw.save_picture(own.claim(f"pictures/{fitting(name)}.png"), picture)
            save_views(own, name, views_of(photo, verdict, limits, mask))
        except InputError as error:  # a single picture must not cost the metrics
            print(f"{name}: its picture could not be written: {error}", flush=True)
            unwritten += 1
        entries.append(Entry(name, test.defect_type, test.anomalous, float(score), test.path))
    title = f"{model.settings.category}, {model.settings.method}: {len(entries)} test images"
    write_page(own, title, facts, limits.score, entries)
    return unwritten


def miss(verdict: Verdict, anomalous: bool) -> str:
    """The kind of error, in capitals; "" if the verdict is right."""
    if verdict.anomalous == anomalous:
        return ""
    return "MISSED " if anomalous else "FALSE ALARM "


# ---------------------------------------------------------------- the table over categories and seeds


def results_table(rows: list[dict]) -> str:
    """Markdown table: mean ± standard deviation over the seeds for each category, then the mean of the categories.
    `rows` are the metrics.json of all runs. A metric that is undefined in one of them is n/a."""
    lines = [["category", "seeds", *COLUMNS], ["---"] * (2 + len(COLUMNS))]
    means = []
    for category in dict.fromkeys(row["category"] for row in rows):
        seeds = [row for row in rows if row["category"] == category]
        values = np.array([[row[name] for name in COLUMNS] for row in seeds], dtype=float)  # None becomes nan
        mean = values.mean(axis=0)
        spread = values.std(axis=0, ddof=1) if len(seeds) > 1 else [None] * len(COLUMNS)
        lines.append([category, str(len(seeds)), *map(cell, mean, spread)])
        means.append(mean)
    lines.append(["mean", "", *map(cell, np.mean(means, axis=0), [None] * len(COLUMNS))])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cell(mean: float, spread: float | None) -> str:
    if math.isnan(mean):
        return "n/a"
    return f"{mean:.4f}" if spread is None else f"{mean:.4f} ± {spread:.4f}"
