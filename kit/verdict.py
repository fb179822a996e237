"""From a score and an anomaly map to a verdict: thresholds from good images alone, regions and their boxes."""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage, special  # scipy.stats takes half a second to import

from kit import InputError
from kit.settings import LEAST_IMAGES

CONFIDENCE = 0.9  # of the upper bound of the false-alarm rate
FEW = 10  # good images: with fewer, `basis` warns that the threshold is unreliable
LEAST_SCORE = 1e-6  # lowest score before the logarithm is taken
CLIPPED_AT = 1.5  # robust standard deviations
CLIPPED_DEVIATION = 0.8823067585451615  # of a standard normal variable that is clipped to -CLIPPED_AT..CLIPPED_AT
ODD = 4  # standard deviations above the median, of log scores
USUAL = 0.16  # standard deviation of the logarithms of good images' scores, from eight categories
BELIEVED = 20  # images; the weight of USUAL
TIMES = 5  # the rate of false alarms on changed copies of images, compared with that on images as they are


@dataclass(frozen=True)
class Thresholds:
    """Thresholds for the score and for the map's maximum. A share `false_alarm` of good images is expected to exceed
    each of them. They come from `images` different good images. With 90 % confidence, at most a share `at_most` of
    good images exceeds the score threshold."""

    score: float
    anomaly_map: float
    images: int
    at_most: float


@dataclass(frozen=True)
class Region:
    """A connected part of the map above its threshold, or of its highest thousandth if all of it is below; box (x0, y0,
    x1, y1), half-open, and area in pixels."""

    box: tuple[int, int, int, int]
    area: int
    peak: float


@dataclass(frozen=True)
class Verdict:
    """The verdict of a detector on one image. `anomaly_map` (H, W) is in the image's own pixels.

    `regions` are the locations of the defect, highest peak first; a good image has none."""

    score: float
    threshold: float
    anomalous: bool
    regions: list[Region]
    anomaly_map: np.ndarray
    found: np.ndarray  # (H, W) bool: all regions together


def thresholds(normal: np.ndarray, rate: float, different: int | None = None) -> Thresholds:
    """Thresholds that a share `rate` of good images exceeds, from `normal` (2, n), the scores and the maps' maxima of
    n images. They count as `different` images (default: n). Raises InputError for fewer than LEAST_IMAGES."""
    images = normal.shape[1] if different is None else different
    score = threshold(normal[0], rate, images)
    peak = threshold(normal[1], rate, images)
    above = round(float((normal[0] > score).mean()) * images)
    # Clopper and Pearson's bound
    at_most = float(special.betaincinv(above + 1, images - above, CONFIDENCE)) if above < images else 1.0
    return Thresholds(score, peak, images, at_most)


def allowance(limit: float, copies: np.ndarray, rate: float, most: float) -> float:
    """By how much the scores of changed copies (m,) of good images exceed those of good images as they are: the ratio
    of their threshold, at the rate TIMES `rate`, to `limit`. It is at least 1, and at most `most`: beyond that, too
    many defects would be missed."""
    return float(np.clip(threshold(copies, min(TIMES * rate, 0.5)) / limit, 1, most))


def basis(limits: Thresholds) -> str:
    """One line on a threshold: how many good images it comes from, and the false-alarm rate to expect."""
    warning = f"; warning: fewer than {FEW} good images make it unreliable" if limits.images < FEW else ""
    return (
        f"threshold {limits.score:.3f}, set from {limits.images} good images: expect at most "
        f"{100 * limits.at_most:.1f} % false alarms on images like these ({100 * CONFIDENCE:.0f} % confidence){warning}"
    )


