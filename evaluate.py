"""Measure a detector: python evaluate.py runs/bottle; let it judge: ... --images new/; export: ... --export FILE"""
import argparse
import csv
import ctypes
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from scipy import ndimage, stats
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from clflow import Detector
from synth import InputError, list_images, read_image


def usable(files: list[Path], skip_bad: bool) -> list[Path]:
    """`files`; with `skip_bad` less the unreadable ones, named and counted; otherwise the first stops the program."""
    good = list(files)
    for path in files if skip_bad else []:
        try:
            read_image(path)
        except InputError as error:
            good.remove(path)
            print(f"skipped {len(files) - len(good)} of {len(files)} images: {error}")
    return good


def by_stem(files: list[Path]) -> dict[str, Path]:
    """Files by stem, less a `_mask` at its end. Raises InputError if two have the same."""
    found: dict[str, Path] = {}
    for path in files:
        if (twin := found.setdefault(path.stem.removesuffix("_mask"), path)) != path:
            raise InputError(f"{path}: has the stem of {twin.name}, and masks are matched by stem; rename one of them")
    return found


def labelled_images(data: Path, skip_bad: bool = False) -> list[tuple[Path, bool, Path | None]]:
    """(image, anomalous, mask) of each test image in MVTec AD or BTAD layout; masks are matched by stem, with or
    without `_mask`, and None for good images and where there is none. Raises InputError if there are no images."""
    found = []
    for folder in sorted(p for p in data.glob("test/*") if p.is_dir()):
        files, anomalous = usable(list_images(folder), skip_bad), folder.name not in ("good", "ok")
        masks = by_stem(list_images(data / "ground_truth" / folder.name)) if anomalous else {}
        by_stem(files if masks else [])  # no two images may claim one mask
        found += [(p, anomalous, masks.get(p.stem)) for p in files]
    if not found:
        raise InputError(f"--data {data}: no images in test/good or test/<defect>; try --images FILE_OR_FOLDER")
    return found


def read_mask(path: Path | None, shape: tuple[int, int]) -> np.ndarray:
    """True mask, bool of `shape` (H, W): resized by nearest neighbour, then > 0.5; all False for None."""
    mask = Image.fromarray(np.zeros(shape, dtype=np.float32) if path is None else read_image(path)[..., 0])
    small = np.asarray(mask.resize(shape[::-1], Image.Resampling.NEAREST)) > 0.5
    return small if small.any() else np.asarray(mask.resize(shape[::-1], Image.Resampling.BOX)) > 0  # thin ones stay


def pixel_metrics(maps: np.ndarray, masks: np.ndarray, limit: float = 0.3) -> dict[str, float]:
    """Pixel AUROC and average precision, and AUPRO to a false-positive rate of `limit`, all exact.

    maps: (N, H, W) scores; masks: (N, H, W) bool. A defect pixel adds its weight to the curve from that false-positive
    rate on, at which the falling threshold finds it. For AUROC all weigh alike; for AUPRO 1 / (area of the region), so
    that regions do; they are 8-connected (MVTec AD, IJCV 2021)."""
    weights = []
    for mask in masks:
        labels, _ = ndimage.label(mask, structure=np.ones((3, 3)))
        weights.append(1 / np.bincount(labels.ravel())[labels[mask]])
    normal, values = np.sort(maps[~masks]), maps[masks]
    start, end = (1 - np.searchsorted(normal, values, side) / normal.size for side in ("right", "left"))  # differ: ties
    found = values.size - np.searchsorted(np.sort(values), values)
    # The area up to `limit` under a line that rises from 0 at `start` to 1 at `end` and stays there.
    rising = np.maximum(limit - start, 0) ** 2 / np.maximum(2 * (end - start), 1e-12)
    areas = np.where(end <= limit, limit - (start + end) / 2, rising)
    return {"pixel_auroc": 1 - np.mean(start + end) / 2, "pixel_ap": np.mean(found / (found + end * normal.size)),
            "aupro": np.average(areas, weights=np.concatenate(weights)) / limit}


