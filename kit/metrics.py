"""Metrics of scores and maps, compared with labels and masks."""

import numpy as np
from scipy import ndimage

FPR_LIMIT = 0.3  # the highest false-positive rate of AUPRO


def image_metrics(labels: np.ndarray, scores: np.ndarray) -> dict[str, float | None]:
    """Image AUROC, average precision, and F1-max, an oracle, since its threshold is chosen on these labels; labels
    (N,) bool, scores (N,). None if there is only one class."""
    # Imported here: it takes a second, and judging an image does not need it.
    from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

    if labels.all() or not labels.any():
        return dict.fromkeys(("image_auroc", "image_ap", "image_f1max"))
    precision, recall, _ = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return {
        "image_auroc": float(roc_auc_score(labels, scores)),
        "image_ap": float(average_precision_score(labels, scores)),
        "image_f1max": float(f1.max()),
    }


def pixel_metrics(maps: np.ndarray, masks: np.ndarray) -> dict[str, float | None]:
    """Pixel AUROC and average precision, and AUPRO to a false-positive rate of 0.3, all exact; maps (N, H, W) scores,
    masks (N, H, W) bool. None if there is only one class.

    As the threshold falls, it finds each defect pixel at some false-positive rate; from there on the pixel adds its
    weight to the curve. For AUROC all pixels have equal weight. For AUPRO a pixel has the weight 1 / (area of its
    region), so that regions have equal weight (MVTec AD, IJCV 2021). Computed here because it is faster: on 83 maps of
    256x256 all three take 0.13 s; scikit-learn takes 3.5 s for the first two."""
    if masks.all() or not masks.any():
        return dict.fromkeys(("pixel_auroc", "pixel_ap", "aupro"))
    normal = np.sort(maps[~masks])  # (pixels,)
    defective = maps[masks]  # (D,), as are all arrays from here on
    # Shares of normal pixels above, and at or above, each defect pixel: the false-positive rates between which the
    # falling threshold finds it. They differ if pixels are tied; the curve is then a straight line, as in ROC curves.
    start = 1 - np.searchsorted(normal, defective, side="right") / normal.size
    end = 1 - np.searchsorted(normal, defective, side="left") / normal.size
    found = defective.size - np.searchsorted(np.sort(defective), defective)  # defect pixels at or above each
    # Each pixel's part of the area up to the limit, under a line that rises from 0 at `start` to 1 at `end` and stays
    # there: a rectangle less half of the slope's box; or, where the limit cuts the slope, a triangle.
    rising = np.maximum(FPR_LIMIT - start, 0) ** 2 / np.maximum(2 * (end - start), 1e-12)
    areas = np.where(end <= FPR_LIMIT, FPR_LIMIT - (start + end) / 2, rising)
    return {
        "pixel_auroc": float(1 - np.mean(start + end) / 2),
        "pixel_ap": float(np.mean(found / (found + end * normal.size))),
        "aupro": float(np.average(areas, weights=region_weights(masks)) / FPR_LIMIT),
    }


def region_weights(masks: np.ndarray) -> np.ndarray:
    """For each defect pixel, in the order of maps[masks]: 1 / (area of its 8-connected region)."""
    weights = []
    for mask in masks:
        labels, _ = ndimage.label(mask, structure=np.ones((3, 3)))
        areas = np.bincount(labels.ravel())
        weights.append(1 / areas[labels[mask]])
    return np.concatenate(weights)


def shares_at(threshold: float, labels: np.ndarray, scores: np.ndarray) -> dict[str, float | None]:
    """Recall, precision and false-alarm rate of the good images, if scores above the threshold are flagged. None
    instead of a division by zero."""
    flagged = scores > threshold
    parts = {"recall": flagged[labels], "precision": labels[flagged], "false_alarms": flagged[~labels]}
    return {name: float(part.mean()) if part.size else None for name, part in parts.items()}
