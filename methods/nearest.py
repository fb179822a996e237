"""The nearest neighbour, the baseline: the distance of an image's features to the bank of prototypes, divided by the
bank's local spacing. Nothing is trained. CL-Flow has the same kind of bank, and rows of camera copies in it; its flow
and classifier have to beat this. With one scale for all (--no-local) it is PatchCore's distance (arXiv 2106.08265),
without its reweighting of the image score."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from bank import Prototypes
from kit import data
from kit.backbone import BACKBONES, as_rows
from kit.calibration import FOLDS, CrossValidation, alike_in_order, calibrate_on
from kit.detector import Detector
from kit.good import GoodImages
from kit.processes import counted
from kit.rows import origins, spread
from kit.search import CANDIDATES, prototype_count, search_parts
from kit.settings import NearestSettings
from kit.training import Epoch
from kit.windows import at_once


class Nearest(Detector):
    """The detector: E = d / spacing, where d is the distance of a position's feature to the nearest prototype.

    With `local`, it is the spacing of this prototype. Without, it is the mean spacing of the bank, which gives
    PatchCore's distance, up to a factor."""

    SETTINGS = NearestSettings

    def __init__(self, settings: NearestSettings):
        backbone = BACKBONES[settings.backbone]()
        super().__init__(settings, backbone, [1.0])
        self.prototypes = Prototypes(backbone.channels)
        self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def energies(self, images: Tensor, excluded: Tensor | None = None) -> list[Tensor]:
        return [scaled_distances(self.prototypes, self.features(images), self.settings.local, self.dtype, excluded)]


def scaled_distances(
    prototypes: Prototypes, x: Tensor, local: bool, dtype: torch.dtype, excluded: Tensor | None = None
) -> Tensor:
    """E = d / spacing (B, h, w) of features (B, C, h, w), where d is the distance to the nearest prototype. If `local`,
    the spacing is that of this prototype, else the bank's mean. The prototypes of the training images with the indices
    `excluded` (n,) do not count."""
    rows = as_rows(x)
    batch, _, height, width = x.shape
    of_rows = None if excluded is None else excluded.expand(len(rows), -1)
    index, difference = prototypes.nearest(rows, search_parts(height, width), dtype, of_rows)
    spacing = prototypes.spacing[index] if local else prototypes.spacing.mean()
    return (difference.norm(dim=1) / spacing).view(batch, height, width)


@torch.no_grad()
def train(model: Nearest, good: GoodImages, progress: dict | None = None) -> Iterator[Epoch]:
    """Choose the bank from the features of good images, and calibrate. There are no epochs; it yields once, as number
    0."""
    generator = torch.Generator().manual_seed(model.settings.seed)
    images = len(good.trained_on)
    batches = data.batches(good.trained_on, model.shape)
    batches = counted(batches, "features of images", images, each=at_once(model.shape))
    maps = map(model.features, batches)
    candidates, is_inside = spread(maps, images, model, math.ceil(CANDIDATES / images), generator)
    origin = origins(candidates, range(images))
    if progress is None:
        model.prototypes.fit(candidates, origin, prototype_count(model.settings, int(is_inside.sum())), generator)
    calibrate_on(model, good.held_out)
    yield Epoch(0, {}, {"epoch": 0})
    alike = alike_in_order(model.prototypes, model.dtype, good.trained_on, candidates, origin)
    validation = CrossValidation(good, model.settings.seed, alike)
    scores = {}
    for fold in range(FOLDS):
        scores |= validation.scores(model, fold)
    validation.set_threshold(model, scores)
