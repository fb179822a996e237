"""What all methods share. A method gives energies; from these come map, score, calibration, verdict, checkpoint.

Shapes: images (B, 3, size, size) in [0, 1]; energies (B, h, w), one array for each scale; maps (B, size, size)."""

import contextlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from kit.errors import InputError
from kit.images import AnyImage, read_any, resized
from kit.verdict import Thresholds, Verdict, judge, thresholds

FORMAT = 4  # of the checkpoint
FALSE_ALARM = 0.02  # default share of good images that may be flagged


def anomaly_map(energies: list[Tensor], levels: Tensor, size: int) -> Tensor:
    """One map (B, size, size) of the scales' energies (B, h, w) and typical normal energies `levels` (S,):

        mean over scales of 1 - exp(min(level - E, 1)), Gaussian-filtered: 0 is typically normal, 1 is certainly not

    exp(-E) is the density per dimension. Bounded, so that no scale outshouts the others and no defect spills over."""
    maps = []
    for e, level in zip(energies, levels, strict=True):
        density = (level - e[:, None]).clamp(max=1).exp()
        maps.append(F.interpolate(1 - density, (size, size), mode="bilinear", antialias=True))
    return smoothed(torch.stack(maps).mean(dim=0), size)[:, 0]


def smoothed(x: Tensor, size: int) -> Tensor:
    """(B, C, H, W), Gaussian-filtered with a standard deviation of size / 128: 2 pixels at 256."""
    sigma = size / 128
    kernel = 2 * round(3 * sigma) + 1
    return gaussian_blur(x, [kernel, kernel], [sigma, sigma])


def image_score(maps: Tensor) -> Tensor:
    """(B, H, W) -> (B,): the mean of a map's highest 1 %; a single high pixel is more often noise than a defect."""
    count = maps[0].numel() // 100
    return maps.flatten(1).topk(count, dim=1).values.mean(dim=1)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether convolutions gain from half the bits there."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # since PyTorch 2.6
        return bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    return False


class Detector(nn.Module):
    """Base of the methods; each adds `energies`, and `prepare` if it has something to fit before training.

    From energies this class makes map and score (`forward`), learns what normal ones look like (`calibrate`), gives
    verdicts (`inspect`), and writes itself to a checkpoint (`save`). `settings` are plain values that the checkpoint
    keeps: the method's options, `size`, and `held_out`, how many normal images calibrate it. Fitted on those: `levels`
    (S,), the scales' median energies, and `normal` (2, held_out), their scores and their maps' maxima."""

    def __init__(self, settings: dict, scales: int):
        super().__init__()
        self.settings = settings
        self.size: int = settings["size"]
        self.full_precision = False  # for export: no bfloat16, whatever this machine gains from it
        self.register_buffer("levels", torch.zeros(scales))
        self.register_buffer("normal", torch.zeros(2, settings["held_out"]))

    def energies(self, images: Tensor) -> list[Tensor]:
        """Energies (B, h, w) of each of S scales; high is anomalous. What a method is."""
        raise NotImplementedError

    def prepare(self, images: Iterable[Tensor], weights: str | None) -> None:
        """Before training: load pretrained `weights` (a file, or None), fit on batches of normal `images`."""

    @property
    def device(self) -> torch.device:
        return self.levels.device

    def autocast(self) -> contextlib.AbstractContextManager:
        """bfloat16 convolutions where the machine gains from them; likelihoods stay in float32."""
        if self.full_precision or not has_fast_bfloat16(self.device):
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Anomaly maps (B, size, size), higher is more anomalous, and scores (B,), each of its image alone."""
        maps = anomaly_map(self.energies(images), self.levels, self.size)
        return maps, image_score(maps)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Learn what held-out normal images look like: `levels` and `normal`."""
        energies = [self.energies(images) for images in batches]
        for scale, parts in enumerate(zip(*energies, strict=True)):
            self.levels[scale] = torch.cat(parts).median()
        found = []
        for batch in energies:
            maps = anomaly_map(batch, self.levels, self.size)
            found.append(torch.stack((image_score(maps), maps.amax(dim=(1, 2)))))
        self.normal = torch.cat(found, dim=1)

    def thresholds(self, false_alarm: float = FALSE_ALARM) -> Thresholds:
        """What a share `false_alarm` of normal images is expected to exceed."""
        return thresholds(self.normal.cpu().numpy(), false_alarm)

    @torch.no_grad()
    def inspect(self, image: AnyImage, false_alarm: float = FALSE_ALARM) -> Verdict:
        """Judge one image: a path, a PIL image, or an array (H, W, 3) or tensor (3, H, W), uint8 in 0..255 or float
        in 0..1. Raises InputError for anything else."""
        small, shape = read_any(image, self.size)
        maps, scores = self(torch.from_numpy(small).permute(2, 0, 1)[None])
        return self.verdict(scores.item(), maps[0].cpu().numpy(), shape, self.thresholds(false_alarm))

    def verdict(self, score: float, heat: np.ndarray, shape: tuple[int, int], limits: Thresholds) -> Verdict:
        """The verdict on an image of `shape` (H, W), from its score and its map (size, size)."""
        height, width = shape
        return judge(score, resized(heat[..., None], width, height)[..., 0], limits)

    def save(self, to: Path, progress: dict | None = None) -> None:
        """Write one self-contained checkpoint; `progress` is what an unfinished training needs besides."""
        torch.save({"format": FORMAT, "settings": self.settings, "state": self.state_dict(), "progress": progress}, to)

    @classmethod
    def restore(cls, checkpoint: dict, device: str = "cpu") -> "Detector":
        """The detector of a checkpoint that `read_checkpoint` read, ready to judge."""
        model = cls(checkpoint["settings"])
        model.load_state_dict(checkpoint["state"])
        return model.to(device).eval()


def read_checkpoint(path: Path | str) -> dict:
    """What `Detector.save` wrote: format, settings, state, progress. Raises InputError if it is missing, is no
    checkpoint, or is that of another version."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        version = int(checkpoint["format"])
    except Exception as error:  # a wrong file can fail in many ways inside the unpickler
        raise InputError(f"{path}: cannot be read as a clflow checkpoint ({error!r:.200})") from error
    if version != FORMAT:
        raise InputError(f"{path}: is of format {version}, and this version reads {FORMAT}; train it again")
    return checkpoint
