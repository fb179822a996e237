"""Measure a detector on a labelled category and draw what it found: python evaluate.py runs/bottle"""
import argparse
import ctypes
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
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from clflow import CLFlow, image_score
from synth import InputError, list_images, read_image


def labelled_images(data: Path) -> list[tuple[Path, bool, Path | None]]:
    """(image, anomalous, mask) of each test image in MVTec AD or BTAD layout; masks are matched by stem, with or
    without `_mask`, and None for good images and where there is none. Raises InputError if there are no images."""
    found = []
    for folder in sorted(p for p in data.glob("test/*") if p.is_dir()):
        anomalous = folder.name not in ("good", "ok")
        masks = {p.stem.removesuffix("_mask"): p for p in list_images(data / "ground_truth" / folder.name)}
        found += [(p, anomalous, masks.get(p.stem) if anomalous else None) for p in list_images(folder)]
    if not found:
        raise InputError(f"--data {data}: no test images; evaluation needs some in test/good and test/<defect>")
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


def draw_result(image: np.ndarray, heat: np.ndarray, limit: float, title: str, mask: np.ndarray | None) -> Image.Image:
    """One row: image (H, W, 3), outlined where heat (H, W) is over `limit`; heat map; true mask (H, W) if known. The
    scale is the model's, so that good images stay dark: black is typically normal, red at the limit, yellow certain."""
    edge = ndimage.binary_dilation(heat > limit, iterations=max(1, round(min(heat.shape) / 200))) & (heat <= limit)
    stops = np.array([(0, 0, 0), (0.32, 0.07, 0.43), (0.73, 0.21, 0.33), (0.98, 0.55, 0.04), (0.99, 1.0, 0.64)])
    colours = np.stack([np.interp(heat, (0, limit / 2, limit, (1 + limit) / 2, 1), c) for c in stops.T], axis=-1)
    panels = {"input": np.where(edge[..., None], (1, 0.1, 0.1), image),
              "anomaly map": np.where(edge[..., None], 1, colours)}
    if mask is not None:
        panels["true mask"] = np.repeat(mask[..., None], 3, axis=-1)
    (height, width), gap = heat.shape, 6
    line = max(16, width // 16)
    sheet = Image.new("RGB", (len(panels) * (width + gap) - gap, height + 2 * line), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(0.65 * line)
    draw.text((3, 0.1 * line), title, "black", font)
    for i, (name, panel) in enumerate(panels.items()):
        sheet.paste(Image.fromarray((panel * 255).astype(np.uint8)), (i * (width + gap), line))
        draw.text((i * (width + gap) + 3, height + 1.1 * line), name, "black", font)
    return sheet


def draw_pictures(model: CLFlow, tests: list[tuple], scores: np.ndarray, maps: np.ndarray, folder: Path) -> None:
    """One picture per test image, at the image's own shape, as <defect>_<stem>.png in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    # thresholds of the score and of the map, which about 2 % of normal images should pass, by those held out
    limit, peak_limit = (torch.quantile(x, 0.98).item() for x in (model.normal_scores, model.normal_peaks))
    for (path, anomalous, truth), score, heat in zip(tests, scores, maps, strict=True):
        image, file = read_image(path), folder / f"{path.parent.name}_{path.stem}.png"
        heat = np.asarray(Image.fromarray(heat).resize(image.shape[1::-1], Image.Resampling.BILINEAR))
        mask = None if anomalous and truth is None else read_mask(truth, heat.shape)
        verdict = f"{'anomalous' if score > limit else 'normal'}, score {score:.2f} (threshold {limit:.2f})"
        draw_result(image, heat, peak_limit, f"{path.parent.name}/{path.name}: {verdict}", mask).save(file)


def report(model: CLFlow, data: Path, out: Path) -> None:
    """Measure `model` on the test images of `data`; print the table, write metrics.json and pictures/ into `out`."""
    tests = labelled_images(data)
    maps = torch.cat([model.anomaly_map(x).cpu() for x in batches([path for path, _, _ in tests], model.size)])
    scores, maps = image_score(maps).numpy(), maps.numpy()
    masks = np.stack([read_mask(mask, maps.shape[1:]) for _, _, mask in tests])
    if unmasked := [test[0] for test, mask in zip(tests, masks, strict=True) if test[1] and not mask.any()]:
        print(f"pixel metrics are n/a: no mask, or an empty one, for {len(unmasked)} images, such as {unmasked[0]}")
        masks[:] = False
    labels, trained = np.array([anomalous for _, anomalous, _ in tests]), model.settings
    metrics = {"category": trained["category"] if data.resolve() == Path(trained["data"]) else data.resolve().name,
               **{key: trained[key] for key in ("backbone", "size", "seed", "epochs")},
               **image_metrics(labels, scores), **pixel_metrics(masks, maps), "ms_per_image": time_per_image(model),
               "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad)}
    for name, value in metrics.items():
        print(f"{name:14}", "n/a" if value is None else f"{value:.4f}" if isinstance(value, float) else value)
    write_atomically(out / "metrics.json", lambda file: file.write_text(json.dumps(metrics, indent=2) + "\n"))
    draw_pictures(model, tests, scores, maps, out / "pictures")
    print(f"wrote {out / 'metrics.json'} and {len(tests)} pictures into {out / 'pictures'}")


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
    except (InputError, OSError) as error:  # one from a loader's worker comes with its traceback before it
        print("error:", str(error).strip().splitlines()[-1].removeprefix("synth.InputError: "), file=sys.stderr)
        sys.exit(2)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder with model.pt in it, or a checkpoint")
    parser.add_argument("--data", type=Path, help="category with test/; if not given, the one it was trained on")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    args = parser.parse_args()
    checkpoint = args.run / "model.pt" if args.run.is_dir() else args.run
    model = CLFlow.load(checkpoint, pick_device(args.device))
    report(model, args.data or Path(model.settings["data"]), checkpoint.parent)


if __name__ == "__main__":
    run(main)
