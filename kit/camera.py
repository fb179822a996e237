"""What a camera changes in an image, and not the part: light, noise, sharpness, colour and compression."""

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import center_crop

from kit.verdict import robust_deviation

MIDDLE = 1024  # pixels a side that are measured
DEVIATIONS = 4  # robust standard deviations of good images; a single image that differs by more is unusual

# For each measure: the word for a rise, the word for a fall, and the smallest change that counts.
MEASURES = {
    "light": ("brighter", "darker", 0.1),  # logarithm of the mean of all pixels
    "light across": ("brighter on the right", "brighter on the left", 0.05),  # logarithm of the ratio of both halves
    "light along": ("brighter at the bottom", "brighter at the top", 0.05),
    "contrast": ("of higher contrast", "of lower contrast", 0.05),  # logarithm of the standard deviation
    "noise": ("noisier", "less noisy", 0.2),  # logarithm of its standard deviation
    "sharpness": ("sharper", "blurrier", 0.15),  # logarithm of a ratio of contrasts
    "colour": ("redder", "bluer", 0.05),  # logarithm of the ratio of red and blue
    "compression": ("more strongly compressed", "less compressed", 0.5),  # logarithm of 1 + quantization step
}
LEAST_CHANGE = [least for _, _, least in MEASURES.values()]


def measures(images: Tensor, inside: float = 1.0) -> Tensor:
    """All MEASURES but compression, of images (B, 3, H, W) in [0, 1]: (B, 7). `inside` is the share of pixels in
    the region of interest; the others must have one value.

    Noise is the median response of a Laplacian filter, after Immerkaer (1996). Sharpness compares the strongest details
    of one pixel with those of two: differences of binomial filters. Of a large image only the middle counts."""
    images = center_crop(images, [min(side, MIDDLE) for side in images.shape[2:]])
    red, green, blue = images.unbind(dim=1)
    grey = (red + green + blue) / 3
    noise = value_above(filtered(grey, (1, -2, 1)).abs(), 0.5 * inside) / (6 * 0.6745)
    fine = filtered(grey, (0.25, 0.5, 0.25))
    coarse = filtered(fine, (0.25, 0.5, 0.25), step=2)
    details = value_above((grey[:, 1:-1, 1:-1] - fine).abs(), 0.01 * inside) + 1e-4
    larger_details = value_above((fine[:, 2:-2, 2:-2] - coarse).abs(), 0.01 * inside) + 1e-4
    left, right = grey.chunk(2, dim=2)
    top, bottom = grey.chunk(2, dim=1)
    variance = grey.square().mean(dim=(1, 2)) - grey.mean(dim=(1, 2)).square()
    found = [
        mean_of(grey).log(),
        (mean_of(right) / mean_of(left)).log(),
        (mean_of(bottom) / mean_of(top)).log(),
        (variance.clamp(min=0).sqrt() + 0.01).log(),
        (noise + 2e-3).log(),
        (details / larger_details).log(),
        (mean_of(red) / mean_of(blue)).log(),
    ]
    return torch.stack(found, dim=1)


def mean_of(values: Tensor) -> Tensor:
    """The mean of values (B, H, W), and a little more, so that it has a logarithm: (B,)."""
    return values.mean(dim=(1, 2)) + 0.01


def filtered(images: Tensor, weights: tuple[float, float, float], step: int = 1) -> Tensor:
    """Images (B, H, W) after a filter with these three weights along both axes, at pixels `step` apart: (B, H - 2 step,
    W - 2 step). For one channel, slices are faster than a convolution."""
    for _ in range(2):
        before, here, after = images[:, : -2 * step], images[:, step:-step], images[:, 2 * step :]
        images = (weights[0] * before + weights[1] * here + weights[2] * after).transpose(1, 2)
    return images


def value_above(values: Tensor, share: float) -> Tensor:
    """The value that a `share` of values (B, H, W) exceeds: (B,). Every fourth pixel is enough. `topk`, unlike
    `quantile`, can be exported to all formats."""
    some = values[:, ::2, ::2].flatten(1)
    highest = some.topk(max(1, round(share * some.shape[1])), dim=1, sorted=False)
    return highest.values.amin(dim=1)


def with_compression(found: Tensor, step: float) -> np.ndarray:
    """All MEASURES (8,) of an image, from its other `measures` (1, 7) and the `quantization_step` of its file; NaN if
    that is unknown."""
    return np.append(found[0].cpu().numpy(), np.float32(math.log1p(step)))


def quantization_step(image: Image.Image) -> float:
    """The mean quantization step of brightness in the JPEG file that this image was read from; 0 for other formats.
    Pillow keeps the tables until the image is changed, for example turned."""
    tables = getattr(image, "quantization", None)
    return float(np.mean(next(iter(tables.values())))) if tables else 0.0  # the first one is that of brightness


def usual(measures: np.ndarray) -> np.ndarray:
    """What is usual among good images with these measures (n, 8): median and robust standard deviation, (2, 8)."""
    return np.stack([np.median(measures, axis=0), robust_deviation(measures)])


def are_unusual(found: Tensor, normal: Tensor) -> Tensor:
    """Whether images with these `measures` (B, 7) differ from what is `usual` (2, 8), each by itself: (B, 2) bool. The
    first column is for the camera and the light as a whole, the second for light from another side. False for what is
    not known (NaN). Compression, which is not in the pixels, does not count."""
    middle, deviation = normal[:, : found.shape[1]]
    limit = torch.maximum(DEVIATIONS * deviation, found.new_tensor(LEAST_CHANGE[: found.shape[1]]))
    light, across, along, *others = ((found - middle).abs() > limit).unbind(dim=1)
    camera = torch.stack((light, *others)).any(dim=0)
    return torch.stack((camera, across | along), dim=1)
