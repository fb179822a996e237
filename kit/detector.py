"""The part that all methods share. A method gives energies; from these come map, score, calibration, verdict,
checkpoint.

Shapes: images (B, 3, H, W) in [0, 1], with the detector's H x W; energies (B, h, w), one array per expert; maps
(B, H, W)."""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from kit import InputError, camera, quantized
from kit.backbone import Backbone
from kit.images import AnyImage, read_any, resized, to_tensor
from kit.settings import Settings, Shape, as_shape
from kit.verdict import Thresholds, Verdict, decide, robust_deviation, thresholds
from kit.windows import SIDE, in_windows, overlapping_parts, side_of

FORMAT = 17  # of the checkpoint
PART = 512  # positions along an axis that are weighted at once, to save memory
LEAST_SPAN = 32  # pixels along each axis, which the filters of kit/camera.py need
USUAL_CHANGE = 0.1  # of the logarithm of an image's brightness; smaller changes are never compensated


def anomaly_map(e: Tensor, shape: Shape) -> Tensor:
    """Energies (B, h, w) of single positions -> map (B, *shape), interpolated and Gaussian-filtered. This is linear
    along each axis: two matrix products take a fifth of the time of filters."""
    sigma = side_of(math.prod(shape)) / 128
    lines = along_rows(e.transpose(1, 2), shape[0], sigma).transpose(1, 2)
    return along_rows(lines, shape[1], sigma)


def along_rows(e: Tensor, length: int, sigma: float) -> Tensor:
    """Energies (B, n, positions), interpolated and Gaussian-filtered along the last axis: (B, n, length). A long axis
    is divided into parts with a margin, so that the memory for weights does not grow with the image."""
    positions = e.shape[2]
    if positions <= PART or length % positions:  # parts need a whole number of pixels per position
        return e @ weights_along(positions, length, sigma, e.device).T
    stride = length // positions
    beside = math.ceil((3 * sigma + 1) / stride) + 1
    parts = []
    for start in range(0, positions, PART):
        stop = min(start + PART, positions)
        first, last = max(0, start - beside), min(stop + beside, positions)
        weights = weights_along(last - first, (last - first) * stride, sigma, e.device)
        inner = weights[(start - first) * stride : (stop - first) * stride]
        parts.append(e[..., first:last] @ inner.T)
    return torch.cat(parts, dim=2)


def weights_along(positions: int, length: int, sigma: float, device: torch.device) -> Tensor:
    """The weight of each position of a map in each pixel of an image, along one axis: (length, positions). It combines
    the interpolation and a Gaussian with a standard deviation of `sigma` pixels."""
    single = torch.eye(positions, device=device)[None, None]
    large = F.interpolate(single, (length, positions), mode="bilinear", antialias=True)
    kernel = 2 * round(3 * sigma) + 1
    return gaussian_blur(large, [1, kernel], [sigma, sigma])[0, 0]


def image_score(maps: Tensor, pixels: int | None = None) -> Tensor:
    """Scores (B,) of maps (B, H, W): the mean of the highest 1 % of pixels. `pixels` is how many count (default: all).
    At most SIDE x SIDE of them set the 1 %. An image with more than twice SIDE x SIDE pixels gets the highest such mean
    of its overlapping parts: in the whole image a small defect would be lost. The maximum alone would often be
    noise."""
    count = max(1, int(side_of(pixels or maps[0].numel()) ** 2 / 100 + 1e-6))
    scores = [
        maps[:, rows, columns].flatten(1).topk(count, dim=1).values.mean(dim=1)
        for rows, columns in overlapping_parts(maps.shape[1:], SIDE)
    ]
    return torch.stack(scores).amax(dim=0)


