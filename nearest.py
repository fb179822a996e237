"""The nearest neighbour, the honest rival: a bank of prototypes, normal features that cover all others, and how far an
image's features are from it, in units of the bank's spacing there. Nothing is trained. What a flow learns has to beat
this, and stands on the same bank. With one scale for all (--no-local) it is PatchCore's distance (arXiv
2106.08265), without its reweighting of the image score.

Shapes: images (B, 3, H, W) in [0, 1]; features (B, C, h, w) of the backbone; rows y (N, C): one feature for each
position of each image. A bank has P prototypes p."""

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defaults import NearestSettings
from kit import data
from kit.backbone import BACKBONES, as_rows
from kit.calibration import FOLDS, AsNew, blocks
from kit.detector import Detector
from kit.errors import InputError
from kit.good import GoodImages
from kit.progress import counted
from kit.settings import Settings
from kit.training import Epoch
from kit.windows import at_once

CANDIDATES = 100_000  # rows at most, spread over all images, from which the bank is chosen: 150 MB with ResNet18
SKETCH = 64  # random directions in which the bank is chosen
FARTHEST = 1024  # rows, among which the next ones for the bank are sought
NEIGHBOURS = 5  # of a bank vector, whose mean distance is the spacing there
CHUNK = 4096  # rows whose distances to the bank are held at once
GROUP = 32  # prototypes, of which the best is sought first
CELL = 128  # prototypes of a cell, in the mean
LOOKED_INTO = 4  # cells
LOOKED_INTO_IF_FAR = 16  # cells, of a row that is far from what it finds in the first few
TENTHS = 10
ASKED = 40  # images, whether those that follow each other are alike
BANK = 4000  # prototypes, to ask new images whether those that follow each other are alike
FAR = -1e30  # what no row is near to; infinity times zero would not be a number


@dataclass(frozen=True)
class LeftOut:
    """Which of P prototypes do not count for which of N rows: `is_out` (G, P) bool for each kind of rows, and the
    `kind` (N,) that each row is of."""

    is_out: Tensor
    kind: Tensor

    def of(self, rows: Tensor) -> "LeftOut":
        """The same for some of the rows: their numbers, or (N,) bool."""
        return LeftOut(self.is_out, self.kind[rows])


