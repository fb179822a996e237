"""Measure a trained detector on a labelled category and draw what it found: python evaluate.py runs/bottle

Metrics are defined over all test images at size x size; one that is undefined (one class only, masks missing) is None.
"""
import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from clflow import CLFlow, reason, write_atomically
from synth import InputError, list_images, read_image


# ---------------------------------------------------------------- finding labelled test images

class TestImage(NamedTuple):
    path: Path
    defect: str  # name of the folder: "good", or the kind of defect
    anomalous: bool
    mask: Path | None  # None: no mask file (for a good image: an empty mask)


def test_images(data: Path | str) -> list[TestImage]:
    """Labelled images of `data`/test (MVTec AD or BTAD layout), masks matched by stem, with or without `_mask`.

    Raises InputError if there is no test folder or nothing in it.
    """
    root = Path(data) / "test"
    if not root.is_dir():
        raise InputError(f"--data {data}: no folder test in it; evaluation needs test/good and test/<defect>")
    found = []
    for folder in sorted(p for p in root.iterdir() if p.is_dir()):
        anomalous = folder.name not in ("good", "ok")
        truth = Path(data) / "ground_truth" / folder.name
        masks = {p.stem.removesuffix("_mask"): p for p in list_images(truth)} if truth.is_dir() else {}
        found += [TestImage(p, folder.name, anomalous, masks.get(p.stem) if anomalous else None)
                  for p in list_images(folder)]
    if not found:
        raise InputError(f"{root}: no images in its folders; evaluation needs test/good and test/<defect>")
    return found


def read_mask(path: Path | None, shape: tuple[int, int]) -> np.ndarray:
    """True mask, bool of `shape` (H, W): resized by nearest neighbour, then > 0.5; all False for None."""
    if path is None:
        return np.zeros(shape, dtype=bool)
    try:
        with Image.open(path) as image:
            resized = image.convert("L").resize(shape[::-1], Image.Resampling.NEAREST)
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as a mask ({error})") from error
    return np.asarray(resized) > 127


# ---------------------------------------------------------------- metrics

def aupro(maps: np.ndarray, masks: np.ndarray, limit: float = 0.3) -> float:
    """Area under the per-region overlap curve up to a false-positive rate of `limit`, divided by `limit`; exact.

    maps: (N, H, W) scores; masks: (N, H, W) bool, with at least one defect and one normal pixel. Regions are
    8-connected components (MVTec AD, IJCV 2021). Weighting each defect pixel by 1 / (its region's area x number of
    regions) makes the mean overlap a cumulative sum over the pixels in falling order of score.
    """
    weights, regions = np.zeros(maps.shape, dtype=np.float32), 0
    for weight, mask in zip(weights, masks, strict=True):
        labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
        weight[mask] = 1 / np.bincount(labels.ravel())[labels[mask]]
        regions += count
    normal_scores = maps[~masks]
    # Past the limit nothing counts: keep the pixels at least as high as the normal one that reaches it.
    rank = max(0, normal_scores.size - int(np.ceil(limit * normal_scores.size)) - 1)
    keep = maps >= np.partition(normal_scores, rank)[rank]
    scores, weights, masks = maps[keep], weights[keep], masks[keep]
    order = np.argsort(-scores)
    last_of_tie = np.append(np.diff(scores[order]) != 0, True)
    fpr = np.append(0, np.cumsum(~masks[order])[last_of_tie] / normal_scores.size)
    overlap = np.append(0, np.cumsum(weights[order], dtype=np.float64)[last_of_tie] / regions)
    inside = fpr < limit
    return float(np.trapezoid(np.append(overlap[inside], np.interp(limit, fpr, overlap)),
                              np.append(fpr[inside], limit)) / limit)


