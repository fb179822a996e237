"""From a score and an anomaly map to a verdict: thresholds that need no defects, regions and their boxes."""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage, stats

from kit.errors import InputError
from kit.settings import LEAST_IMAGES

CONFIDENCE = 0.9  # of the upper bound of the false-alarm rate
FEW = 10  # good images: too few for a threshold that one may trust
LEAST = 1e-6  # of a score: lower ones have no logarithm
REACH = 1.5  # robust standard deviations
USUAL = 0.16  # standard deviation of the logarithms of good images' scores, of eight categories
BELIEVED = 20  # images
ODD = 4  # standard deviations above the median, of log scores


@dataclass(frozen=True)
class Thresholds:
    """What a share `false_alarm` of normal images is expected to exceed: by the score, and by the map's maximum; from
    `images` normal ones, which support with 90 % confidence that not more than a share `at_most` exceeds the score."""

    score: float
    heat: float
    images: int
    at_most: float


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


def thresholds(normal: np.ndarray, rate: float, different: int | None = None) -> Thresholds:
    """Thresholds that a share `rate` of normal images exceeds; normal (2, n): their scores and their maps' maxima; they
    show `different` ones, n if it is not given. Raises InputError if these are fewer than LEAST_IMAGES."""
    images = normal.shape[1] if different is None else different
    score = threshold(normal[0], rate, images)
    above = round(float((normal[0] > score).mean()) * images)
    at_most = float(stats.beta.ppf(CONFIDENCE, above + 1, images - above))  # Clopper and Pearson's bound
    return Thresholds(score, threshold(normal[1], rate, images), images, at_most)


def basis(limits: Thresholds) -> str:
    """What a threshold rests on, in a line."""
    warning = f"warning, less than {FEW} good images: " if limits.images < FEW else ""
    return (
        f"{warning}threshold {limits.score:.3f} from {limits.images} good images, of whose like it flags at most "
        f"{limits.at_most:.1%}, with {CONFIDENCE:.0%} confidence"
    )


def threshold(values: np.ndarray, rate: float, different: int | None = None) -> float:
    """What a share `rate` of values like these n exceeds, which `different` images gave, n if it is not given. Raises
    InputError if these are fewer than LEAST_IMAGES.

    The k-th highest, k = rate (n + 1) rounded down, if that is at least 10. This is the quantile of split conformal
    prediction. Its guarantee needs exchangeability: values and new scores come from one detector, and any order of them
    is equally likely. Most values here come from detectors that were trained on other thirds of the images, so the
    guarantee does not hold exactly. CV+ guarantees 1 - 2 rate, but only for a rule that compares each new image with
    each of these detectors, and this program does not. Scores of thirds tend to be higher than those of the final
    detector, so the threshold tends to be cautious.

    Of fewer values, Student's bound for one more draw of a log-normal variable: mean + t s sqrt(1 + 1/n) of the
    logarithms. It says where their bulk ends, whatever the highest of few happens to be: what lies more than REACH
    deviations from the median, above or below, counts as if it lay there. And few images do not decide alone how widely
    good ones scatter: USUAL, a scatter that others had, counts as much as BELIEVED images do."""
    logs = np.log(np.maximum(np.asarray(values, dtype=np.float64), LEAST))
    images = len(logs) if different is None else different
    if images < LEAST_IMAGES:
        raise InputError(
            f"a threshold takes the scores of {LEAST_IMAGES} different good images, and there are {images}: finish the "
            "training (--resume), or give more good images"
        )
    k = int(rate * (images + 1))
    if k >= 10 and images == len(logs):
        return float(np.sort(values)[-k])
    middle = np.median(logs)
    first_guess = believed(np.median(np.abs(logs - middle)) / stats.norm.ppf(0.75), images)
    clipped = np.clip(logs, middle - REACH * first_guess, middle + REACH * first_guess)
    deviation = believed(clipped.std(ddof=1) / CLIPPED_DEVIATION, images)
    t = stats.t.ppf(1 - rate, images - 1 + BELIEVED)
    return float(np.exp(clipped.mean() + t * np.sqrt(1 + 1 / images) * deviation))


def believed(deviation: float, images: int) -> float:
    """A deviation that so many images had, together with the usual one."""
    return float(np.sqrt((BELIEVED * USUAL**2 + images * deviation**2) / (BELIEVED + images)))


def clipped_deviation(reach: float) -> float:
    """The deviation of a standard normal variable that is clipped to -reach..reach."""
    inside = stats.norm.cdf(reach) - stats.norm.cdf(-reach)
    variance = inside - 2 * reach * stats.norm.pdf(reach) + reach**2 * (1 - inside)
    return float(np.sqrt(variance))


CLIPPED_DEVIATION = clipped_deviation(REACH)


def odd_ones(values: np.ndarray) -> np.ndarray:
    """Which of these values (n,), highest first, are too high to belong to the others: their logarithms are more than
    four standard deviations above the median. The deviation is that of the median distance from it, which a few odd
    ones do not change. Of less than five none is odd."""
    if len(values) < 5:
        return np.array([], dtype=int)
    logs = np.log(np.maximum(values, LEAST))
    away = logs - np.median(logs)
    deviation = max(np.median(np.abs(away)) / stats.norm.ppf(0.75), 0.01)  # of copies of one image it would be zero
    odd = np.flatnonzero(away > ODD * deviation)
    return odd[np.argsort(-away[odd], kind="stable")]


def drift(scores: np.ndarray, normal: np.ndarray) -> str:
    """Whether many images' scores have moved as a whole: "higher" or "lower", if three quarters of them are that than
    three quarters of the normal ones; else "". Of a folder with up to two thirds of defects that is not said, nor of
    less than ten images."""
    if len(scores) < 10:
        return ""
    low, high = np.quantile(scores, (0.25, 0.75))
    normal_low, normal_high = np.quantile(normal, (0.25, 0.75))
    if low > normal_high:
        return "higher"
    return "lower" if high < normal_low else ""


def decide(score: float, heat: np.ndarray, limits: Thresholds) -> Verdict:
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
    regions = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        values = heat[rows, columns][labels[rows, columns] == number]
        box = (columns.start, rows.start, columns.stop, rows.stop)
        regions.append(Region(box, len(values), float(values.max())))
    return sorted(regions, key=lambda region: -region.peak)
