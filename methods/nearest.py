"""The nearest neighbour, the honest rival: how far an image's features are from the bank of prototypes, in units of the
bank's spacing there. Nothing is trained. What a flow learns has to beat this, and stands on the same bank. With one
scale for all (--no-local) it is PatchCore (arXiv 2106.08265)."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from bank import Prototypes
from kit import data
from kit.backbone import BACKBONES
from kit.calibration import AsNew, alike_in_order
from kit.detector import Detector
from kit.good import GoodImages
from kit.processes import counted
from kit.rows import origins, spread
from kit.search import CANDIDATES, prototype_count
from kit.settings import NearestSettings
from kit.training import Epoch
from kit.windows import at_once


class Nearest(Detector):
    """The detector: E = d / spacing, d the distance of a position's feature to the nearest one in the bank.

    With `local`, spacing is that of the bank there; without, the bank's mean, which is PatchCore's distance, up to a
    factor."""

    SETTINGS = NearestSettings

    def __init__(self, settings: NearestSettings):
        backbone = BACKBONES[settings.backbone]()
        super().__init__(settings, backbone, experts=1)
        self.prototypes = Prototypes(backbone.channels)
        self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def energies(self, images: Tensor, without: Tensor | None = None) -> list[Tensor]:
        return [self.energies_of(self.features(images), without)]

    def energies_of(self, x: Tensor, without: Tensor | None = None) -> Tensor:
        """Features (B, C, h, w) -> E (B, h, w)."""
        return self.prototypes.energies(x, self.settings.local, self.dtype, without)


@torch.no_grad()
def train(model: Nearest, good: GoodImages, progress: dict | None = None) -> Iterator[Epoch]:
    """Choose the bank from the features of good images, and calibrate. There are no epochs: what is yielded is number
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
    held_out = data.batches(good.held_out, model.shape)
    model.calibrate((model.judge(images) for images in held_out), good.held_out)
    yield Epoch(0, {}, {"epoch": 0})
    as_new = AsNew(good, model.settings.seed, alike_in_order(model, good.trained_on, candidates, origin))
    as_new.settle(model, as_new.all_scores(model))
