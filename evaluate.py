"""Measure a detector and draw what it found, or let it judge new images, or export it:

    python evaluate.py runs/bottle
    python evaluate.py runs/bottle --images new/
    python evaluate.py runs/bottle --export model.pt2
"""
import argparse
import csv
import ctypes
import io
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage, stats
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from clflow import CLFlow, image_score
from synth import InputError, list_images, read_image

COLOURS = ("#2060c0", "#d03020", "#208040", "#9040a0", "#c08000", "#008090", "#805030", "#606060")  # of lines in charts


def usable(files: list[Path], skip_bad: bool) -> list[Path]:
    """`files`, less the unreadable ones if `skip_bad`, which are named and counted; otherwise the first stops the
    program, when its turn comes."""
    good = []
    for path in files if skip_bad else []:
        try:
            read_image(path)
            good.append(path)
        except InputError as error:
            print(f"skipped {error}")
    if skip_bad and len(good) < len(files):
        print(f"skipped {len(files) - len(good)} of {len(files)} images, which cannot be read")
    return good if skip_bad else files


def by_stem(files: list[Path]) -> dict[str, Path]:
    """Files by stem, less a `_mask` at its end. Raises InputError if two have the same."""
    found: dict[str, Path] = {}
    for path in files:
        twin = found.setdefault(path.stem.removesuffix("_mask"), path)
        if twin != path:
            raise InputError(f"{path}: has the stem of {twin.name}, and masks are matched by stem; rename one of them")
    return found


def labelled_images(data: Path, skip_bad: bool = False) -> list[tuple[Path, bool, Path | None]]:
    """(image, anomalous, mask) of each test image in MVTec AD or BTAD layout; masks are matched by stem, with or
    without `_mask`, and None for good images and where there is none. Raises InputError if there are no images."""
    found = []
    for folder in sorted(p for p in data.glob("test/*") if p.is_dir()):
        files, anomalous = usable(list_images(folder), skip_bad), folder.name not in ("good", "ok")
        masks = by_stem(list_images(data / "ground_truth" / folder.name)) if anomalous else {}
        if masks:
            by_stem(files)  # no two images may claim one mask
        found += [(p, anomalous, masks.get(p.stem)) for p in files]
    if not found:
        raise InputError(f"--data {data}: no test images in test/good or test/<defect>; --images judges unlabelled ones")
    return found


def read_mask(path: Path | None, shape: tuple[int, int]) -> np.ndarray:
    """True mask, bool of `shape` (H, W): resized by nearest neighbour, then > 0.5; all False for None."""
    mask = np.zeros(shape, dtype=np.float32) if path is None else read_image(path)[..., 0]
    return np.asarray(Image.fromarray(mask).resize(shape[::-1], Image.Resampling.NEAREST)) > 0.5


def aupro(maps: np.ndarray, masks: np.ndarray, limit: float = 0.3) -> float:
    """Area under the per-region overlap curve up to a false-positive rate of `limit`, divided by `limit`; exact.

    maps: (N, H, W) scores; masks: (N, H, W) bool. Regions are 8-connected components (MVTec AD, IJCV 2021). With each
    defect pixel weighted by 1 / (area of its region x number of regions), the mean overlap is a cumulative sum.
    """
    weights, regions = np.zeros(maps.shape, dtype=np.float32), 0
    for weight, mask in zip(weights, masks, strict=True):
        labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
        weight[mask] = 1 / np.bincount(labels.ravel())[labels[mask]]
        regions += count
    normal = maps[~masks]
    # Past the limit nothing counts: keep the pixels at least as high as the normal one that reaches it.
    rank = max(0, normal.size - int(np.ceil(limit * normal.size)) - 1)
    keep = maps >= np.partition(normal, rank)[rank]
    order = np.argsort(-maps[keep])
    last_of_tie = np.append(np.diff(maps[keep][order]) != 0, True)
    fpr = np.append(0, np.cumsum(~masks[keep][order])[last_of_tie] / normal.size)
    overlap = np.append(0, np.cumsum(weights[keep][order], dtype=np.float64)[last_of_tie] / regions)
    end = np.searchsorted(fpr, limit)  # the first point at or past the limit; what comes after it does not count
    at_limit = np.interp(limit, fpr[:end + 1], overlap[:end + 1])
    fpr, overlap = np.append(fpr[:end], limit), np.append(overlap[:end], at_limit)
    return float(np.trapezoid(overlap, fpr) / limit)