def all_metrics(labels: np.ndarray, scores: np.ndarray, masks: np.ndarray, maps: np.ndarray) -> dict[str, float | None]:
    """Image metrics, with F1-max (an oracle: its threshold is chosen on these labels), and pixel metrics; None where
    there is one class only, or if a defective image has no mask, or an empty one."""
    found = dict.fromkeys(("image_auroc", "image_ap", "image_f1max", "pixel_auroc", "pixel_ap", "aupro"))
    if labels.any() and not labels.all():
        precision, recall, _ = precision_recall_curve(labels, scores)
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        found.update(image_auroc=roc_auc_score(labels, scores), image_ap=average_precision_score(labels, scores),
                     image_f1max=f1.max())
    if unmasked := int((labels & ~masks.any(axis=(1, 2))).sum()):
        print(f"pixel metrics are n/a: {unmasked} defective images have no mask, or an empty one")
    elif masks.any() and not masks.all():
        found.update(pixel_metrics(maps, masks))
    return {name: None if value is None else float(value) for name, value in found.items()}


def batches(files: list[Path], size: int, batch: int = 8) -> Iterator[torch.Tensor]:
    """Images of `files` in their order, as (<= batch, 3, size, size) tensors."""
    for start in range(0, len(files), batch):
        images = np.stack([read_image(path, size) for path in files[start:start + batch]])
        yield torch.from_numpy(images).permute(0, 3, 1, 2)


def thresholds(normal: torch.Tensor, rate: float) -> list[float]:
    """Per row of `normal` (K, n), values of n held-out normal images and below 1, what a share `rate` of such exceeds:
    the k-th highest, k = rate (n + 1) rounded down (conformal prediction). If that is none, Student's bound for one
    more draw, mean + t s sqrt(1 + 1/n), on -log(1 - value), an energy; but at least the highest."""
    values, n = normal.cpu().double().sort(dim=1, descending=True).values, normal.shape[1]
    if (k := int(rate * (n + 1))) > 0 or n == 1:
        return values[:, max(k, 1) - 1].tolist()
    print(f"--false-alarm {rate} is finer than {n} held-out good images support: extrapolated (Student's t)")
    energies, t = -torch.log1p(-values.clamp(max=0.999)), stats.t.ppf(1 - rate, n - 1)
    bound = energies.mean(dim=1) + t * np.sqrt(1 + 1 / n) * energies.std(dim=1)
    return torch.maximum(values[:, 0], -torch.expm1(-bound.clamp(max=7))).tolist()  # below 1: something must be flagged


def find_defect(heat: np.ndarray, limit: float) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """Where a map (H, W) is over `limit`, or is highest; and half-open box (x0, y0, x1, y1) of the highest region."""
    found = heat >= (limit if heat.max() >= limit else np.quantile(heat, 0.999))
    regions, _ = ndimage.label(found)
    rows, columns = np.nonzero(regions == regions.flat[heat.argmax()])
    return found, (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)


def colours(heat: np.ndarray, limit: float) -> np.ndarray:
    """(H, W) -> (H, W, 3) uint8: black is normal, red at `limit`, yellow certain, on the same scale in all images."""
    stops = np.array([(0, 0, 0), (82, 18, 110), (186, 54, 84), (250, 140, 10), (252, 255, 164)])
    return np.stack([np.interp(heat, (0, limit / 2, limit, (1 + limit) / 2, 1), channel).astype(np.uint8)
                     for channel in stops.T], axis=-1)


