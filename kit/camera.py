"""What a camera changes in an image, and not the part: focus, noise, compression, light.

`camera_copy` makes such a change at random, for training. `measured` and `differences` name such a change in new
images. Images are numpy arrays (H, W, 3) float32 RGB in [0, 1]."""

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from kit.images import FORMATS, is_grey, read_image

BLUR = (0.3, 1.2)  # pixels, standard deviation of the Gaussian
NOISE = 0.03  # standard deviation, at most
QUALITY = (40, 95)  # of the JPEG file
MIDDLE = 1024  # pixels a side that are measured
MEASURED = 50  # good images at most, to find the usual measures

# For each measure: the word for a rise, the word for a fall, and the smallest change that is reported.
MEASURES = {
    "light": ("brighter", "darker", 0.05),  # mean of all pixels
    "noise": ("noisier", "less noisy", 0.2),  # logarithm of the standard deviation
    "sharpness": ("sharper", "blurrier", 0.15),  # logarithm of a ratio of contrasts
    "compression": ("more strongly compressed", "less compressed", 0.5),  # logarithm of 1 + quantization step
}


# ---------------------------------------------------------------- copies, for training


def camera_copy(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image as a slightly worse camera would see it: (H, W, 3) -> (H, W, 3).

    A blur in half of the copies, then Gaussian noise of a random strength in all, then JPEG compression in two thirds.
    Grey images stay grey."""
    channels = 1 if is_grey(image) else 3
    copy = image
    if rng.random() < 1 / 2:
        copy = blurred(copy, rng.uniform(*BLUR))
    noise = rng.standard_normal((*image.shape[:2], channels), dtype=np.float32)
    copy = (copy + np.float32(rng.uniform(0, NOISE)) * noise).clip(0, 1)
    if rng.random() < 2 / 3:
        copy = compressed(copy, int(rng.uniform(*QUALITY)))
    return copy


def with_camera_copies(paint: Callable) -> Callable:
    """Wraps `paint`, a function of (x+, rng, other image, region) that returns (x-, mask, box): with probability 1/2,
    x- is replaced by a camera copy of it. So noise and blur tell nothing about defects."""

    def painted(image: np.ndarray, rng: np.random.Generator, other: np.ndarray, roi: np.ndarray) -> tuple:
        anomalous, mask, box = paint(image, rng, other, roi)
        if rng.random() < 0.5:
            anomalous = camera_copy(anomalous, rng)
        return anomalous, mask, box

    return painted


def blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    """The image (H, W, 3) after a Gaussian filter; `sigma` in pixels."""
    return ndimage.gaussian_filter(image, (sigma, sigma, 0))


def compressed(image: np.ndarray, quality: int) -> np.ndarray:
    """The image (H, W, 3) after it was written as a JPEG file of this quality (1 to 95) and read again."""
    file = io.BytesIO()
    Image.fromarray(np.uint8(np.round(image * 255))).save(file, "JPEG", quality=quality)
    return np.float32(Image.open(file)) / 255


# ---------------------------------------------------------------- measures, to name what differs


def measured(image: np.ndarray, path: Path | None = None) -> np.ndarray:
    """MEASURES of an image (H, W, 3), as the detector sees it: (4,).

    Noise is the median response of a Laplacian filter, after Immerkaer (1996). Sharpness compares the strongest details
    of one pixel with those of two. Compression is read from the header of the file `path`; NaN without a file. Of a
    large image only the middle counts."""
    grey = middle_of(image).mean(axis=2)
    kernel = np.float32([[1, -2, 1], [-2, 4, -2], [1, -2, 1]])
    response = np.abs(ndimage.convolve(grey, kernel))
    noise = np.median(response) / (6 * 0.6745)
    fine = ndimage.gaussian_filter(grey, 1.0)
    coarse = ndimage.gaussian_filter(grey, 2.0)
    details = np.quantile(np.abs(grey - fine), 0.99) + 1e-4
    larger_details = np.quantile(np.abs(fine - coarse), 0.99) + 1e-4
    step = quantization_step(path) if path else math.nan
    return np.array([grey.mean(), math.log(noise + 2e-3), math.log(details / larger_details), math.log1p(step)])


def middle_of(image: np.ndarray) -> np.ndarray:
    """At most MIDDLE pixels along each axis, from the middle of an image (H, W, 3)."""
    top, left = (max(0, (length - MIDDLE) // 2) for length in image.shape[:2])
    return image[top : top + MIDDLE, left : left + MIDDLE]


def quantization_step(path: Path) -> float:
    """The mean quantization step of a JPEG file's brightness; 0 for other formats."""
    with Image.open(path, formats=FORMATS) as image:
        tables = getattr(image, "quantization", None)
    return float(np.mean(next(iter(tables.values())))) if tables else 0.0  # the first one is that of brightness


def usual_of(files: Sequence[Path], shape: tuple[int, int]) -> np.ndarray:
    """What is `usual` among these good images, at this shape (H, W), from at most MEASURED of them: (2, 4)."""
    return usual(np.stack([measured(read_image(path, shape), path) for path in some_of(files)]))


def some_of(files: Sequence[Path]) -> Sequence[Path]:
    """At most MEASURED of these files, evenly spread."""
    return files[:: math.ceil(len(files) / MEASURED)]


def usual(measures: np.ndarray) -> np.ndarray:
    """What is usual among good images with these measures (n, 4): median and robust standard deviation, (2, 4)."""
    middle = np.median(measures, axis=0)
    deviation = np.median(np.abs(measures - middle), axis=0) / 0.6745
    return np.stack([middle, deviation])


def differences(measures: np.ndarray, normal: np.ndarray) -> list[str]:
    """How new images with these measures (n, 4) differ from what is `usual` (2, 4): words such as "blurrier".

    The median of n new images has to differ by 4 / sqrt(n) standard deviations of single images, n at most 4. What is
    not known (NaN) does not differ."""
    middle, deviation = normal
    change = np.median(measures, axis=0) - middle
    deviations = 4 / math.sqrt(min(len(measures), 4))
    words = []
    for (rise, fall, least), by, usual_deviation in zip(MEASURES.values(), change, deviation, strict=True):
        if abs(by) > max(least, deviations * usual_deviation):
            words.append(rise if by > 0 else fall)
    return words


def told(words: list[str], images: int) -> str:
    """A line on the `differences` of new images."""
    which = f"these {images} images are" if images > 1 else "this image is"
    listed = " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    return (
        f"{which} {listed} than the training images: expect more false alarms. Train again with some of them among the "
        "good images, or run --recalibrate with new good images"
    )