def threshold(values: np.ndarray, rate: float, different: int | None = None) -> float:
    """The limit that a new value of the same kind as these n exceeds with probability `rate`. They count as `different`
    images (default: n). Raises InputError for fewer than LEAST_IMAGES.

    The k-th highest, k = rate (n + 1) rounded down, if that is at least 10 and all n images are different. This is the
    quantile of split conformal prediction. Its guarantee needs exchangeability: values and new scores come from one
    detector, and any order of them is equally likely. Most values here come from detectors that were trained on other
    thirds of the images, so the guarantee does not hold exactly. CV+ guarantees 1 - 2 rate, but only for a rule that
    compares each new image with each of these detectors, and this program does not.

    For fewer values, the upper prediction limit (Student's t) for one more draw of a log-normal variable: mean + t s
    sqrt(1 + 1/n) of the logarithms. Two measures make it robust. Values more than CLIPPED_AT deviations from the median
    are clipped to that distance, so that the highest of a few values does not decide. And s is pooled with USUAL, the
    deviation measured on other categories, which has the weight of BELIEVED images."""
    logs = np.log(np.maximum(np.asarray(values, dtype=np.float64), LEAST_SCORE))
    images = len(logs) if different is None else different
    if images < LEAST_IMAGES:
        raise InputError(
            f"a threshold needs the scores of {LEAST_IMAGES} different good images, but there are {images}: finish the "
            "training (--resume), or give more good images"
        )
    k = int(rate * (images + 1))
    if k >= 10 and images == len(logs):
        return float(np.sort(values)[-k])
    middle = np.median(logs)
    first_guess = pooled(robust_deviation(logs), images)
    clipped = np.clip(logs, middle - CLIPPED_AT * first_guess, middle + CLIPPED_AT * first_guess)
    deviation = pooled(clipped.std(ddof=1) / CLIPPED_DEVIATION, images)
    t = special.stdtrit(images - 1 + BELIEVED, 1 - rate)
    return float(np.exp(clipped.mean() + t * np.sqrt(1 + 1 / images) * deviation))


def robust_deviation(values: np.ndarray) -> np.ndarray:
    """The standard deviation of values (n, ...), estimated from their median distance to the median: (...). A few
    outliers do not change it."""
    return np.median(np.abs(values - np.median(values, axis=0)), axis=0) / special.ndtri(0.75)


def pooled(deviation: float, images: int) -> float:
    """The deviation of this many images, pooled with the usual one."""
    return float(np.sqrt((BELIEVED * USUAL**2 + images * deviation**2) / (BELIEVED + images)))


def outliers(values: np.ndarray) -> np.ndarray:
    """The indices, highest value first, of the outliers among scores (n,): their logarithms are more than ODD robust
    standard deviations above the median. Fewer than five scores have no outliers."""
    if len(values) < 5:
        return np.array([], dtype=int)
    logs = np.log(np.maximum(values, LEAST_SCORE))
    away = logs - np.median(logs)
    deviation = max(robust_deviation(logs), 0.01)  # for copies of one image it would be zero
    odd = np.flatnonzero(away > ODD * deviation)
    return odd[np.argsort(-away[odd], kind="stable")]


def decide(score: float, anomaly_map: np.ndarray, limits: Thresholds) -> Verdict:
    """The verdict on an image with this score and map (H, W)."""
    anomalous = bool(score > limits.score)
    found = np.zeros(anomaly_map.shape, dtype=bool)
    if anomalous:
        limit = limits.anomaly_map
        if anomaly_map.max() < limit:
            limit = np.quantile(anomaly_map, 0.999)
        found = (anomaly_map >= limit) & (anomaly_map > 0)  # it is 0 outside the region of interest
    return Verdict(float(score), limits.score, anomalous, regions_of(anomaly_map, found), anomaly_map, found)


def regions_of(anomaly_map: np.ndarray, found: np.ndarray) -> list[Region]:
    """The connected parts of `found` (H, W) bool, highest peak of `anomaly_map` first."""
    labels, _ = ndimage.label(found)
    regions = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        values = anomaly_map[rows, columns][labels[rows, columns] == number]
        box = (columns.start, rows.start, columns.stop, rows.stop)
        regions.append(Region(box, len(values), float(values.max())))
    return sorted(regions, key=lambda region: -region.peak)
