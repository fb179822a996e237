"""The nearest neighbour, the honest rival: a bank of prototypes, normal features that cover all others, and how far an
image's features are from it, in units of the bank's spacing there. Nothing is trained. What a flow learns has to beat
this, and stands on the same bank. With one scale for all (--no-local) it is PatchCore (arXiv 2106.08265).

Shapes: images (B, 3, H, W) in [0, 1]; features (B, C, h, w) of the backbone; rows y (N, C): one feature for each
position of each image. A bank has P prototypes p."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kit import data
from kit.backbone import BACKBONES, as_rows
from kit.calibration import FOLDS, AsNew, blocks
from kit.detector import Detector, Settings
from kit.good import GoodImages
from kit.progress import counted
from kit.shapes import Shape
from kit.training import Epoch
from kit.windows import at_once

CANDIDATES = 100_000  # rows at most, spread over all images, from which the bank is chosen: 150 MB with ResNet18
SKETCH = 64  # random directions in which the bank is chosen
NEIGHBOURS = 5  # of a bank vector, whose mean distance is the spacing there
CHUNK = 4096  # rows whose distances to the bank are held at once
GROUP = 32  # prototypes, of which the best is sought first
TENTHS = 10
ASKED = 40  # images, whether those that follow each other are alike
FAR = -1e30  # what no row is near to; infinity times zero would not be a number


class Prototypes(nn.Module):
    """A bank of P normal rows that cover all others, and its `spacing` (P,): the mean distance of each to its own 5
    nearest (after REB, arXiv 2308.12577). Features of a busy kind lie far apart, those of a smooth kind close together:
    what is near, and what is far, has to be asked place by place. The bank (P, C) is kept less its `centre` (C,), with
    its `origin` (P,): the number of the training image that each comes from."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("centre", torch.zeros(channels))
        self.register_buffer("bank", torch.zeros(0, channels))
        self.register_buffer("spacing", torch.ones(0))
        self.register_buffer("origin", torch.zeros(0, dtype=torch.long))

    def fit(self, candidates: Tensor, origin: Tensor, count: int, generator: torch.Generator) -> None:
        """Choose a bank of P = `count` from normal rows (N, C), N >= P, of the training images with these numbers
        (N,)."""
        candidates = candidates.float()
        self.centre.copy_(candidates.mean(dim=0))
        candidates = candidates - self.centre
        chosen = covering(candidates, count, generator)
        self.bank = candidates[chosen].to(self.centre)
        self.origin = origin.to(chosen.device)[chosen].to(self.centre.device)
        neighbours = min(NEIGHBOURS, len(self.bank) - 1)
        parts = []
        for part in self.bank.split(CHUNK):
            distances = torch.cdist(part, self.bank).topk(1 + neighbours, largest=False).values
            parts.append(distances[:, 1:].mean(dim=1))  # the nearest one is the vector itself
        spacing = torch.cat(parts)
        self.spacing = spacing.clamp(min=1e-3 * float(spacing.mean()))  # equal vectors: no division by zero

    def nearest(self, rows: Tensor, parts: int, dtype: torch.dtype, without: Tensor | None = None) -> Tensor:
        """Which prototype is nearest to each of rows (N, C): (N,). All distances at once would fill the memory, so they
        are found in this many equal parts. Half the bits will do, since nearly equal distances may be mistaken for each
        other. Prototypes that came from the training images with the numbers `without` (n,) do not count: so an image
        is judged as if it, or what is like it, were new."""
        keys = self.keys(dtype, without)
        count = rows.shape[0] // parts  # not len(rows), which would fix the batch in an export
        room = keys.new_empty(len(keys), count)  # used by all parts: to get new memory each time takes longer
        found = []
        for part in rows.view(parts, count, rows.shape[1]).unbind():
            queries = F.pad((part - self.centre).to(dtype), (0, 2), value=1.0)
            similarity = torch.mm(keys, queries.T, out=room).view(len(keys) // GROUP, GROUP, count)
            # First the best group, by its best member, then the member: one search through all takes twice as long.
            group = similarity.amax(dim=1).max(dim=0).indices
            members = similarity[group, :, torch.arange(count, device=group.device)]
            found.append(group * GROUP + members.max(dim=1).indices)
        return torch.cat(found)

    def keys(self, dtype: torch.dtype, without: Tensor | None) -> Tensor:
        """What a row's product with is the higher the nearer a prototype p is, |y - p|^2 = |y|^2 - 2 (y p - |p|^2 / 2):
        (p, -|p|^2 / 2), for rows (y, 1). The second part is split into its coarse and its fine bits, in two columns; as
        many keys as fill whole groups, (P', C + 2)."""
        bias = self.bank.square().sum(dim=1) / -2
        if without is not None:
            is_out = torch.isin(self.origin, without.to(self.origin.device))
            if not is_out.all():  # else there is but one training image, and nothing to see it from
                bias[is_out] = FAR
        coarse = bias.to(dtype)
        fine = (bias - coarse.float()).to(dtype)
        keys = torch.cat((self.bank.to(dtype), coarse[:, None], fine[:, None]), dim=1)
        missing = -len(keys) % GROUP
        padding = keys.new_zeros(missing, keys.shape[1])
        padding[:, -2] = FAR
        return torch.cat((keys, padding))

    def away(self, rows: Tensor, index: Tensor) -> Tensor:
        """Rows (N, C) less the prototypes with these numbers (N,)."""
        return rows - self.centre - self.bank[index]

    def energies(self, x: Tensor, local: bool, dtype: torch.dtype, without: Tensor | None = None) -> Tensor:
        """E = d / spacing (B, h, w) of features (B, C, h, w), d the distance to the nearest prototype. If `local`, the
        spacing is that of the bank there; else the bank's mean. For the others see `nearest`."""
        rows = as_rows(x)
        batch, _, height, width = x.shape
        index = self.nearest(rows, search_parts(height, width), dtype, without)
        spacing = self.spacing[index] if local else self.spacing.mean()
        return (self.away(rows, index).norm(dim=1) / spacing).view(batch, height, width)


def search_parts(height: int, width: int) -> int:
    """Into how many equal parts `Prototypes.nearest` is to divide the rows of a batch of maps (height, width): each as
    many rows as eight lines of every map have, where that divides the height, less of long ones. With parts of one
    line, a single square image takes 1.7 times as long."""
    return height // math.gcd(height, max(1, min(8, CHUNK // width)))


def covering(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """PatchCore's coreset: which `count` of rows (N, C) cover them. Greedy: the next one is always the row that is
    farthest from all that are chosen, in a few random directions (which keep distances, Johnson and Lindenstrauss)."""
    directions = torch.randn(rows.shape[1], SKETCH, generator=generator).to(rows) / math.sqrt(SKETCH)
    sketch = rows @ directions
    squares = sketch.square().sum(dim=1)
    chosen = [0]
    distance = torch.full((len(rows),), torch.inf, device=rows.device)  # squared, to the nearest chosen row
    for _ in range(count - 1):
        new = chosen[-1]
        distance = torch.minimum(distance, squares - 2 * (sketch @ sketch[new]) + squares[new])
        chosen.append(int(distance.argmax()))
    return torch.tensor(chosen, device=rows.device)


def prototype_count(settings: Settings, positions: int) -> int:
    """How many prototypes --bank N makes of images with so many positions: N, or of few images a tenth of their rows,
    so that others are left to be seen from them."""
    rows = (settings.images - settings.held_out) * positions
    return min(settings.bank, math.ceil(rows / 10), CANDIDATES)


def spread(x: Tensor, is_inside: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Of each map of x (B, C, h, w), where it is inside (h, w), `count` rows at random, or all that there are:
    (<= B count, C)."""
    kept = []
    for features in x:
        rows = as_rows(features[None])[is_inside.flatten()]
        kept.append(rows[torch.randperm(len(rows), generator=generator)[:count].to(rows.device)])
    return torch.cat(kept)


def origins(rows: Tensor, images: Sequence[int]) -> Tensor:
    """The numbers (N,) of the images that rows (N, C) came from: these, in their order; all have given as many."""
    return torch.as_tensor(images).repeat_interleave(len(rows) // len(images))


@torch.no_grad()
def alike_in_order(model: Detector, good: GoodImages) -> float:
    """How much more alike good images are that follow each other by name: how many times as often as by chance the
    prototypes that are nearest to an image, its own left out, come from its own tenth of the images. 1 where the names
    tell nothing; some of the images are asked."""
    tenth = blocks(good.trained_on, TENTHS)
    origin = model.prototypes.origin.cpu()
    found, expected = 0.0, 0.0
    for number in range(0, len(tenth), math.ceil(len(tenth) / ASKED)):
        x = model.features(data.read_batch([good.trained_on[number]], model.shape))
        own = torch.tensor([number])
        index = model.prototypes.nearest(as_rows(x), search_parts(*x.shape[2:]), model.dtype, own)
        index = index[model.inside(x.shape[2:]).flatten()].cpu()
        is_near = tenth[origin] == tenth[number]
        others = origin != number
        found += float(is_near[index].float().mean())
        expected += float((is_near & others).sum() / others.sum().clamp(min=1))
    return found / max(expected, 1e-6)


# ---------------------------------------------------------------- the detector


@dataclass(frozen=True, kw_only=True)
class NearestSettings(Settings):
    """The options of the nearest neighbour, and their defaults."""

    method: str = "nearest"
    size: int | Shape = 384
    backbone: str = "resnet18"
    bank: int = 8000
    local: bool = True


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
    if progress is None:
        generator = torch.Generator().manual_seed(model.settings.seed)
        per_image = math.ceil(CANDIDATES / len(good.trained_on))
        batches = data.batches(good.trained_on, model.shape)
        parts = []
        for images in counted(batches, "features of images", len(good.trained_on), each=at_once(model.shape)):
            x = model.features(images)
            is_inside = model.inside(x.shape[2:])
            parts.append(spread(x, is_inside, per_image, generator))
        candidates = torch.cat(parts)
        count = prototype_count(model.settings, int(is_inside.sum()))
        model.prototypes.fit(candidates, origins(candidates, range(len(good.trained_on))), count, generator)
    held_out = data.batches(good.held_out, model.shape)
    model.calibrate((model.judge(images) for images in held_out), good.held_out)
    yield Epoch(0, {}, {"epoch": 0})
    as_new = AsNew(good, model.settings.seed, alike_in_order(model, good))
    scores = {}
    for fold in range(FOLDS):
        scores |= as_new.scores(model, fold)
    as_new.settle(model, scores)
