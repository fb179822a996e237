"""The fast search of a large bank of prototypes: what bank.py says in plain loops, in a fraction of the time. Tests
compare the two on the same bank.

On a CPU the bank is divided into cells, and a row looks into a few of them; elsewhere it looks through all, in parts.
The buffers are the bank's own: `prototypes` is a `bank.Prototypes` here. Rows y (N, C); P prototypes."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kit.errors import InputError
from kit.settings import Settings

CANDIDATES = 100_000  # rows at most, spread over all images, from which the bank is chosen: 150 MB with ResNet18
SKETCH = 64  # random directions in which the bank is chosen
FARTHEST = 1024  # rows, among which the next ones for the bank are sought
CHUNK = 4096  # rows whose distances to the bank are held at once
GROUP = 32  # prototypes, of which the best is sought first
SEEN = 2**14  # the same, where a bank is searched in cells
CELL = 128  # prototypes of a cell, in the mean
LOOKED_INTO = 4  # cells
LOOKED_INTO_IF_FAR = 16  # cells, of a row that is far from what it finds in the first few
FAR = -1e30  # what no row is near to; infinity times zero would not be a number
NOTHING_ELSE = "--data: its good images are copies of one; give different photographs"  # to see a row from


# ---------------------------------------------------------------- the nearest prototype


def nearest(prototypes: nn.Module, rows: Tensor, parts: int, dtype: torch.dtype, without: Tensor | None) -> Tensor:
    """`bank.Prototypes.nearest`, for many rows (N, C) and a large bank: (N,). Half the bits will do, since nearly equal
    distances may be mistaken for each other.

    On a CPU a row looks into a few cells, and into more of them if it is farther from what it finds there than
    prototypes are from each other: rows of defects are far from all cells, and which of these is nearest says
    little. Elsewhere it looks through all, in this many equal `parts`."""
    queries = F.pad((rows - prototypes.centre).to(dtype), (0, 2), value=1.0)
    out = None if without is None else left_out(prototypes.origin, without, len(rows))
    exports = torch.compiler.is_compiling()
    if exports:
        keys = keys_of(prototypes.bank, dtype)  # an export keeps nothing
    else:
        keys = prototypes.keys.of(prototypes.bank, dtype)
    # An export can have no loop whose steps depend on values, and on a GPU to start each of these takes too long.
    if exports or rows.device.type != "cpu":
        return among_all(in_equal_parts(queries, parts), keys, out)
    found = among_cells(prototypes, queries, keys, out, LOOKED_INTO)
    is_far = prototypes.away(rows, found).norm(dim=1) > prototypes.spacing[found]
    if is_far.any():
        out = None if out is None else out.of(is_far)
        found[is_far] = among_cells(prototypes, queries[is_far], keys, out, LOOKED_INTO_IF_FAR)
    return found


@dataclass(frozen=True)
class LeftOut:
    """Which of P prototypes do not count for which of N rows: `is_out` (G, P) bool for each kind of rows, and the
    `kind` (N,) that each row is of."""

    is_out: Tensor
    kind: Tensor

    def of(self, rows: Tensor) -> "LeftOut":
        """The same for some of the rows: their numbers, or (N,) bool."""
        return LeftOut(self.is_out, self.kind[rows])


def left_out(origin: Tensor, without: Tensor, rows: int) -> LeftOut:
    """Which prototypes, with these origins (P,), do not count for so many rows; see `bank.Prototypes.nearest`. Raises
    InputError if none would count."""
    kinds, kind = without.to(origin.device).view(-1, without.shape[-1]).unique(dim=0, return_inverse=True)
    is_out = (origin == kinds[:, :, None]).any(dim=1)
    if is_out.all(dim=1).any():
        raise InputError(NOTHING_ELSE)
    return LeftOut(is_out, kind.expand(rows))


class Keys:
    """`keys_of` a bank, made once for each bank: that takes as long as a tenth of a search."""

    def __init__(self):
        self.made, self.made_of = torch.zeros(0), torch.zeros(0)  # keys, and the bank that they were made of

    def of(self, bank: Tensor, dtype: torch.dtype) -> Tensor:
        if self.made_of is not bank or self.made.dtype != dtype:
            self.made_of, self.made = bank, keys_of(bank, dtype)
        return self.made


def keys_of(bank: Tensor, dtype: torch.dtype) -> Tensor:
    """What a row's product with is the higher the nearer a prototype p is, |y - p|^2 = |y|^2 - 2 (y p - |p|^2 / 2):
    (p, -|p|^2 / 2), for rows (y, 1). The second part is split into its coarse and its fine bits, in two columns: (P, C
    + 2)."""
    bias = bank.square().sum(dim=1) / -2
    coarse = bias.to(dtype)
    fine = (bias - coarse.float()).to(dtype)
    return torch.cat((bank.to(dtype), coarse[:, None], fine[:, None]), dim=1)


# ---------------------------------------------------------------- in cells


def cells_of(bank: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Divide a bank (P, C) into cells of some CELL prototypes, by k-means. Returns the order (P,) of the prototypes in
    which those of a cell follow each other, the cells' centres (K, C), and how many prototypes each has (K,)."""
    # Here, since to import scikit-learn takes a second, and a detector that judges an image needs none of it.
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    kmeans = KMeans(math.ceil(len(bank) / CELL), init="random", n_init=1, max_iter=10, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of equal prototypes it makes fewer cells
        kmeans.fit(bank.cpu().numpy())
    cell = torch.from_numpy(kmeans.labels_).long().to(bank.device)
    order = cell.argsort(stable=True)
    found, sizes = cell.unique(return_counts=True)
    return order, torch.from_numpy(kmeans.cluster_centers_).to(bank)[found], sizes


def among_cells(prototypes: nn.Module, queries: Tensor, keys: Tensor, out: LeftOut | None, looks: int) -> Tensor:
    """`among_all`, but each query looks only into so many cells, those whose centres are nearest to it, of those
    that have a prototype which counts."""
    sizes = prototypes.sizes.tolist()
    nearness = queries @ keys_of(prototypes.centres, queries.dtype).T
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


# ---------------------------------------------------------------- through all


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


def in_equal_parts(queries: Tensor, parts: int) -> Sequence[Tensor]:
    """(N, C) -> so many (N / parts, C). Not len(queries), which would fix the batch in an export."""
    return queries.view(parts, queries.shape[0] // parts, queries.shape[1]).unbind()


def search_parts(height: int, width: int) -> int:
    """Into how many equal parts `among_all` is to divide the rows of a batch of maps (height, width): each as
    many rows as eight lines of every map have, where that divides the height, less of long ones. With parts of one
    line, a single square image takes 1.7 times as long."""
    return height // math.gcd(height, max(1, min(8, CHUNK // width)))


def seen_at_once(device: torch.device) -> int:
    """Of how many rows the nearest prototypes are to be sought at once."""
    return SEEN if device.type == "cpu" else CHUNK  # there all products with the bank are held at once


# ---------------------------------------------------------------- the choice of a bank


def prototype_count(settings: Settings, positions: int) -> int:
    """How many prototypes --bank N makes of images with so many positions: N, or of few images a tenth of their rows,
    so that others are left to be seen from them."""
    rows = (settings.images - settings.held_out) * positions
    return min(settings.bank, math.ceil(rows / 10), CANDIDATES)


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
