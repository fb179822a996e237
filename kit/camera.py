"""What a camera changes in an image, and not the part: light, noise, sharpness, compression. `learn_usual` measures the
training images, and `differences` names what is different in new images. Images are numpy arrays (H, W, 3) float32 RGB
in [0, 1]."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from kit.detector import Detector
from kit.good import camera_copy
from kit.images import load_image, named, read_image, to_tensor
from kit.verdict import robust_deviation

MIDDLE = 1024  # pixels a side that are measured
COPIES = 30  # camera copies of held-out images, on which the threshold is tested
MEASURED = 50  # good images at most, to find the usual measures

# For each measure: the word for a rise, the word for a fall, and the smallest change that is reported.
MEASURES = {
    "light": ("brighter", "darker", 0.05),  # mean of all pixels
    "noise": ("noisier", "less noisy", 0.2),  # logarithm of the standard deviation
    "sharpness": ("sharper", "blurrier", 0.15),  # logarithm of a ratio of contrasts
    "compression": ("more strongly compressed", "less compressed", 0.5),  # logarithm of 1 + quantization step
}


def measured(image: np.ndarray, step: float = math.nan) -> np.ndarray:
    """MEASURES of an image (H, W, 3), as the detector sees it: (4,).

    Noise is the median response of a Laplacian filter, after Immerkaer (1996). Sharpness compares the strongest details
    of one pixel with those of two. `step` is the `quantization_step` of its file, NaN if that is unknown. Of a large
    image only the middle counts."""
    grey = middle_of(image).mean(axis=2)
    kernel = np.float32([[1, -2, 1], [-2, 4, -2], [1, -2, 1]])
    response = np.abs(ndimage.convolve(grey, kernel))
    noise = np.median(response) / (6 * 0.6745)
    fine = ndimage.gaussian_filter(grey, 1.0)
    coarse = ndimage.gaussian_filter(grey, 2.0)
    details = np.quantile(np.abs(grey - fine), 0.99) + 1e-4
    larger_details = np.quantile(np.abs(fine - coarse), 0.99) + 1e-4
    return np.array([grey.mean(), math.log(noise + 2e-3), math.log(details / larger_details), math.log1p(step)])


def middle_of(image: np.ndarray) -> np.ndarray:
    """At most MIDDLE pixels along each axis, from the middle of an image (H, W, 3)."""
    top, left = (max(0, (length - MIDDLE) // 2) for length in image.shape[:2])
    return image[top : top + MIDDLE, left : left + MIDDLE]


def quantization_step(image: Image.Image) -> float:
    """The mean quantization step of brightness in the JPEG file that this image was read from; 0 for other formats.
    Pillow keeps the tables until the image is changed, for example turned."""
    tables = getattr(image, "quantization", None)
    return float(np.mean(next(iter(tables.values())))) if tables else 0.0  # the first one is that of brightness


def measured_files(files: Sequence[Path], shape: tuple[int, int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For at most MEASURED of these files, evenly spread: the pixels in this shape (H, W, 3), and their MEASURES."""
    for path in files[:: math.ceil(len(files) / MEASURED)]:
        image = load_image(path)
        pixels = named(path, image, shape)
        yield pixels, measured(pixels, quantization_step(image))


def usual(measures: np.ndarray) -> np.ndarray:
    """What is usual among good images with these measures (n, 4): median and robust standard deviation, (2, 4)."""
    return np.stack([np.median(measures, axis=0), robust_deviation(measures)])


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


def learn_usual(model: Detector, files: Sequence[Path]) -> None:
    """Set what is usual in the training images: `camera` and `brightness` of the model, from some of these files."""
    measures, brightness = [], []
    for pixels, measures_of_one in measured_files(files, model.shape):
        measures.append(measures_of_one)
        brightness.append(model.brightness_of(to_tensor(pixels[None])))
    model.camera = torch.from_numpy(usual(np.stack(measures))).to(model.camera)
    model.learn_brightness(torch.cat(brightness, dim=1))


# ---------------------------------------------------------------- the threshold, tried on camera copies


@torch.no_grad()
def judge_camera_copies(model: Detector, files: Sequence[Path]) -> None:
    """Judge COPIES camera copies of these held-out images. If the method learns from camera copies, they raise the
    threshold where this is needed. Prints lines on this, and on how many copies exceed the threshold."""
    columns = []
    for number in range(COPIES):
        rng = np.random.default_rng([model.settings.seed, number])
        copy = camera_copy(read_image(files[number % len(files)], model.shape), rng)
        columns.append(model.scores(model.energies_in_windows(to_tensor(copy[None]))))
    copies = torch.cat(columns, dim=1)
    before = model.thresholds().score
    if model.LEARNS_CAMERA_COPIES:
        model.copies = copies
    limit = model.thresholds().score
    what = "slightly blurred, noisy or compressed copies of held-out good images"
    if limit > before:
        print(f"{what} raise the threshold from {before:.3f} to {limit:.3f}")
    print(f"false alarms on {what}: {int((copies[0] > limit).sum())} of {COPIES}")