def image_metrics(labels: np.ndarray, scores: np.ndarray) -> dict[str, float | None]:
    """Image AUROC, average precision and F1-max (an oracle: its threshold is chosen on these labels); labels: bool."""
    if labels.all() or not labels.any():
        return dict.fromkeys(("image_auroc", "image_ap", "image_f1max"))
    precision, recall, _ = precision_recall_curve(labels, scores)
    return {"image_auroc": float(roc_auc_score(labels, scores)),
            "image_ap": float(average_precision_score(labels, scores)),
            "image_f1max": float(np.max(2 * precision * recall / np.maximum(precision + recall, 1e-12)))}


def pixel_metrics(masks: np.ndarray, maps: np.ndarray) -> dict[str, float | None]:
    """Pixel AUROC and average precision over all pixels of all images, and AUPRO to 0.3; (N, H, W) bool and float32."""
    if masks.all() or not masks.any():
        return dict.fromkeys(("pixel_auroc", "pixel_ap", "aupro"))
    return {"pixel_auroc": float(roc_auc_score(masks.ravel(), maps.ravel())),
            "pixel_ap": float(average_precision_score(masks.ravel(), maps.ravel())),
            "aupro": aupro(maps, masks)}


# ---------------------------------------------------------------- pictures

def heat_colours(level: np.ndarray) -> np.ndarray:
    """Colours for `level` (H, W) in 0..1: black, violet, red, orange, pale yellow; (H, W, 3) in 0..1."""
    stops = np.array([[0, 0, 0], [0.32, 0.07, 0.43], [0.73, 0.21, 0.33], [0.98, 0.55, 0.04], [0.99, 1.0, 0.64]])
    return np.stack([np.interp(level, np.linspace(0, 1, 5), stops[:, c]) for c in range(3)], axis=-1)


def outline(region: np.ndarray, width: int) -> np.ndarray:
    """The pixels around a region, `width` wide; (H, W) bool."""
    return ndimage.binary_dilation(region, iterations=width) & ~region