def image_metrics(labels: np.ndarray, scores: np.ndarray) -> dict[str, float | None]:
    """Image AUROC, average precision, F1-max (an oracle, its threshold chosen on these labels); None if one class."""
    if labels.all() or not labels.any():
        return dict.fromkeys(("image_auroc", "image_ap", "image_f1max"))
    precision, recall, _ = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return {"image_auroc": float(roc_auc_score(labels, scores)),
            "image_ap": float(average_precision_score(labels, scores)), "image_f1max": float(f1.max())}


def threshold_metrics(labels: np.ndarray, scores: np.ndarray, limit: float) -> dict[str, float | None]:
    """What the threshold does on labelled images: recall, precision, and the false-alarm rate found on good ones."""
    flagged = scores > limit
    shares = {"recall": flagged[labels], "precision": labels[flagged], "false_alarms": flagged[~labels]}
    return {"threshold": limit, **{name: float(x.mean()) if x.size else None for name, x in shares.items()}}


def pixel_metrics(masks: np.ndarray, maps: np.ndarray) -> dict[str, float | None]:
    """Pixel AUROC and average precision over all pixels, AUPRO to 0.3; (N, H, W) bool and float32."""
    if masks.all() or not masks.any():
        return dict.fromkeys(("pixel_auroc", "pixel_ap", "aupro"))
    return {"pixel_auroc": float(roc_auc_score(masks.ravel(), maps.ravel())),
            "pixel_ap": float(average_precision_score(masks.ravel(), maps.ravel())), "aupro": aupro(maps, masks)}


def batches(files: list[Path], size: int, batch: int = 8) -> Iterator[torch.Tensor]:
    """Images of `files` in their order, as (<= batch, 3, size, size) tensors."""
    for start in range(0, len(files), batch):
        images = np.stack([read_image(path, size) for path in files[start:start + batch]])
        yield torch.from_numpy(images).permute(0, 3, 1, 2)


def time_per_image(model: CLFlow, batch: int = 8) -> float:
    """Milliseconds per image of backbone and flow, without decoding: the median of five batches."""
    images, seconds = torch.rand(batch, 3, model.size, model.size, device=model.levels.device), []
    for _ in range(6):
        start = time.perf_counter()
        model.score(images).cpu()  # .cpu() waits for the device
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds[1:]) / batch  # the first one warms up


def threshold(normal: torch.Tensor, rate: float) -> float:
    """The value that a share `rate` of normal images exceeds, from those (n,) of held-out ones, all below 1.

    The k-th highest, k = rate (n + 1) rounded down (conformal prediction). A rate finer than 1 / (n + 1) has none: then
    Student's bound for one more draw, mean + t s sqrt(1 + 1/n), on -log(1 - value), an energy; at least the highest."""
    values, k = normal.cpu().double().clamp(max=1 - 1e-6).sort(descending=True).values, int(rate * (len(normal) + 1))
    if k > 0 or len(values) == 1:
        return values[max(k, 1) - 1].item()
    bound = stats.t.ppf(1 - rate, len(values) - 1) * np.sqrt(1 + 1 / len(values))
    energies = -torch.log1p(-values)
    return max(values[0].item(), -np.expm1(-(energies.mean() + bound * energies.std()).item()))


def thresholds(model: CLFlow, rate: float) -> tuple[float, float]:
    """Of the image score and of the map, for a false-alarm rate; says so if the held-out images do not support it."""
    if rate * (len(model.normal_scores) + 1) < 1:
        print(f"--false-alarm {rate} is finer than 1 in {len(model.normal_scores) + 1}, which is all that the held-out "
              "good images support: the threshold is extrapolated by Student's distribution")
    return threshold(model.normal_scores, rate), threshold(model.normal_peaks, rate)