class Prototypes(nn.Module):
    """A bank of P normal rows that cover all others, and its `spacing` (P,): the mean distance of each to its own 5
    nearest (after REB, arXiv 2308.12577). Features of a busy kind lie far apart, those of a smooth kind close together:
    what is near, and what is far, has to be asked place by place. The bank (P, C) is kept less its `centre` (C,), with
    its `origin` (P,): the number of the training image that each comes from.

    It is divided into cells, to be searched faster: each prototype belongs to that one of the `centres` (K, C) that it
    is nearest to. The bank is in the order of the cells; the first `sizes[0]` prototypes are of the first one."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("centre", torch.zeros(channels))
        self.register_buffer("bank", torch.zeros(0, channels))
        self.register_buffer("spacing", torch.ones(0))
        self.register_buffer("origin", torch.zeros(0, dtype=torch.long))
        self.register_buffer("centres", torch.zeros(0, channels))
        self.register_buffer("sizes", torch.zeros(0, dtype=torch.long))
        self.made, self.made_of = torch.zeros(0), torch.zeros(0)  # keys, and the bank that they were made of

    def fit(self, candidates: Tensor, origin: Tensor, count: int, generator: torch.Generator) -> None:
        """Choose a bank of P = `count` from normal rows (N, C), N >= P, of the training images with these numbers
        (N,). Raises InputError if the backbone made no numbers of them."""
        candidates = candidates.float()
        if not candidates.isfinite().all():
            raise InputError("--weights: the backbone's features are no finite numbers; give other weights")
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
        self.divide()

    def divide(self) -> None:
        """Divide the bank into cells of some CELL prototypes, by k-means, and put it into their order."""
        # Here, since to import scikit-learn takes a second, and a detector that judges an image needs none of it.
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning

        kmeans = KMeans(math.ceil(len(self.bank) / CELL), init="random", n_init=1, max_iter=10, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # of equal prototypes it makes fewer cells
            kmeans.fit(self.bank.cpu().numpy())
        cell = torch.from_numpy(kmeans.labels_).long().to(self.bank.device)
        order = cell.argsort(stable=True)
        self.bank, self.spacing, self.origin = self.bank[order], self.spacing[order], self.origin[order]
        found, self.sizes = cell.unique(return_counts=True)
        self.centres = torch.from_numpy(kmeans.cluster_centers_).to(self.bank)[found]

    def nearest(self, rows: Tensor, parts: int, dtype: torch.dtype, without: Tensor | None = None) -> Tensor:
        """Which prototype is nearest to each of rows (N, C): (N,). Half the bits will do, since nearly equal distances
        may be mistaken for each other. Prototypes that came from the training images with the numbers `without` (n,)
        do not count; or (N, n), for each row others. So an image is judged as if it, or what is like it, were new.

        On a CPU a row looks into a few cells, and into more of them if it is farther from what it finds there than
        prototypes are from each other: rows of defects are far from all cells, and which of these is nearest says
        little. Elsewhere it looks through all, in this many equal `parts`."""
        queries = F.pad((rows - self.centre).to(dtype), (0, 2), value=1.0)
        out = None if without is None else self.left_out(without, len(rows))
        exports = torch.compiler.is_compiling()
        keys = keys_of(self.bank, dtype) if exports else self.keys(dtype)  # an export keeps nothing
        # An export can have no loop whose steps depend on values, and on a GPU to start each of these takes too long.
        if exports or rows.device.type != "cpu":
            return among_all(in_equal_parts(queries, parts), keys, out)
        found = self.among_cells(queries, keys, out, LOOKED_INTO)
        is_far = self.away(rows, found).norm(dim=1) > self.spacing[found]
        if is_far.any():
            out = None if out is None else out.of(is_far)
            found[is_far] = self.among_cells(queries[is_far], keys, out, LOOKED_INTO_IF_FAR)
        return found

    def left_out(self, without: Tensor, rows: int) -> LeftOut:
        """What does not count for so many rows; see `nearest`."""
        kinds, kind = without.to(self.origin.device).view(-1, without.shape[-1]).unique(dim=0, return_inverse=True)
        is_out = (self.origin == kinds[:, :, None]).any(dim=1)
        if is_out.all(dim=1).any():  # nothing else is there to see the image from
            raise InputError("--data: its good images are copies of one; give different photographs")
        return LeftOut(is_out, kind.expand(rows))

    def keys(self, dtype: torch.dtype) -> Tensor:
        """`keys_of` the bank, made once for each bank: that takes as long as a tenth of a search."""
        if self.made_of is not self.bank or self.made.dtype != dtype:
            self.made_of, self.made = self.bank, keys_of(self.bank, dtype)
        return self.made

    def among_cells(self, queries: Tensor, keys: Tensor, out: LeftOut | None, looks: int) -> Tensor:
        """`among_all`, but each query looks only into so many cells, those whose centres are nearest to it, of those
        that have a prototype which counts."""
        sizes = self.sizes.tolist()
        nearness = queries @ keys_of(self.centres, queries.dtype).T
        if out is not None:
            cells = out.is_out.split(sizes, dim=1)
            is_empty = torch.stack([of_cell.all(dim=1) for of_cell in cells], dim=1)
            nearness[is_empty[out.kind]] = FAR
        looks = min(looks, len(sizes))
        cell = nearness.topk(looks, dim=1).indices.flatten()  # query 0 looks into the first of these, ...
        order = cell.argsort(stable=True)
        visits = order.split(cell.bincount(minlength=len(sizes)).tolist())
        similarity = queries.new_empty(len(cell))
        found = torch.empty_like(cell)
        first = 0
        for number, (members, visitors) in enumerate(zip(keys.split(sizes), visits, strict=True)):
            visitor = visitors // looks
            similar = queries[visitor] @ members.T
            if out is not None and cells[number].any():
                similar[cells[number][out.kind[visitor]]] = FAR
            best = similar.max(dim=1)
            similarity[visitors] = best.values
            found[visitors] = first + best.indices
            first += len(members)
        best = similarity.view(-1, looks).argmax(dim=1, keepdim=True)
        return found.view(-1, looks).gather(1, best)[:, 0]

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


def keys_of(bank: Tensor, dtype: torch.dtype) -> Tensor:
    """What a row's product with is the higher the nearer a prototype p is, |y - p|^2 = |y|^2 - 2 (y p - |p|^2 / 2):
    (p, -|p|^2 / 2), for rows (y, 1). The second part is split into its coarse and its fine bits, in two columns: (P, C
    + 2)."""
    bias = bank.square().sum(dim=1) / -2
    coarse = bias.to(dtype)
    fine = (bias - coarse.float()).to(dtype)
    return torch.cat((bank.to(dtype), coarse[:, None], fine[:, None]), dim=1)


def in_equal_parts(queries: Tensor, parts: int) -> Sequence[Tensor]:
    """(N, C) -> so many (N / parts, C). Not len(queries), which would fix the batch in an export."""
    return queries.view(parts, queries.shape[0] // parts, queries.shape[1]).unbind()


def among_all(parts: Sequence[Tensor], keys: Tensor, out: LeftOut | None = None) -> Tensor:
    """The number of the key (P, C + 2) that is nearest to each of the queries: (N,). These come in equal parts (n, C +
    2), since all products at once would fill the memory. Keys that are left `out` do not count."""
    missing = -len(keys) % GROUP
    padding = keys.new_zeros(missing, keys.shape[1])
    padding[:, -2] = FAR
    keys = torch.cat((keys, padding))
    count = parts[0].shape[0]
    room = keys.new_empty(len(keys), count)  # for all parts: to get new memory each time takes longer
    found = []
    for number, part in enumerate(parts):
        similarity = torch.mm(keys, part.T, out=room)
        if out is not None:
            kind = out.kind[number * count : (number + 1) * count]
            similarity[: len(keys) - missing][out.is_out.T[:, kind]] = FAR
        similarity = similarity.view(len(keys) // GROUP, GROUP, count)
        # First the best group, by its best member, then the member: one search through all takes twice as long.
        group = similarity.amax(dim=1).max(dim=0).indices
        members = similarity[group, :, torch.arange(count, device=group.device)]
        found.append(group * GROUP + members.max(dim=1).indices)
    return torch.cat(found)


def search_parts(height: int, width: int) -> int:
    """Into how many equal parts `among_all` is to divide the rows of a batch of maps (height, width): each as
    many rows as eight lines of every map have, where that divides the height, less of long ones. With parts of one
    line, a single square image takes 1.7 times as long."""
    return height // math.gcd(height, max(1, min(8, CHUNK // width)))


def covering(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """PatchCore's coreset: which `count` of rows (N, C) cover them. Greedy: the next one is always the row that is
    farthest from all that are chosen, in a few random directions (which keep distances, Johnson and Lindenstrauss)."""
    directions = torch.randn(rows.shape[1], SKETCH, generator=generator).to(rows) / math.sqrt(SKETCH)
    sketch = rows @ directions
    chosen = new = torch.zeros(1, dtype=torch.long, device=rows.device)
    distance = torch.full((len(rows),), torch.inf, device=rows.device)  # to the nearest chosen row
    while len(chosen) < count:
        parts = zip(distance.split(CHUNK), sketch.split(CHUNK), strict=True)
        distance = torch.cat([torch.minimum(d, torch.cdist(part, sketch[new]).amin(dim=1)) for d, part in parts])
        new = next_farthest(sketch, distance)[: count - len(chosen)]
        chosen = torch.cat((chosen, new))
    return chosen


def next_farthest(sketch: Tensor, distance: Tensor) -> Tensor:
    """Which of the rows (N, S) the greedy choice takes next, in order, as far as a look at the FARTHEST of them
    can tell: (k,), k >= 1. `distance` (N,) is how far each is from what is chosen. With each choice these only fall, so
    that the farthest of the few is the farthest of all while it is not nearer than all others were."""
    values, few = distance.topk(min(FARTHEST, len(distance)))
    others = values[-1]
    between = torch.cdist(sketch[few], sketch[few])
    found = [0]
    while len(found) < len(few):
        values = torch.minimum(values, between[found[-1]])
        if values.max() < others:
            break
        found.append(int(values.argmax()))
    return few[torch.tensor(found, device=few.device)]


def prototype_count(settings: Settings, positions: int) -> int:
    """How many prototypes --bank N makes of images with so many positions: N, or of few images a tenth of their rows,
    so that others are left to be seen from them."""
    rows = (settings.images - settings.held_out) * positions
    return min(settings.bank, math.ceil(rows / 10), CANDIDATES)


def spread(
    maps: Iterable[Tensor],
    images: int,
    model: Detector,
    count: int,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Rows of so many `images`, from their maps (B, C, h, w), batch by batch: of each image `count` at random in the
    region of interest, in their order, or all that are there: (N, C). And where that is: (h, w) bool."""
    kept, filled = torch.empty(0), 0
    for x in maps:
        is_inside = model.inside(x.shape[2:])
        inside = is_inside.flatten().nonzero()[:, 0]
        if not filled:  # room for all at once: what is put together at the end needs twice the memory
            kept = x.new_empty(images * min(count, len(inside)), x.shape[1], dtype=dtype)
        for features in x:
            chosen = torch.randperm(len(inside), generator=generator)[:count].sort().values
            kept[filled : filled + len(chosen)] = as_rows(features[None])[inside[chosen.to(inside.device)]]
            filled += len(chosen)
    return kept, is_inside


