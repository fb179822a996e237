"""What all methods share. A method gives energies; from these come map, score, calibration, verdict, checkpoint.

Shapes: images (B, 3, size, size) in [0, 1]; energies (B, h, w), one array for each expert; maps (B, size, size)."""

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from kit.backbone import Backbone
from kit.errors import InputError
from kit.images import AnyImage, read_any, resized
from kit.verdict import Thresholds, Verdict, decide, thresholds

FORMAT = 7  # of the checkpoint
FALSE_ALARM = 0.02  # default share of good images that may be flagged


def anomaly_map(e: Tensor, size: int) -> Tensor:
    """Energies (B, h, w) of single positions -> map (B, size, size), Gaussian-filtered."""
    large = F.interpolate(e[:, None], (size, size), mode="bilinear", antialias=True)
    return smoothed(large, size)[:, 0]


def smoothed(x: Tensor, size: int) -> Tensor:
    """(B, C, H, W), Gaussian-filtered with a standard deviation of size / 128: 2 pixels at 256."""
    sigma = size / 128
    kernel = 2 * round(3 * sigma) + 1
    across = gaussian_blur(x, [kernel, 1], [sigma, sigma])  # one axis after the other takes half the time
    return gaussian_blur(across, [1, kernel], [sigma, sigma])


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


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a detector was made with: plain values, which the checkpoint keeps. These are facts; each method's own class
    adds its options, with their defaults. `size` and `backbone` are among them."""

    method: str
    images: int  # good ones, of which
    held_out: int  # calibrate and are not trained on
    seed: int = 0
    data: str = ""  # the folder they came from
    category: str = ""  # its name
    false_alarm: float = FALSE_ALARM  # where nobody asks for another rate


class Detector(nn.Module):
    """Base of the methods; each adds `energies`, and names the class of its settings.

    From energies this class makes map and score (`forward`), learns what normal ones look like (`calibrate`), gives
    verdicts (`inspect`), and writes itself to a checkpoint (`save`). Fitted on normal images, as if training had not
    seen: `levels` and `units` (S,), the scale of each of S experts' energies, and `normal` (2, n), scores and maps'
    maxima of n of them, which show `different` ones."""

    SETTINGS: type[Settings]

    def __init__(self, settings: Settings, backbone: Backbone | None, experts: int):
        super().__init__()
        self.settings = settings
        self.size: int = settings.size
        self.backbone = backbone
        self.full_precision = False  # for export: no bfloat16, whatever this machine gains from it
        self.register_buffer("levels", torch.zeros(experts))
        self.register_buffer("units", torch.ones(experts))
        self.register_buffer("normal", torch.zeros(2, 1))
        self.register_buffer("different", torch.tensor(1))
        self.register_buffer("halved", torch.tensor(False))  # whether calibrated with half the bits
        self.calibrated_on: list[tuple[Path, Tensor | None]] = []  # file, numbers left out; of this training only

    def energies(self, images: Tensor, without: Tensor | None = None) -> list[Tensor]:
        """Energies (B, h, w) of each of S experts, of images (B, 3, size, size); high is anomalous. What a method is.
        What holds on to single training images does so without those of these numbers (n,)."""
        raise NotImplementedError

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """The frozen backbone's, (B, C, h, w), of images (B, 3, H, W)."""
        with self.autocast():
            return self.backbone.features(images.to(self.device))

    @torch.no_grad()
    def stages(self, images: Tensor) -> list[tuple[str, Tensor]]:
        """For a figure: what happens to one image (1, 3, size, size) on its way to the energies, step by step, as
        (what it is, map (h, w))."""
        return [(f"expert {i}", e[0]) for i, e in enumerate(self.energies(images), start=1)]

    @property
    def device(self) -> torch.device:
        return self.levels.device

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16 where the machine gains from it, for what can bear it."""
        fast = not self.full_precision and has_fast_bfloat16(self.device)
        return torch.bfloat16 if fast else torch.float32

    def autocast(self) -> contextlib.AbstractContextManager:
        """Matrix products and convolutions in `dtype`; likelihoods stay in float32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Anomaly maps (B, size, size), higher is more anomalous, and scores (B,), each of its image alone."""
        maps = self.maps(self.energies(images))
        return maps, image_score(maps)

    def maps(self, energies: list[Tensor]) -> Tensor:
        """Anomaly maps (B, size, size) of the experts' energies, on the common scale that good images gave them:

            mean over experts of (E - level) / unit, Gaussian-filtered

        0 is typically normal, and 1 is as conspicuous as the worst place of a good image usually is."""
        scaled = [(e - level) / unit for e, level, unit in zip(energies, self.levels, self.units, strict=True)]
        return anomaly_map(torch.stack(scaled).mean(dim=0), self.size)

    @torch.no_grad()
    def calibrate(self, energies: Iterable[list[Tensor]], files: Sequence[Path] = ()) -> None:
        """Learn what normal images look like that training has not seen, from their energies, batch by batch:
        `levels`, `units` and `normal`. `files` are these images, if the odd ones among them are to be shown."""
        batches = list(energies)
        for expert, parts in enumerate(zip(*batches, strict=True)):
            level = torch.cat(parts).median()
            worst = torch.cat([image_score(anomaly_map(e, self.size)) for e in parts])
            self.levels[expert] = level
            self.units[expert] = (worst.median() - level).clamp(min=1e-6)  # an odd image must not change the scale
        self.normal = torch.cat([self.scores(energies) for energies in batches], dim=1)
        self.different = torch.tensor(self.normal.shape[1], device=self.device)
        self.calibrated_on = [(path, None) for path in files]
        self.halved = torch.tensor(self.dtype != torch.float32, device=self.device)

    def scores(self, energies: list[Tensor]) -> Tensor:
        """(2, B): scores, and maps' maxima, of the experts' energies."""
        maps = self.maps(energies)
        return torch.stack((image_score(maps), maps.amax(dim=(1, 2))))

    def thresholds(self, false_alarm: float | None = None) -> Thresholds:
        """What a share `false_alarm` of normal images is expected to exceed."""
        return thresholds(self.normal.cpu().numpy(), false_alarm or self.settings.false_alarm, int(self.different))

    @torch.no_grad()
    def inspect(self, image: AnyImage, false_alarm: float | None = None) -> Verdict:
        """Judge one image: a path, a PIL image, or an array (H, W, 3) or tensor (3, H, W), uint8 in 0..255,
        uint16 in 0..65535, or float in 0..1. Raises InputError for anything else."""
        small, shape = read_any(image, self.size)
        maps, scores = self(torch.from_numpy(small).permute(2, 0, 1)[None])
        return self.verdict(scores.item(), maps[0].cpu().numpy(), shape, self.thresholds(false_alarm))

    def verdict(self, score: float, heat: np.ndarray, shape: tuple[int, int], limits: Thresholds) -> Verdict:
        """The verdict on an image of `shape` (H, W), from its score and its map (size, size)."""
        height, width = shape
        return decide(score, resized(heat[..., None], width, height)[..., 0], limits)

    def save(self, to: Path, progress: dict | None = None) -> None:
        """Write one self-contained checkpoint; `progress` is what an unfinished training needs besides."""
        settings = asdict(self.settings)
        torch.save({"format": FORMAT, "settings": settings, "state": self.state_dict(), "progress": progress}, to)

    @classmethod
    def restore(cls, checkpoint: dict, device: str = "cpu") -> "Detector":
        """The detector of a checkpoint that `read_checkpoint` read, ready to judge."""
        model = cls(cls.SETTINGS(**checkpoint["settings"]))
        model.normal = checkpoint["state"]["normal"].clone()  # its length is that of the calibration
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