def find_defect(heat: np.ndarray, limit: float) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """Where a map (H, W) is over `limit`, or is highest if it nowhere is, (H, W) bool; and the half-open box
    (x0, y0, x1, y1) of the region with the highest peak."""
    found = heat >= min(limit, np.quantile(heat, 0.999))
    regions, _ = ndimage.label(found)
    rows, columns = np.nonzero(regions == regions.flat[heat.argmax()])
    return found, (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)


def draw_result(image: np.ndarray, heat: np.ndarray, limit: float, title: str, found: np.ndarray | None = None,
                mask: np.ndarray | None = None) -> Image.Image:
    """One row: image (H, W, 3), outlined where `found`; heat map (H, W); true mask, if known; colour bar. The scale is
    the model's, so that good images stay dark: black is typically normal, red at `limit`, yellow certain."""
    (height, width), gap = heat.shape, 6
    line, thick = max(16, width // 16), max(1, round(min(heat.shape) / 200))
    edge = ndimage.binary_dilation(found, iterations=thick) & ~found if found is not None else np.zeros_like(heat, bool)
    stops = np.array([(0, 0, 0), (0.32, 0.07, 0.43), (0.73, 0.21, 0.33), (0.98, 0.55, 0.04), (0.99, 1.0, 0.64)])

    def colour(x: np.ndarray) -> np.ndarray:
        return np.stack([np.interp(x, (0, limit / 2, limit, (1 + limit) / 2, 1), c) for c in stops.T], axis=-1)

    panels = {"input": np.where(edge[..., None], (1, 0.1, 0.1), image),
              "anomaly map": np.where(edge[..., None], 1, colour(heat))}
    if mask is not None:
        panels["true mask"] = np.repeat(mask[..., None], 3, axis=-1)
    left = len(panels) * (width + gap)
    sheet = Image.new("RGB", (left + 5 * line, height + 2 * line), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(0.65 * line)
    draw.text((3, 0.1 * line), title, "black", font)
    panels[""] = colour(np.linspace(1, 0, height)[:, None].repeat(line, axis=1))
    for i, (name, panel) in enumerate(panels.items()):
        sheet.paste(Image.fromarray((panel * 255).astype(np.uint8)), (i * (width + gap), line))
        draw.text((i * (width + gap) + 3, height + 1.1 * line), name, "black", font)
    for value, name in ((1, "1"), (limit, f"{limit:.2f} limit"), (0, "0")):
        draw.text((left + 1.2 * line, line + (1 - value) * (height - line)), name, "black", font)
    return sheet


def draw_chart(title: str, lines: dict[str, list[tuple[float, float]]], mark: float | None = None) -> Image.Image:
    """Lines through (x, y) points, with a legend, and a vertical line at x = `mark`."""
    points = np.array([point for line in lines.values() for point in line])
    low, high = points.min(axis=0), points.max(axis=0)
    high = np.where(high > low, high, low + 1)
    corner, extent = np.array([90, 360]), np.array([600, -310])  # of the plot, in pixels
    sheet = Image.new("RGB", (960, 420), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    draw.text((90, 10), title, "black", ImageFont.load_default(20))
    for share in np.linspace(0, 1, 6):
        (x, y), (x_label, y_label) = corner + share * extent, low + share * (high - low)
        draw.line((90, y, 690, y), "#dddddd")
        draw.text((80, y), f"{y_label:.3g}", "black", font, anchor="rm")
        draw.text((x, 370), f"{x_label:.3g}", "black", font, anchor="mt")
    for i, (name, line) in enumerate(lines.items()):
        place = corner + (np.array(line) - low) / (high - low) * extent
        draw.line([tuple(point) for point in place], COLOURS[i % len(COLOURS)], 3)
        draw.text((705, 50 + 20 * i), name, COLOURS[i % len(COLOURS)], font)
    if mark is not None:
        x = 90 + 600 * np.clip((mark - low[0]) / (high[0] - low[0]), 0, 1)
        draw.line((x, 50, x, 360), "black", 2)
        draw.text((x, 35), "threshold", "black", font, anchor="mt")
    return sheet


def draw_histogram(labels: np.ndarray, scores: np.ndarray, limit: float) -> Image.Image:
    """Number of images per score, good and defective, with the threshold."""
    edges, lines = np.histogram_bin_edges(np.append(scores, limit), bins=40), {}
    for name, chosen in (("good", ~labels), ("defective", labels)):
        counts = np.histogram(scores[chosen], edges)[0]
        lines[f"{name} ({chosen.sum()})"] = [(edges[0], 0), *zip(edges.repeat(2)[1:-1], counts.repeat(2), strict=True)]
    return draw_chart("test images by score", lines, limit)


def stack(pictures: list[Image.Image], width: int = 960) -> Image.Image:
    """Pictures of any size below each other, each scaled to `width`."""
    pictures = [p.resize((width, round(p.height * width / p.width)), Image.Resampling.LANCZOS) for p in pictures]
    sheet = Image.new("RGB", (width, sum(p.height for p in pictures)), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (0, sum(p.height for p in pictures[:i])))
    return sheet


def save_picture(picture: Image.Image, path: Path) -> None:
    write_atomically(path, lambda file: picture.save(file, "PNG"))


def judge(path: Path, name: str, score: float, heat: np.ndarray, limits: tuple[float, float],
          mask: np.ndarray | None = None) -> tuple[Image.Image, tuple[int, int, int, int] | None]:
    """The row for image `path` with map `heat`, at the image's own shape, and the defect's box, if there is one."""
    image, anomalous = read_image(path), bool(score > limits[0])
    heat = np.asarray(Image.fromarray(heat).resize(image.shape[1::-1], Image.Resampling.BILINEAR))
    found, box = find_defect(heat, limits[1]) if anomalous else (None, None)
    title = f"{name}: {'anomalous' if anomalous else 'normal'}, score {score:.3f} (threshold {limits[0]:.3f})"
    mask = mask if mask is None else np.asarray(Image.fromarray(mask).resize(image.shape[1::-1]))
    return draw_result(image, heat, limits[1], title, found, mask), box


def predict(model: CLFlow, images: Path, out: Path, rate: float, skip_bad: bool) -> None:
    """Judge an image, or those of a folder: a line each, scores.csv (box in the image's pixels, half-open) and a
    picture each, <file name>.png, in `out`."""
    files, limits = usable(list_images(images) if images.is_dir() else [images], skip_bad), thresholds(model, rate)
    if not files:
        raise InputError(f"--images {images}: no images there (subfolders are not searched)")
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("file", "score", "anomalous", "x0", "y0", "x1", "y1"))
    for start in range(0, len(files), 8):
        some = files[start:start + 8]
        maps = model.anomaly_map(next(batches(some, model.size))).cpu()
        for path, score, heat in zip(some, image_score(maps).tolist(), maps.numpy(), strict=True):
            picture, box = judge(path, path.name, score, heat, limits)
            save_picture(picture, out / f"{path.name}.png")
            writer.writerow((path.name, f"{score:.6f}", int(box is not None), *(box or [""] * 4)))
            print(f"{path.name}: {'anomalous' if box else 'normal'}, score {score:.3f}" + (f", box {box}" if box else ""))
    write_atomically(out / "scores.csv", lambda file: file.write_text(table.getvalue(), encoding="utf-8"))
    print(f"wrote {out / 'scores.csv'} and {len(files)} pictures into {out}; threshold {limits[0]:.3f}")


class Exported(torch.nn.Module):
    """What --export writes: images (B, 3, size, size) in [0, 1] -> maps (B, size, size) and scores (B,)."""

    def __init__(self, model: CLFlow):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        maps = self.model.anomaly_map(images)
        return maps, image_score(maps)


def export(model: CLFlow, file: Path) -> None:
    """Write the detector as a torch.export program for a batch of any size; torch.export.load reads it."""
    images = torch.zeros(2, 3, model.size, model.size, device=model.levels.device)
    with torch.no_grad():
        program = torch.export.export(Exported(model), (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    write_atomically(file, lambda temporary: torch.export.save(program, temporary))
    print(f"wrote {file}: images (batch, 3, {model.size}, {model.size}) in [0, 1] -> maps and scores")


def measure(model: CLFlow, data: Path, skip_bad: bool = False) -> tuple[dict, list[tuple], np.ndarray, np.ndarray]:
    """Image and pixel metrics on the test images of `data`; and these, their maps (N, size, size) and masks."""
    tests = labelled_images(data, skip_bad)
    maps = torch.cat([model.anomaly_map(x).cpu() for x in batches([path for path, _, _ in tests], model.size)])
    masks = np.stack([read_mask(mask, maps.shape[1:]) for _, _, mask in tests])
    if unmasked := [test[0] for test, mask in zip(tests, masks, strict=True) if test[1] and not mask.any()]:
        print(f"pixel metrics are n/a: no mask, or an empty one, for {len(unmasked)} images, such as {unmasked[0]}")
    labels = np.array([anomalous for _, anomalous, _ in tests])
    pixel = pixel_metrics(masks & (not unmasked), maps.numpy())
    return {**image_metrics(labels, image_score(maps).numpy()), **pixel}, tests, maps.numpy(), masks


def report(model: CLFlow, data: Path, out: Path, rate: float = 0.02, skip_bad: bool = False) -> dict:
    """Measure `model` on the test images of `data`; print the table, write metrics.json, sheet.png (the worst misses
    first), histogram.png and pictures/ into `out`. Returns the metrics."""
    trained, limits = model.settings, thresholds(model, rate)
    measured, tests, maps, masks = measure(model, data, skip_bad)
    scores, labels = image_score(torch.from_numpy(maps)).numpy(), np.array([anomalous for _, anomalous, _ in tests])
    metrics = {"category": trained["category"] if data.resolve() == Path(trained["data"]) else data.resolve().name,
               **{key: trained[key] for key in ("backbone", "size", "seed", "epochs")}, **measured,
               "ms_per_image": time_per_image(model),
               "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
               "false_alarm": rate, **threshold_metrics(labels, scores, limits[0])}
    for name, value in metrics.items():
        print(f"{name:14}", "n/a" if value is None else f"{value:.4f}" if isinstance(value, float) else value)
    write_atomically(out / "metrics.json", lambda file: file.write_text(json.dumps(metrics, indent=2) + "\n"))
    wrong = np.where(labels, limits[0] - scores, scores - limits[0])  # how far on the wrong side of the threshold
    rows = {}
    for i in np.argsort(-wrong, kind="stable"):  # missed defects and false alarms first, then the closest calls
        path, anomalous, truth = tests[i]
        name = f"{path.parent.name}/{path.name}"
        mask = None if anomalous and truth is None else masks[i]
        rows[i], _ = judge(path, f"{'MISSED ' if labels[i] else 'FALSE ALARM '}{name}" if wrong[i] > 0 else name, scores[i], maps[i], limits, mask)
        save_picture(rows[i], out / "pictures" / f"{path.parent.name}_{path.name}.png")
        if len(rows) > 12:
            del rows[i]
    save_picture(stack(list(rows.values())), out / "sheet.png")
    save_picture(draw_histogram(labels, scores, limits[0]), out / "histogram.png")
    print(f"wrote metrics.json, sheet.png (worst first), histogram.png and {len(tests)} pictures into {out}")
    return metrics


def curve(run: Path, device: str) -> None:
    """Measure every epoch_NN.pt below `run` on its category's test images; curve.json, and curve.png, a chart each for
    image AUROC, pixel AUROC and AUPRO with a line per run."""
    lines: dict[str, dict[str, list]] = {name: {} for name in ("image_auroc", "pixel_auroc", "aupro")}
    files = sorted(run.glob("**/epoch_*.pt"))
    if not files:
        raise InputError(f"{run}: no epoch_NN.pt in it; train with --keep-epochs")
    for file in files:
        model, epoch = CLFlow.load(file, device), int(file.stem.removeprefix("epoch_"))
        metrics = measure(model, Path(model.settings["data"]))[0]
        print(file, {name: metrics[name] and round(metrics[name], 4) for name in lines}, flush=True)
        for name, value in metrics.items():
            if name in lines and value is not None:
                label = f"{model.settings['category']} seed {model.settings['seed']}"
                lines[name].setdefault(label, []).append((epoch, value))
    write_atomically(run / "curve.json", lambda path: path.write_text(json.dumps(lines) + "\n"))
    save_picture(stack([draw_chart(f"{name} by epoch", line) for name, line in lines.items() if line]), run / "curve.png")
    print(f"wrote {run / 'curve.json'} and {run / 'curve.png'}")


def summarize(rows: list[dict], out: Path) -> None:
    """results.json, the metrics of every run, and table.md, mean ± standard deviation over the seeds by category."""
    names = ("image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "aupro", "recall", "false_alarms")
    table = "| category | seeds | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 2) + "|\n"
    means = []
    for category in dict.fromkeys(row["category"] for row in rows):
        chosen = [row for row in rows if row["category"] == category]
        values = np.array([[row[name] for name in names] for row in chosen], dtype=float)  # None becomes nan
        means.append(values.mean(axis=0))
        spread = values.std(axis=0, ddof=1) if len(chosen) > 1 else np.zeros(len(names))
        cells = [f"{m:.4f}" + f" ± {s:.4f}" * (len(chosen) > 1) for m, s in zip(means[-1], spread, strict=True)]
        table += f"| {category} | {len(chosen)} | " + " | ".join(cells).replace("nan ± nan", "n/a") + " |\n"
    table += "| mean | | " + " | ".join(f"{m:.4f}" for m in np.mean(means, axis=0)) + " |\n"
    table = table.replace("nan", "n/a")
    write_atomically(out / "results.json", lambda file: file.write_text(json.dumps(rows, indent=2) + "\n"))
    write_atomically(out / "table.md", lambda file: file.write_text(table, encoding="utf-8"))
    print(table + f"wrote {out / 'results.json'} and {out / 'table.md'}")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary file)`, then rename it to `path`: what was there gives way only to a complete successor."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({error!r:.200})") from error


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise InputError(message)  # one line, without the usage block


def pick_device(name: str) -> str:
    """`name`, or for "auto" CUDA where there is one. Raises InputError if the device is not there."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: not available here ({error!r:.200})") from error
    return name


def run(main: Callable[[], None]) -> None:
    """Call `main`; bad input becomes one line on stderr and exit code 2."""
    if sys.platform == "linux":
        # glibc would return big blocks to the system after each use; getting them anew costs up to a third of a step
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)  # as shells report an interrupt
    except (InputError, OSError) as error:  # one from a loader's worker comes with its traceback before it
        print("error:", str(error).strip().splitlines()[-1].removeprefix("synth.InputError: "), file=sys.stderr)
        sys.exit(2)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder with model.pt in it, or a checkpoint")
    parser.add_argument("--data", type=Path, help="category with test/; if not given, the one it was trained on")
    parser.add_argument("--images", type=Path, help="judge this image, or those in this folder, instead")
    parser.add_argument("--out", type=Path, default=Path("predictions"), help="folder for what --images finds")
    parser.add_argument("--false-alarm", type=float, default=0.02, help="share of good images to be flagged (0.02)")
    parser.add_argument("--export", type=Path, metavar="FILE", help="write a torch.export program instead")
    parser.add_argument("--curve", action="store_true", help="measure every epoch kept by train.py --keep-epochs instead")
    parser.add_argument("--skip-bad", action="store_true", help="go on without images that cannot be read")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    args = parser.parse_args()
    if not 0 < args.false_alarm < 1:
        raise InputError(f"--false-alarm {args.false_alarm}: out of range, give a share between 0 and 1")
    device = pick_device(args.device)
    if args.curve:
        return curve(args.run, device)
    checkpoint = args.run / "model.pt" if args.run.is_dir() else args.run
    model = CLFlow.load(checkpoint, device)
    if args.export:
        export(model, args.export)
    elif args.images:
        predict(model, args.images, args.out, args.false_alarm, args.skip_bad)
    else:
        report(model, args.data or Path(model.settings["data"]), checkpoint.parent, args.false_alarm, args.skip_bad)


if __name__ == "__main__":
    run(main)