def draw_result(image: np.ndarray, heat: np.ndarray, model: CLFlow, threshold: float, title: str,
                mask: np.ndarray | None = None) -> Image.Image:
    """One row: input with outline, true mask (if given), heat map; image (H, W, 3), heat and mask (H, W).

    The heat map's scale is the model's: black at the typical held-out normal pixel, mid-scale (red) at the threshold,
    so that a good image stays dark however it compares with itself.
    """
    line = max(1, round(min(heat.shape) / 200))
    edge = outline(heat > threshold, line)
    level = np.clip((heat - model.normal_level.item()) / (2 * (threshold - model.normal_level.item())), 0, 1)
    marked, heated = image.copy(), heat_colours(level)
    marked[edge], heated[edge] = (1, 0.1, 0.1), (1, 1, 1)
    panels = {"input, outlined at the threshold": marked, "anomaly map": heated}
    if mask is not None:
        panels["true mask"] = np.repeat(mask[..., None], 3, axis=-1).astype(np.float32)
    height, width, gap = *heat.shape, 6
    bar = max(18, width // 14)
    font = ImageFont.load_default(bar * 0.6)
    sheet = Image.new("RGB", (len(panels) * (width + gap) - gap, height + 2 * bar), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((3, bar * 0.15), title, fill="black", font=font)
    for i, (name, panel) in enumerate(panels.items()):
        sheet.paste(Image.fromarray((panel * 255).astype(np.uint8)), (i * (width + gap), bar))
        draw.text((i * (width + gap) + 3, height + bar * 1.15), name, fill="black", font=font)
    return sheet


# ---------------------------------------------------------------- the job

def time_per_image(model: CLFlow, batch: int = 8, repeats: int = 5) -> float:
    """Milliseconds per image of backbone and flow, without decoding: median over `repeats` batches of `batch`."""
    images = torch.rand(batch, 3, model.size, model.size, device=model.normal_level.device)
    seconds = []
    for _ in range(repeats + 1):  # the first one warms up
        start = time.perf_counter()
        model.score(images).cpu()  # .cpu() waits for the device
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds[1:]) / batch


def batches(files: list[Path], size: int, batch: int = 8) -> Iterator[torch.Tensor]:
    """Images of `files` in their order, as (<= batch, 3, size, size) tensors."""
    for start in range(0, len(files), batch):
        images = np.stack([read_image(path, size) for path in files[start:start + batch]])
        yield torch.from_numpy(images).permute(0, 3, 1, 2)


def measure(model: CLFlow, tests: list[TestImage]) -> tuple[dict, np.ndarray]:
    """Metrics of `model` on the labelled images, and their maps (N, size, size)."""
    maps = np.concatenate([model.anomaly_map(x).cpu().numpy() for x in batches([t.path for t in tests], model.size)])
    labels = np.array([t.anomalous for t in tests])
    masks = np.stack([read_mask(t.mask, (model.size, model.size)) for t in tests])
    if unmasked := [t.path for t in tests if t.anomalous and t.mask is None]:
        print(f"pixel metrics are n/a: no mask in ground_truth for {len(unmasked)} defect images, such as {unmasked[0]}")
        masks[:] = False
    return {**image_metrics(labels, maps.max(axis=(1, 2))), **pixel_metrics(masks, maps)}, maps


def draw_pictures(model: CLFlow, tests: list[TestImage], maps: np.ndarray, folder: Path) -> None:
    """One picture per test image in `folder`, at the image's own shape: <defect>_<name>.png."""
    folder.mkdir(parents=True, exist_ok=True)
    threshold = model.threshold()
    for test, heat in zip(tests, maps, strict=True):
        image = read_image(test.path)
        shape = image.shape[:2]
        heat = np.asarray(Image.fromarray(heat).resize(shape[::-1], Image.Resampling.BILINEAR))
        mask = None if test.anomalous and test.mask is None else read_mask(test.mask, shape)
        verdict = "anomalous" if heat.max() > threshold else "normal"
        title = f"{test.defect}/{test.path.name}: {verdict}, score {heat.max():.2f} (threshold {threshold:.2f})"
        draw_result(image, heat, model, threshold, title, mask).save(folder / f"{test.defect}_{test.path.stem}.png")


def report(model: CLFlow, data: Path, out: Path) -> dict:
    """Measure `model` on the test images of `data`; print the table, write metrics.json and pictures/ into `out`."""
    tests, settings = test_images(data), model.settings
    metrics, maps = measure(model, tests)
    metrics = {"category": Path(data).resolve().name, **{k: settings[k] for k in ("backbone", "size", "seed", "epochs")},
               **metrics, "ms_per_image": time_per_image(model),
               "parameters": sum(p.numel() for p in model.flows.parameters())}
    for name, value in metrics.items():
        print(f"{name:14}", "n/a" if value is None else f"{value:.4f}" if isinstance(value, float) else value)
    write_atomically(out / "metrics.json", lambda file: file.write_text(json.dumps(metrics, indent=2) + "\n"))
    draw_pictures(model, tests, maps, out / "pictures")
    print(f"wrote {out / 'metrics.json'} and {len(tests)} pictures in {out / 'pictures'}")
    return metrics


# ---------------------------------------------------------------- command line

class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise InputError(message)  # one line, without the usage block


def pick_device(name: str) -> str:
    """The device `name`; "auto" is CUDA where there is one. Raises InputError if it is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: not available here ({reason(error)})") from error
    return name


def run(main: Callable[[], None]) -> None:
    """Call `main`; bad input becomes one line on stderr and exit code 2."""
    try:
        main()
    except InputError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder with model.pt, or a checkpoint")
    parser.add_argument("--data", type=Path, help="category with test/ (default: the one it was trained on)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    args = parser.parse_args()
    checkpoint = args.run / "model.pt" if args.run.is_dir() else args.run
    model = CLFlow.load(checkpoint, pick_device(args.device))
    report(model, args.data or Path(model.settings["data"]), checkpoint.parent)


if __name__ == "__main__":
    run(main)
