"""From a score and an anomaly map to a verdict: thresholds that need no defects, regions and their boxes."""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage, stats


@dataclass(frozen=True)
class Thresholds:
    """What a share `false_alarm` of normal images is expected to exceed: by the score, and by the map's maximum.
    `extrapolated` says that there were too few normal images for an order statistic."""

    score: float
    heat: float
    extrapolated: bool


@dataclass(frozen=True)
class Region:
    """A connected part of the map above its threshold; box (x0, y0, x1, y1), half-open, and area in pixels."""

    box: tuple[int, int, int, int]
    area: int
    peak: float


@dataclass(frozen=True)
class Verdict:
    """What a detector says of one image; `heat` (H, W) is its anomaly map, in the image's own pixels.

    `regions`, highest peak first, are where the defect is; there are none in a normal image."""

    score: float
    threshold: float
    anomalous: bool
    regions: list[Region]
    heat: np.ndarray
    found: np.ndarray  # (H, W) bool: all regions together


def thresholds(normal: np.ndarray, rate: float) -> Thresholds:
    """Thresholds that a share `rate` of normal images exceeds; normal (2, n): their scores and their maps' maxima."""
    score, extrapolated = threshold(normal[0], rate)
    heat, _ = threshold(normal[1], rate)
    return Thresholds(score, heat, extrapolated)


def threshold(values: np.ndarray, rate: float) -> tuple[float, bool]:
    """What a share `rate` of values like these n exceeds, and whether that is an extrapolation.

    The k-th highest, k = rate (n + 1) rounded down (conformal prediction). If k is 0: Student's bound for one more
    draw, mean + t s sqrt(1 + 1/n); but at least the highest value."""
    values = np.sort(np.asarray(values, dtype=np.float64))[::-1]
    n = len(values)
    k = int(rate * (n + 1))
    if k > 0:
        return float(values[k - 1]), False
    if n == 1:
        return float(values[0]), True
    bound = values.mean() + stats.t.ppf(1 - rate, n - 1) * np.sqrt(1 + 1 / n) * values.std(ddof=1)
    return float(max(values[0], bound)), True


def judge(score: float, heat: np.ndarray, limits: Thresholds) -> Verdict:
    """The verdict on an image with this score and map (H, W)."""
    anomalous = bool(score > limits.score)
    found = np.zeros(heat.shape, dtype=bool)
    if anomalous:
        found = heat >= (limits.heat if heat.max() >= limits.heat else np.quantile(heat, 0.999))
    return Verdict(float(score), limits.score, anomalous, regions_of(heat, found), heat, found)


def regions_of(heat: np.ndarray, found: np.ndarray) -> list[Region]:
    """The connected parts of `found` (H, W) bool, highest peak of `heat` first."""
    labels, count = ndimage.label(found)
    if count == 0:
        return []
    numbers = np.arange(1, count + 1)
    peaks = ndimage.maximum(heat, labels, numbers)
    areas = np.bincount(labels.ravel())[1:]
    regions = []
    for (rows, columns), area, peak in zip(ndimage.find_objects(labels), areas, peaks, strict=True):
        box = (columns.start, rows.start, columns.stop, rows.stop)
        regions.append(Region(box, int(area), float(peak)))
    return sorted(regions, key=lambda region: -region.peak)