def origins(rows: Tensor, images: Sequence[int]) -> Tensor:
    """The numbers (N,) of the images that rows (N, C) came from: these, in their order; all have given as many."""
    return torch.as_tensor(images).repeat_interleave(len(rows) // len(images))


@torch.no_grad()
def alike_among(model: Detector, files: Sequence[Path]) -> float:
    """`alike_in_order` of images that the model has not seen, with a bank of their own features."""
    generator = torch.Generator().manual_seed(model.settings.seed)
    maps = map(model.features, data.batches(files, model.shape))
    rows, _ = spread(maps, len(files), model, math.ceil(CANDIDATES / len(files)), generator)
    images = origins(rows, range(len(files)))
    prototypes = Prototypes(rows.shape[1]).to(rows.device)
    prototypes.fit(rows, images, min(BANK, math.ceil(len(rows) / 10)), generator)
    return alike_in_order(prototypes, model.dtype, files, rows, images)


@torch.no_grad()
def alike_in_order(
    prototypes: Prototypes, dtype: torch.dtype, files: Sequence[Path], rows: Tensor, images: Tensor
) -> float:
    """How much more alike good images are that follow each other by name: how many times as often as by chance the
    prototypes that are nearest to an image, its own left out, come from its own tenth of the `files`. 1 where the names
    tell nothing. Some of the images are asked, by those of the rows y (N, C) that have their numbers (N,)."""
    tenth = blocks(files, TENTHS)
    origin = prototypes.origin.cpu()
    found, expected = 0.0, 0.0
    for number in range(0, len(tenth), math.ceil(len(tenth) / ASKED)):
        mine = rows[(images == number).to(rows.device)].float()
        if not len(mine):  # of very many images
            continue
        index = prototypes.nearest(mine, 1, dtype, torch.tensor([number])).cpu()
        is_near = tenth[origin] == tenth[number]
        others = origin != number
        found += float(is_near[index].float().mean())
        expected += float((is_near & others).sum() / others.sum().clamp(min=1))
    return found / max(expected, 1e-6)


# ---------------------------------------------------------------- the detector


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
    alike = alike_in_order(model.prototypes, model.dtype, good.trained_on, candidates, origin)
    as_new = AsNew(good, model.settings.seed, alike)
    scores = {}
    for fold in range(FOLDS):
        scores |= as_new.scores(model, fold)
    as_new.settle(model, scores)