def judge(path: Path, name: str, score: float, heat: np.ndarray, limits: list[float],
          mask: np.ndarray | None = None) -> tuple[Image.Image, tuple[int, int, int, int] | None]:
    """The picture of image `path` with map `heat`, at the image's own shape: image, outlined where a defect is found;
    map; true mask, if known; colour bar. And the defect's box, if there is one."""
    image, anomalous = read_image(path), score > limits[0]
    height, width = image.shape[:2]
    heat = np.asarray(Image.fromarray(heat).resize((width, height), Image.Resampling.BILINEAR))
    found, box = find_defect(heat, limits[1]) if anomalous else (np.zeros_like(heat, dtype=bool), None)
    line, edge = max(16, width // 16), ndimage.binary_dilation(found, iterations=-(-height // 200)) & ~found
    panels = {"input": np.where(edge[..., None], (255, 25, 25), image * 255).astype(np.uint8),
              "anomaly map": np.where(edge[..., None], np.uint8(255), colours(heat, limits[1]))}
    if mask is not None:
        panels["true mask"] = np.asarray(Image.fromarray(mask).resize((width, height)).convert("RGB"))
    panels[""] = colours(np.linspace(1, 0, height)[:, None].repeat(line, axis=1), limits[1])
    row = np.hstack([np.pad(panel, ((0, 0), (0, 6), (0, 0)), constant_values=255) for panel in panels.values()])
    sheet = ImageOps.expand(Image.fromarray(row), (0, line, 4 * line, line), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(0.65 * line)
    title = f"{name}: {'anomalous' if anomalous else 'normal'}, score {score:.3f} (threshold {limits[0]:.3f})"
    draw.text((3, 0.1 * line), title, "black", font)
    for i, label in enumerate(panels):
        draw.text((i * (width + 6) + 3, height + 1.1 * line), label, "black", font)
    for value, label in ((1, "1"), (limits[1], f"{limits[1]:.2f} limit"), (0, "0")):
        draw.text((row.shape[1] - 6 + 0.2 * line, line + (1 - value) * (height - line)), label, "black", font)
    return sheet, box


def draw_chart(title: str, lines: dict[str, list[tuple[float, float]]]) -> Image.Image:
    """Lines through (x, y) points, with a legend."""
    points = np.concatenate([*lines.values()])
    low, high = points.min(axis=0), points.max(axis=0)
    scale = np.array([600, -310]) / np.where(high > low, high - low, 1)  # pixels per unit
    sheet = Image.new("RGB", (960, 420), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    draw.text((90, 10), title, "black", ImageFont.load_default(20))
    for x, y in np.linspace(low, high, 6):
        x = round(x) if high[0] - low[0] >= 2 else x  # whole epochs
        left, top = (90, 360) + ((x, y) - low) * scale
        draw.line((90, top, 690, top), "#dddddd")
        draw.text((80, top), f"{y:.3g}", "black", font, anchor="rm")
        draw.text((left, 370), f"{x:.3g}", "black", font, anchor="mt")
    for i, (name, line) in enumerate(lines.items()):
        colour = f"hsl({(220 + 140 * i) % 360}, 75%, 42%)"
        draw.line([tuple(point) for point in (90, 360) + (line - low) * scale], colour, 3)
        draw.text((705, 50 + 20 * i), name, colour, font)
    return sheet


def save_pictures(path: Path, *pictures: Image.Image) -> None:
    """One picture as it is, or several below each other, each scaled to a width of 960 pixels, as PNG."""
    if len(pictures) > 1:
        pictures = [Image.fromarray(np.vstack([p.resize((960, round(p.height * 960 / p.width))) for p in pictures]))]
    write_atomically(path, lambda file: pictures[0].save(file, "PNG"))


def predict(model: Detector, images: Path, out: Path, rate: float, skip_bad: bool) -> None:
    """Judge an image, or those of a folder; scores.csv (box in the image's pixels) and <file name>.png in `out`."""
    files = usable(list_images(images) if images.is_dir() else [images], skip_bad)
    limits = thresholds(model.normal, rate)
    if not files:
        raise InputError(f"--images {images}: no images there (subfolders are not searched)")
    writer = csv.writer(table := io.StringIO(), lineterminator="\n")
    writer.writerow(("file", "score", "anomalous", "x0", "y0", "x1", "y1"))
    found = (r for x in batches(files, model.size) for r in zip(*(y.cpu().numpy() for y in model(x)), strict=True))
    for path, (heat, score) in zip(files, found, strict=True):
        picture, box = judge(path, path.name, score, heat, limits)
        save_pictures(out / f"{path.name}.png", picture)
        writer.writerow((path.name, f"{score:.6f}", int(score > limits[0]), *(box or [""] * 4)))
        print(f"{path.name}: {f'anomalous, box {box}' if box else 'normal'}, score {score:.3f}", flush=True)
    write_atomically(out / "scores.csv", lambda file: file.write_text(table.getvalue(), "utf-8", "surrogateescape"))
    print(f"wrote {out / 'scores.csv'} and {len(files)} pictures into {out}; threshold {limits[0]:.3f}")


def export(model: Detector, file: Path) -> None:
    """Write the detector as a torch.export program for a batch of any size; torch.export.load reads it."""
    images = torch.zeros(2, 3, model.size, model.size, device=model.levels.device)
    with torch.no_grad():
        program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, buffer := io.BytesIO())  # a path would have to end in .pt2
    write_atomically(file, lambda temporary: temporary.write_bytes(buffer.getvalue()))
    print(f"wrote {file}: images (batch, 3, {model.size}, {model.size}) in [0, 1] -> maps and scores")


def judge_tests(model: Detector, data: Path, skip_bad: bool = False) -> tuple:
    """`labelled_images` of `data`, labels and scores (N,), masks and maps (N, size, size), median ms per image."""
    (rank, world), tests, times = processes(), labelled_images(data, skip_bad), []
    maps, scores = torch.zeros(len(tests), model.size, model.size), torch.zeros(len(tests))
    mine = torch.arange(len(tests))[rank::world]
    for images, rows in zip(batches([tests[i][0] for i in mine], model.size), mine.split(8), strict=False):
        start = time.perf_counter()
        maps[rows], scores[rows] = (x.cpu() for x in model(images))
        times.append(1000 * (time.perf_counter() - start) / len(images))
    for part in (maps, scores) if world > 1 else ():
        dist.all_reduce(part)  # each process has filled rows of its own: their sum is the whole
    masks = np.stack([read_mask(mask, maps.shape[1:]) for _, _, mask in tests])
    return tests, np.array([bad for _, bad, _ in tests]), scores.numpy(), masks, maps.numpy(), float(np.median(times))


def report(model: Detector, data: Path, out: Path, rate: float = 0.02, skip_bad: bool = False) -> None:
    """Measure `model` on the test images of `data`; metrics.json, sheet.png, histogram.png, pictures/ in `out`."""
    tests, labels, scores, masks, maps, milliseconds = judge_tests(model, data, skip_bad)
    if processes()[0]:
        return  # its part is done
    limits = thresholds(model.normal, rate)
    flagged = scores > limits[0]
    shares = {"recall": flagged[labels], "precision": labels[flagged], "false_alarms": flagged[~labels]}
    metrics = {"category": data.resolve().name,
               **{name: model.settings[name] for name in ("method", "backbone", "size", "seed", "epochs")},
               **all_metrics(labels, scores, masks, maps), "ms_per_image": milliseconds,
               "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
               "false_alarm": rate, "threshold": limits[0],
               **{name: float(share.mean()) if share.size else None for name, share in shares.items()}}
    for name, value in metrics.items():
        print(f"{name:14}", "n/a" if value is None else f"{value:.4f}" if isinstance(value, float) else value)
    wrong, rows = np.where(labels, limits[0] - scores, scores - limits[0]), []  # how far on the wrong side
    for i in np.argsort(-wrong, kind="stable"):  # missed defects and false alarms first, then the closest calls
        path, anomalous, truth = tests[i]
        miss = "" if wrong[i] <= 0 else "MISSED " if anomalous else "FALSE ALARM "
        mask = None if anomalous and truth is None else masks[i]
        picture, _ = judge(path, f"{miss}{path.parent.name}/{path.name}", scores[i], maps[i], limits, mask)
        save_pictures(out / "pictures" / f"{path.parent.name}_{path.name}.png", picture)
        rows += [picture][:12 - len(rows)]
    save_pictures(out / "sheet.png", *rows)
    edges, lines = np.histogram_bin_edges(np.append(scores, limits[0]), bins=40), {}
    for name, chosen in (("good", ~labels), ("defective", labels)):
        steps = np.histogram(scores[chosen], edges)[0].repeat(2)
        lines[f"{name} ({chosen.sum()})"] = [(edges[0], 0), *zip(edges.repeat(2)[1:-1], steps, strict=True)]
    lines["threshold"] = [(limits[0], 0), (limits[0], max(count for line in lines.values() for _, count in line))]
    save_pictures(out / "histogram.png", draw_chart("number of test images by score", lines))
    write_atomically(out / "metrics.json", lambda file: file.write_text(json.dumps(metrics, indent=2) + "\n"))
    print(f"wrote metrics.json, sheet.png (worst first), histogram.png and {len(tests)} pictures into {out}")


def curve(run: Path, device: str, skip_bad: bool) -> None:
    """Measure every epoch_NN.pt below `run` on its category's test images; curve.json and curve.png, a line per run."""
    lines: dict[str, dict[str, list]] = {"image_auroc": {}, "pixel_auroc": {}, "aupro": {}}
    for file in sorted(run.glob("**/epoch_[0-9]*.pt"), key=lambda file: (file.parent, len(file.name), file.name)):
        model = Detector.load(file, device)
        metrics = all_metrics(*judge_tests(model, Path(model.settings["data"]), skip_bad)[1:5])
        label, epoch = "/".join(file.resolve().parent.parts[-2:]), int(file.stem[6:])
        print(f"{label}, epoch {epoch}:", {name: metrics[name] for name in lines}, flush=True)
        for name in (n for n in lines if metrics[n] is not None):
            lines[name].setdefault(label, []).append((epoch, metrics[name]))
    charts = [draw_chart(f"{name} by epoch", line) for name, line in lines.items() if line]
    if not charts:
        raise InputError(f"{run}: no epoch_NN.pt in it, or nothing to measure it on; train with --keep-epochs")
    save_pictures(run / "curve.png", *charts)
    write_atomically(run / "curve.json", lambda path: path.write_text(json.dumps(lines) + "\n"))
    print(f"wrote {run / 'curve.png'} and {run / 'curve.json'}")


def summarize(rows: list[dict], out: Path) -> None:
    """results.json, the metrics of every run, and table.md, mean ± standard deviation over the seeds by category."""
    names = ("image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "aupro", "recall", "false_alarms")
    lines, means = [["category", "seeds", *names], ["---"] * (2 + len(names))], []
    for category in dict.fromkeys(row["category"] for row in rows):
        values = np.array([[row[name] for name in names] for row in rows if row["category"] == category], dtype=float)
        means.append(values.mean(axis=0))  # None has become nan, and stays so
        spread = [f" ± {x:.4f}" for x in values.std(axis=0, ddof=1)] if len(values) > 1 else [""] * len(names)
        lines.append([category, str(len(values)), *(f"{m:.4f}{s}" for m, s in zip(means[-1], spread, strict=True))])
    lines.append(["mean", "", *(f"{m:.4f}" for m in np.mean(means, axis=0))])
    table = "".join(f"| {' | '.join('n/a' if c in ('nan', 'nan ± nan') else c for c in x)} |\n" for x in lines)
    write_atomically(out / "results.json", lambda file: file.write_text(json.dumps(rows, indent=2) + "\n"))
    write_atomically(out / "table.md", lambda file: file.write_text(table, encoding="utf-8"))
    print(table + f"wrote {out / 'results.json'} and {out / 'table.md'}")


def processes() -> tuple[int, int]:
    """Rank and number of torchrun's processes; they meet here the first time, then only the first prints and writes."""
    rank, world = (int(os.environ.get(*default)) for default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        sys.stdout = open(os.devnull, "w", errors="replace") if rank else sys.stdout
    return rank, world


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary file)`, then rename it to `path`: no failure costs what was there. Only rank 0 does."""
    if processes()[0]:
        return
    temporary = path.with_name(f"{path.name}.tmp{os.environ.get('LOCAL_RANK', '')}")
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
        return str(torch.zeros(1, device=f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name).device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: not available here ({error!r:.200})") from error


def run(main: Callable[[], None]) -> None:
    """Call `main`; bad input, also if a loader's worker finds it, becomes one line on stderr and exit code 2."""
    mallopt = getattr(ctypes.CDLL(None) if sys.platform == "linux" else None, "mallopt", lambda *_: 0)
    mallopt(-4, 0), mallopt(-1, 2**31 - 1)  # glibc keeps big blocks: to get them anew takes a fifth longer
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may be anything
    try:
        main()
    except KeyboardInterrupt:
        print("stopped; a training goes on with --resume", file=sys.stderr)
        sys.exit(130)  # as shells report it
    except (InputError, OSError, MemoryError, torch.OutOfMemoryError) as error:
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
    parser.add_argument("--curve", action="store_true", help="measure each epoch that train.py --keep-epochs kept")
    parser.add_argument("--skip-bad", action="store_true", help="go on without images that cannot be read")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    args = parser.parse_args()
    if not 0 < args.false_alarm < 1:
        raise InputError(f"--false-alarm {args.false_alarm}: out of range, give a share between 0 and 1")
    device = pick_device(args.device)
    if args.curve:
        return curve(args.run, device, args.skip_bad)
    stopped = (args.run / "state.pt").exists() and not (args.run / "model.pt").exists()
    checkpoint = args.run / ("state.pt" if stopped else "model.pt") if args.run.is_dir() else args.run
    model = Detector.load(checkpoint, device)
    if args.export:
        export(model, args.export)
    elif args.images:
        predict(model, args.images, args.out, args.false_alarm, args.skip_bad)
    else:
        report(model, args.data or Path(model.settings["data"]), checkpoint.parent, args.false_alarm, args.skip_bad)


if __name__ == "__main__":
    run(main)
