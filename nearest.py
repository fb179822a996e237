"""PatchCore (Roth et al., arXiv 2106.08265), the honest rival: a bank of normal features, and how far an image's
features are from it. Nothing is trained. What a flow learns has to beat this.

Shapes: images (B, 3, size, size) in [0, 1]; rows (N, C): one feature for each position of each image,
at stride 8."""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from kit.backbone import Backbone, as_rows, averaged
from kit.detector import Detector

CANDIDATES = 100_000  # rows at most, spread over all images, from which the bank is chosen: 150 MB with ResNet18
SKETCH = 64  # random directions in which the bank is chosen
NEIGHBOURS = 5  # of a bank vector, whose mean distance is the spacing there
CHUNK = 4096  # bank vectors whose distances to the bank are held at once


class Nearest(Detector):
    """The detector: E = d / spacing, d the distance of a position's feature to the nearest one in the bank.

    With `local`, spacing is that of the bank there: the mean distance of the nearest vector to its own 5 nearest (after
    REB, arXiv 2308.12577). Features of a busy kind lie far apart, those of a smooth kind close together, and one scale
    for all drowns the defects of the second in the noise of the first. Without, it is the bank's mean spacing, which is
    PatchCore's distance, up to a factor."""

    def __init__(self, settings: dict):
        backbone = Backbone(settings["backbone"])
        super().__init__(settings, scales=1)
        self.backbone = backbone
        channels = sum(backbone.channels()[1:])
        images = settings["images"] - settings["held_out"]
        vectors = min(settings["bank"], CANDIDATES, images * math.ceil(self.size / 8) ** 2)
        self.register_buffer("bank", torch.zeros(vectors, channels))
        self.register_buffer("spacing", torch.ones(vectors))
        self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(B, C, h, w): strides 8 and 16, each averaged with its neighbours, joined at stride 8."""
        with self.autocast():
            _, fine, coarse = self.backbone(images.to(self.device))
        fine = averaged(fine)
        coarse = F.interpolate(averaged(coarse), fine.shape[2:], mode="bilinear")
        return torch.cat((fine, coarse), dim=1)

    @torch.no_grad()
    def energies(self, images: Tensor) -> list[Tensor]:
        """[E], E (B, h, w)."""
        x = self.features(images)
        lines = []
        for line in x.unbind(dim=2):  # one line of the map at a time, (B, C, w): all distances at once fill the memory
            distance, index = nearest(line.mT.flatten(0, 1), self.bank, 1)
            spacing = self.spacing[index] if self.settings["local"] else self.spacing.mean()
            lines.append((distance / spacing).view(x.shape[0], -1))
        return [torch.stack(lines, dim=1)]

    @torch.no_grad()
    def prepare(self, images: Iterable[Tensor], weights: str | None) -> None:
        """Load the backbone's ImageNet weights; choose the bank from the features of normal images."""
        self.backbone.load_imagenet(weights)
        generator = torch.Generator().manual_seed(self.settings["seed"])
        per_image = math.ceil(CANDIDATES / (self.settings["images"] - self.settings["held_out"]))
        parts = []
        for batch in images:
            for x in self.features(batch):
                rows = as_rows(x[None])
                parts.append(rows[torch.randperm(len(rows), generator=generator)[:per_image]])
        rows = torch.cat(parts)
        chosen = covering(rows, len(self.bank), generator)
        self.bank.copy_(rows[chosen])
        parts = [nearest(part, self.bank, 1 + NEIGHBOURS)[0] for part in self.bank.split(CHUNK)]
        spacing = torch.cat(parts)[:, 1:].mean(dim=1)  # without the nearest one, which is the vector itself
        self.spacing.copy_(spacing.clamp(min=1e-3 * float(spacing.mean())))  # equal vectors: no division by zero


def nearest(rows: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Distances of rows (N, C) to their k nearest in the bank (M, C), and which these are: both (N, k), the nearest
    first."""
    found = torch.cdist(rows, bank).topk(k, dim=1, largest=False)
    return found.values, found.indices


def covering(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """PatchCore's coreset: which `count` of rows (N, C) cover them. Greedy: the next one is always the row that is
    farthest from all that are chosen, in a few random directions (which keep distances, Johnson and Lindenstrauss)."""
    directions = torch.randn(rows.shape[1], SKETCH, generator=generator).to(rows) / math.sqrt(SKETCH)
    sketch = rows @ directions
    chosen = [0]
    distance = torch.full((len(rows),), torch.inf, device=rows.device)  # squared, to the nearest chosen row
    for _ in range(count - 1):
        distance = torch.minimum(distance, (sketch - sketch[chosen[-1]]).square().sum(dim=1))
        chosen.append(int(distance.argmax()))
    return torch.tensor(chosen, device=rows.device)
