"""Measure a detector on a labelled category and draw what it found: python evaluate.py runs/bottle

Metrics are taken over all test images at size x size; one that is undefined (one class only, masks missing) is None.
"""
import argparse
import ctypes
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

from clflow import CLFlow, image_score, reason, write_atomically
from synth import InputError, list_images, read_image


class Labelled(NamedTuple):
    """A test image; `mask` is None for a good image, and where the file is missing."""
    path: Path
    defect: str  # its folder: "good", "ok", or the kind of defect
    anomalous: bool
    mask: Path | None


def labelled_images(data: Path) -> list[Labelled]:
    """Test images in MVTec AD or BTAD layout, with masks matched by stem, with or without `_mask`.

    Raises InputError if there is no test folder, or nothing in it.
    """
    found = []
    for folder in sorted(p for p in data.glob("test/*") if p.is_dir()):
        anomalous, truth = folder.name not in ("good", "ok"), data / "ground_truth" / folder.name
        masks = {p.stem.removesuffix("_mask"): p for p in list_images(truth)} if anomalous and truth.is_dir() else {}
        found += [Labelled(p, folder.name, anomalous, masks.get(p.stem)) for p in list_images(folder)]
    if not found:
        raise InputError(f"--data {data}: no test images; evaluation needs images in test/good and test/<defect>")
    return found


def read_mask(path: Path | None, shape: tuple[int, int]) -> np.ndarray:
    """True mask, bool of `shape` (H, W): resized by nearest neighbour, then > 0.5; all False for None."""
    if path is None:
        return np.zeros(shape, dtype=bool)
    mask = Image.fromarray(read_image(path)[..., 0])
    return np.asarray(mask.resize(shape[::-1], Image.Resampling.NEAREST)) > 0.5


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
    inside = fpr < limit
    fpr, overlap = np.append(fpr[inside], limit), np.append(overlap[inside], np.interp(limit, fpr, overlap))
    return float(np.trapezoid(overlap, fpr) / limit)


def image_metrics(labels: np.ndarray, scores: np.ndarray) -> dict[str, float | None]:
    """Image AUROC, average precision, F1-max (an oracle: its threshold is chosen on these labels); labels: bool."""
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


def measure(model: CLFlow, tests: list[Labelled]) -> tuple[dict[str, float | None], np.ndarray]:
    """Metrics of `model` on labelled images, and their maps (N, size, size)."""
    maps = np.concatenate([model.anomaly_map(x).cpu().numpy() for x in batches([t.path for t in tests], model.size)])
    scores = image_score(torch.from_numpy(maps)).numpy()
    labels, masks = np.array([t.anomalous for t in tests]), np.zeros(maps.shape, dtype=bool)
    if unmasked := [t.path for t in tests if t.anomalous and t.mask is None]:
        print(f"no mask in ground_truth for {len(unmasked)} defect images, such as {unmasked[0]}: pixel metrics are n/a")
    else:
        masks = np.stack([read_mask(t.mask, maps.shape[1:]) for t in tests])
    return {**image_metrics(labels, scores), **pixel_metrics(masks, maps)}, maps


def time_per_image(model: CLFlow, batch: int = 8) -> float:
    """Milliseconds per image of backbone and flow, without decoding: the median of five batches."""
    images, seconds = torch.rand(batch, 3, model.size, model.size, device=model.levels.device), []
    for _ in range(6):
        start = time.perf_counter()
        model.score(images).cpu()  # .cpu() waits for the device
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds[1:]) / batch  # the first one warms up


def heat_colours(level: np.ndarray) -> np.ndarray:
    """(H, W) in 0..1 -> (H, W, 3): black, violet, red, orange, pale yellow."""
    stops = np.array([(0, 0, 0), (0.32, 0.07, 0.43), (0.73, 0.21, 0.33), (0.98, 0.55, 0.04), (0.99, 1.0, 0.64)])
    return np.stack([np.interp(level, np.linspace(0, 1, len(stops)), channel) for channel in stops.T], axis=-1)


def draw_result(image: np.ndarray, heat: np.ndarray, model: CLFlow, title: str,
                mask: np.ndarray | None = None) -> Image.Image:
    """One row: input outlined where heat (H, W) is over the threshold, heat map, true mask if known; image (H, W, 3).

    The scale of the heat map is the model's, not the image's, so that good images stay dark: black is the typical
    held-out normal pixel, mid-scale (red) is the threshold.
    """
    threshold = model.threshold(model.normal_peaks)
    hot = heat > threshold
    edge = ndimage.binary_dilation(hot, iterations=max(1, round(min(heat.shape) / 200))) & ~hot
    heated = heat_colours(heat / (2 * threshold))
    image, heated = (np.where(edge[..., None], colour, x) for x, colour in ((image, (1, 0.1, 0.1)), (heated, (1, 1, 1))))
    panels = {"input": image, "anomaly map": heated}
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


def draw_pictures(model: CLFlow, tests: list[Labelled], maps: np.ndarray, folder: Path) -> None:
    """One picture per test image, at the image's own shape, as <defect>_<file name>.png in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for test, heat in zip(tests, maps, strict=True):
        image = read_image(test.path)
        shape = image.shape[:2]
        score, threshold = image_score(torch.from_numpy(heat)[None]).item(), model.threshold(model.normal_scores)
        verdict = "anomalous" if score > threshold else "normal"
        title = f"{test.defect}/{test.path.name}: {verdict}, score {score:.2f} (threshold {threshold:.2f})"
        heat = np.asarray(Image.fromarray(heat).resize(shape[::-1], Image.Resampling.BILINEAR))
        mask = None if test.anomalous and test.mask is None else read_mask(test.mask, shape)
        draw_result(image, heat, model, title, mask).save(folder / f"{test.defect}_{test.path.name}.png")


def report(model: CLFlow, data: Path, out: Path) -> None:
    """Measure `model` on the test images of `data`; print the table, write metrics.json and pictures/ into `out`."""
    tests = labelled_images(data)
    measured, maps = measure(model, tests)
    metrics = {"category": data.resolve().name, **{k: model.settings[k] for k in ("backbone", "size", "seed", "epochs")},
               **measured, "ms_per_image": time_per_image(model),
               "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad)}
    for name, value in metrics.items():
        print(f"{name:14}", "n/a" if value is None else f"{value:.4f}" if isinstance(value, float) else value)
    write_atomically(out / "metrics.json", lambda file: file.write_text(json.dumps(metrics, indent=2) + "\n"))
    draw_pictures(model, tests, maps, out / "pictures")
    print(f"wrote {out / 'metrics.json'} and {len(tests)} pictures into {out / 'pictures'}")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise InputError(message)  # one line, without the usage block


def pick_device(name: str) -> str:
    """`name`, or for "auto" CUDA where there is one. Raises InputError if the device is not there."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: not available here ({reason(error)})") from error
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
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder with model.pt in it, or a checkpoint")
    parser.add_argument("--data", type=Path, help="category with test/; what the checkpoint was trained on, if not given")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    args = parser.parse_args()
    checkpoint = args.run / "model.pt" if args.run.is_dir() else args.run
    model = CLFlow.load(checkpoint, pick_device(args.device))
    report(model, args.data or Path(model.settings["data"]), checkpoint.parent)


if __name__ == "__main__":
    run(main)