def span(marked: Tensor) -> slice:
    """The part of an axis from the first to the last of the `marked` positions (n,) bool, at least LEAST_SPAN long."""
    positions = marked.nonzero()[:, 0]
    first = max(0, min(int(positions[0]), len(marked) - LEAST_SPAN))
    return slice(first, max(int(positions[-1]) + 1, first + LEAST_SPAN))


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether convolutions are faster in bfloat16 on this device."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # since PyTorch 2.6
        # AMX has matrix units. An AMD EPYC with avx512_bf16 takes half the time of float32. A Xeon with avx512_bf16 but
        # without AMX took 1.6 times as long.
        found = torch.cpu.get_capabilities()
        is_amd = "AMD" in found.get("cpu_name", "")
        return bool(found.get("amx_bf16") or (is_amd and found.get("avx512_bf16")))
    return False


class Detector(nn.Module):
    """Base class of the methods. Each adds `energies`, and names the class of its settings.

    This class turns energies into map and score (`forward`), calibrates them on good images (`calibrate`), gives
    verdicts (`inspect`), and saves itself to a checkpoint (`save`). The calibration holds `levels` and `units` (S,),
    the scale of the energies of each of S experts, and `good_scores` (2, n), the scores and the maps' maxima of n
    normal images, each judged as if it were new; they count as `different` images. `camera` (2, 8) is what is usual in
    light, contrast, noise, sharpness, colour and compression of good images (see kit/camera.py). Maps and scores of
    images that differ from it are divided by one of the `allowances` (2,): for another camera, and for light from
    another side. They are 1 if a method does not learn from camera copies. `brightness` (3,) is the usual brightness of
    the training images (see `learn_brightness`). Only the region of interest `roi` (H, W) counts."""

    SETTINGS: type[Settings]
    LEARNS_CAMERA_COPIES = False  # whether camera copies of good images are normal in training
    MOST_PIXELS: int | None = None  # of an image; None: large images are processed in windows

    def __init__(self, settings: Settings, backbone: Backbone, shares: list[float]):
        super().__init__()
        self.settings = settings
        self.shape = as_shape(settings.size)
        self.backbone = backbone
        self.register_buffer("roi", torch.ones(self.shape, dtype=torch.bool))
        self.is_precision_told = False  # whether `precision_warning` was shown
        self.full_precision = False  # for export: float32, even where bfloat16 is faster
        self.shares = shares  # of each expert in the map
        self.register_buffer("levels", torch.zeros(len(shares)))
        self.register_buffer("units", torch.ones(len(shares)))
        self.register_buffer("good_scores", torch.zeros(2, 1))
        self.register_buffer("different", torch.tensor(1))
        self.register_buffer("allowances", torch.ones(2))
        self.register_buffer("camera", torch.full((2, len(camera.MEASURES)), torch.nan))
        self.register_buffer("brightness", torch.full((3,), torch.nan))
        self.register_buffer("halved", torch.tensor(False))  # whether calibrated in bfloat16
        self.calibrated_on: list[tuple[Path, Tensor | None]] = []  # file, images left out; of this training only
        self.set_roi(self.roi)

    def energies(self, images: Tensor, excluded: Tensor | None = None) -> list[Tensor]:
        """The energies (B, h, w) of each of S experts, for images (B, 3, ...) of any shape; high is anomalous. This
        defines a method. Whatever a method stores of the training images with the indices `excluded` (n,) must not
        count."""
        raise NotImplementedError

    @torch.no_grad()
    def energies_in_windows(self, images: Tensor, excluded: Tensor | None = None) -> list[Tensor]:
        """`energies` of images in usual brightness; for large images in overlapping windows, so that memory does not
        grow with the image."""
        return self.in_windows(lambda part: self.energies(part, excluded), self.in_usual_brightness(images))

    def in_windows(self, function: Callable[[Tensor], list[Tensor]], images: Tensor) -> list[Tensor]:
        """`function` of images, in windows; it must not look farther around a position than the backbone does."""
        return in_windows(function, images, self.backbone.stride, self.backbone.reach)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """The features (B, C, h, w) of the frozen backbone, for images (B, 3, ...) of any shape."""
        images = images.to(self.device)
        with self.autocast():
            (found,) = self.in_windows(lambda part: [self.backbone.features(part)], images)
        return found

    def inner_mean(self, images: Tensor) -> Tensor:
        """The mean of each image's pixels in the region of interest, (B, 1, 1, 1)."""
        return (images.mean(dim=1) * (self.roi / self.roi.sum())).sum(dim=(1, 2))[:, None, None, None]

    def inner_deviation(self, images: Tensor, mean: Tensor) -> Tensor:
        """The standard deviation of each image's pixels in the region of interest, (B, 1, 1, 1)."""
        return self.inner_mean((images - mean).square()).sqrt()

    def brightness_of(self, images: Tensor) -> Tensor:
        """Mean and standard deviation of each image's pixels in the region of interest: (2, B)."""
        images = images.to(self.device)
        mean = self.inner_mean(images)
        return torch.stack((mean, self.inner_deviation(images, mean))).flatten(1)

    def learn_brightness(self, found: Tensor) -> None:
        """Set `brightness` from `brightness_of` n good images, (2, n): the median of the means, that of the standard
        deviations, and the greatest usual change of the mean's logarithm (four robust standard deviations)."""
        mean, deviation = found.median(dim=1).values
        limit = max(USUAL_CHANGE, camera.DEVIATIONS * robust_deviation(found[0].log().cpu().numpy()))
        self.brightness = torch.stack((mean, deviation, mean.new_tensor(limit)))

    def in_usual_brightness(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W). Unusually bright or dark ones get the usual mean and standard deviation, so that a lamp
        that is weaker does not make each part anomalous. Others stay as they are."""
        images = images.to(self.device)
        usual_mean, usual_deviation, limit = self.brightness
        mean = self.inner_mean(images)
        is_unusual = (mean / usual_mean).log().abs() > limit  # False for NaN, as long as nothing is known
        if not torch.compiler.is_compiling() and not is_unusual.any():
            return images
        deviation = self.inner_deviation(images, mean).clamp(min=1e-3)
        changed = usual_mean + (images - mean) * usual_deviation / deviation
        return torch.where(is_unusual, changed.clamp(0, 1), images)

    def measures(self, images: Tensor) -> Tensor:
        """`camera.measures` of images (B, 3, H, W) within the region of interest: (B, 7)."""
        images = images.to(self.device)
        if self.pixels < math.prod(self.shape):
            rows, columns = self.roi_part
            images = torch.where(self.roi, images, self.inner_mean(images))[:, :, rows, columns]
        return camera.measures(images, self.pixels / math.prod(images.shape[2:]))

    def set_roi(self, roi: Tensor) -> None:
        """Let only the region of interest (H, W) bool count."""
        self.roi = roi.to(self.device)
        self.pixels = int(roi.sum())
        # The rows and columns of an image that contain the region.
        self.roi_part = span(roi.any(dim=1)), span(roi.any(dim=0))

    def inside(self, shape: Shape) -> Tensor:
        """Which positions of maps of this shape (h, w) the region of interest touches: (h, w) bool."""
        return F.interpolate(self.roi.float()[None, None], shape, mode="area")[0, 0] > 0

    @property
    def device(self) -> torch.device:
        return self.levels.device

    def for_export(self) -> None:
        """Compute in float32 from now on, even where bfloat16 or int8 is faster."""
        self.full_precision = True
        if self.backbone.has_int8:
            self.backbone.round_for_export()

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16 where it is faster, for the parts that tolerate it; else float32."""
        fast = not self.full_precision and has_fast_bfloat16(self.device)
        return torch.bfloat16 if fast else torch.float32

    def autocast(self) -> contextlib.AbstractContextManager:
        """Matrix products and convolutions in `dtype`; likelihoods stay in float32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def precision_warning(self) -> str:
        """One line if the detector judges in another precision than that of its calibration; else ""."""
        if self.backbone.has_int8 and not quantized.IS_AVAILABLE:
            return (
                "the threshold comes from features in int8, but this version of PyTorch has no torch.ao.quantization: "
                "scores can be off by a few hundredths. Calibrate on this machine: --recalibrate FOLDER with new good "
                "images, or train again"
            )
        judges_halved = self.dtype != torch.float32
        if judges_halved == bool(self.halved):
            return ""
        names = {True: "bfloat16", False: "float32"}
        return (
            f"the threshold comes from scores in {names[bool(self.halved)]}, but this machine judges in "
            f"{names[judges_halved]}: scores can be off by a few hundredths. On this machine, set a new threshold with "
            "--recalibrate FOLDER (a folder of new good images), or train again"
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Anomaly maps (B, H, W), higher is more anomalous, and scores (B,). Images do not influence each other."""
        maps = self.maps(self.energies_in_windows(images)) / self.allowance_of(images)
        return maps, self.score(maps)

    def allowance_of(self, images: Tensor) -> Tensor:
        """The higher one of the `allowances` for what is unusual in images (B, 3, H, W), and 1 for usual images:
        (B, 1, 1). So it costs no sensitivity where light and camera are the usual ones."""
        images = images.to(self.device)
        if not torch.compiler.is_compiling() and (self.allowances == 1).all():
            return images.new_ones(len(images), 1, 1)
        is_unusual = camera.are_unusual(self.measures(images), self.camera)
        return self.highest_allowance(is_unusual)[:, None, None]

    def highest_allowance(self, is_unusual: Tensor) -> Tensor:
        """The highest of the `allowances` for what is unusual, (B, 2) bool; 1 if nothing is: (B,)."""
        return torch.where(is_unusual, self.allowances, 1.0).amax(dim=1)

    def maps(self, energies: list[Tensor]) -> Tensor:
        """Anomaly maps (B, H, W) of the experts' energies, on the common scale that the calibration set:

            sum over experts of share (E - level) / unit, Gaussian-filtered

        0 is a typical normal position; the area outside the region of interest is 0, too. For each expert, 1 is the
        median score of good images: the mean of their highest 1 %."""
        parts = zip(energies, self.levels, self.units, self.shares, strict=True)
        scaled = [share * (e - level) / unit for e, level, unit, share in parts]
        return self.map_within(torch.stack(scaled).sum(dim=0), outside=0)

    def map_within(self, e: Tensor, outside: float | Tensor) -> Tensor:
        """`anomaly_map` of energies; outside the region of interest they are replaced by `outside`."""
        if self.pixels == math.prod(self.shape):
            return anomaly_map(e, self.shape)
        is_inside = self.inside(e.shape[1:])
        return torch.where(self.roi, anomaly_map(torch.where(is_inside, e, outside), self.shape), outside)

    def score(self, maps: Tensor) -> Tensor:
        """Scores (B,) of maps (B, H, W), which are typically normal outside the region of interest."""
        return image_score(maps, self.pixels)

    @torch.no_grad()
    def calibrate(self, energies: Iterable[list[Tensor]], files: Sequence[Path] = ()) -> None:
        """Set `levels`, `units` and `good_scores` from the energies, batch by batch, of good images that training has
        not seen. `files` are these images, needed only to show the outliers among them."""
        batches = list(energies)
        for expert, parts in enumerate(zip(*batches, strict=True)):
            level = torch.cat(parts)[:, self.inside(parts[0].shape[1:])].median()
            worst = torch.cat([self.score(self.map_within(e, level)) for e in parts])
            self.levels[expert] = level
            self.units[expert] = (worst.median() - level).clamp(min=1e-6)  # an outlier must not change the scale
        self.good_scores = torch.cat([self.scores(energies) for energies in batches], dim=1)
        self.different = torch.tensor(self.good_scores.shape[1], device=self.device)
        self.allowances.fill_(1)
        self.calibrated_on = [(path, None) for path in files]
        self.halved = torch.tensor(self.dtype != torch.float32, device=self.device)

    def scores(self, energies: list[Tensor]) -> Tensor:
        """(2, B): the scores and the maps' maxima that follow from the experts' energies."""
        maps = self.maps(energies)
        return torch.stack((self.score(maps), maps.amax(dim=(1, 2))))

    def thresholds(self, false_alarm: float | None = None) -> Thresholds:
        """The thresholds that a share `false_alarm` of good images is expected to exceed. Raises InputError for a
        share that is not between 0 and 1."""
        rate = self.settings.false_alarm if false_alarm is None else false_alarm
        if not 0 < rate < 1:
            raise InputError(f"false_alarm={rate}: out of range; give a share between 0 and 1")
        return thresholds(self.good_scores.cpu().numpy(), rate, int(self.different))

    @torch.no_grad()
    def inspect(self, image: AnyImage, false_alarm: float | None = None) -> Verdict:
        """Judge one image: a path, a PIL image, or an RGB array (H, W, 3) or tensor (3, H, W), uint8 in 0..255,
        uint16 in 0..65535, or float in 0..1. OpenCV's arrays are BGR: pass `image[..., ::-1]`. Raises InputError for
        anything else. Warns once if the threshold was calibrated in another precision (see `precision_warning`)."""
        if not self.is_precision_told and (line := self.precision_warning()):
            warnings.warn(line, stacklevel=2)
            self.is_precision_told = True
        small, shape = read_any(image, self.shape)
        maps, scores = self(to_tensor(small[None]))
        return self.verdict(scores.item(), maps[0].cpu().numpy(), shape, self.thresholds(false_alarm))

    def verdict(self, score: float, anomaly_map: np.ndarray, shape: tuple[int, int], limits: Thresholds) -> Verdict:
        """The verdict on an image of `shape`, from its score and its map."""
        return decide(score, resized(anomaly_map[..., None], *shape)[..., 0], limits)

    def save(self, to: Path, progress: dict | None = None) -> None:
        """Write one self-contained checkpoint; `progress` is the additional state of an unfinished training."""
        settings = asdict(self.settings)
        torch.save({"format": FORMAT, "settings": settings, "state": self.state_dict(), "progress": progress}, to)

    @classmethod
    def restore(cls, checkpoint: dict, device: str = "cpu") -> "Detector":
        """The detector of a checkpoint that `read_checkpoint` read, ready to judge."""
        model = cls(cls.SETTINGS(**checkpoint["settings"]))
        for name, buffer in model.named_buffers():
            if name in checkpoint["state"]:  # training decides the lengths of the bank and the calibration
                buffer.resize_(checkpoint["state"][name].shape)
        model.load_state_dict(checkpoint["state"])
        model.set_roi(model.roi)
        return model.to(device).eval()


def read_checkpoint(path: Path | str) -> dict:
    """Read a file of `Detector.save`: format, settings, state, progress. Raises InputError if it is missing, is not a
    checkpoint, or comes from another version."""
    if not Path(path).is_file():
        remedy = "train.py writes a detector to runs/<name>/model.pt"
        folder = Path(path).parent
        runs = sorted(folder.glob("*/model.pt")) or sorted(folder.glob("*/seed*/model.pt"))
        if runs:  # a folder of runs was given
            remedy = f"give one of the runs in this folder, for example {runs[0].parent}"
        raise InputError(f"{path}: no such file; {remedy}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        version = int(checkpoint["format"])
    except Exception as error:  # a wrong file can fail in many ways inside the unpickler
        raise InputError(
            f"{path}: cannot be read as a clflow checkpoint ({type(error).__name__}); give the model.pt of a training"
        ) from error
    if version != FORMAT:
        raise InputError(f"{path}: has format {version}, but this version reads format {FORMAT}; train it again")
    return checkpoint
