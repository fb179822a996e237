"""The fast search of a large bank of prototypes, behind the same calls as the plain form in bank.py. On a CPU it finds
the nearest prototype, or one that is hardly farther. Tests compare the two on the same bank.

On a CPU the bank is divided into cells, and each row searches a few of them. Elsewhere rows search the whole bank, in
parts. The buffers belong to the bank: `prototypes` is a `bank.Prototypes` here. Rows y (N, C); P prototypes."""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kit import InputError
from kit.settings import Settings

CANDIDATES = 100_000  # rows at most, spread over all images, from which the bank is chosen: 150 MB with ResNet18
SKETCH = 64  # random directions onto which rows are projected to choose the bank
FARTHEST = 1024  # rows among which the next ones for the bank are chosen at once
CHUNK = 4096  # rows that are compared with the whole bank at once, to save memory
GROUP = 32  # prototypes per group; the best group is found first
ROWS_AT_ONCE = 2**14  # rows that are searched at once in cells
CELL = 128  # prototypes per cell on average
LOOKED_INTO = 4  # cells that a row searches
LOOKED_INTO_IF_FAR = 16  # cells that a row searches if it is far from all prototypes in the first few
FAR = -1e30  # similarity of prototypes that do not count; infinity times zero would be NaN
NOTHING_ELSE = "--data: the good images are copies of each other; give different photographs"


# ---------------------------------------------------------------- the nearest prototype


def nearest(
    prototypes: nn.Module, y: Tensor, parts: int, dtype: torch.dtype, excluded: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`bank.Prototypes.nearest` for many rows y (N, C), minus the bank's centre, and a large bank. bfloat16 is precise
    enough: it may only confuse nearly equal distances.

    On a CPU a row searches a few cells. It searches more if the result is farther away than prototypes are from each
    other: rows of defects are far from all cells, so the order of the nearest cells means little. Elsewhere all
    rows search the whole bank, in this many equal `parts`."""
    queries = F.pad(y.to(dtype), (0, 2), value=1.0)
    out = None if excluded is None else left_out(prototypes.origin, excluded)
    exports = torch.compiler.is_compiling()
    # An export cannot have loops that depend on values; on a GPU, starting each step of these loops takes too long.
    if exports or y.device.type != "cpu":
        keys = keys_of(prototypes.bank, dtype) if exports else kept_keys(prototypes.bank, prototypes.cell_sizes, dtype)
        # Equal parts (N / parts, C). Without len(queries), which would fix the batch size in an export.
        index = among_all(queries.view(parts, queries.shape[0] // parts, queries.shape[1]).unbind(), keys, out)
        return index, y - prototypes.bank[index]
    index = among_cells(prototypes, queries, out, LOOKED_INTO)
    difference = y - prototypes.bank.index_select(0, index)  # bank[index] takes four times as long
    is_far = difference.norm(dim=1) > prototypes.spacing[index]
    if is_far.any():
        out = None if out is None else replace(out, kind=out.kind[is_far])
        farther = among_cells(prototypes, queries[is_far], out, LOOKED_INTO_IF_FAR)
        index[is_far] = farther
        difference[is_far] = y[is_far] - prototypes.bank[farther]
    return index, difference


@dataclass(frozen=True)
class LeftOut:
    """The prototypes that do not count for each of N rows: `is_out` (G, P) bool for each of G kinds of rows, and the
    `kind` (N,) of each row."""

    is_out: Tensor
    kind: Tensor


def left_out(origin: Tensor, excluded: Tensor) -> LeftOut:
    """For each of N rows, the prototypes that come from the images `excluded` (N, n). `origin` (P,) is the image of
    each prototype. Raises InputError if none is left."""
    kinds, kind = excluded.to(origin.device).unique(dim=0, return_inverse=True)
    is_out = (origin == kinds[:, :, None]).any(dim=1)
    if is_out.all(dim=1).any():
        raise InputError(NOTHING_ELSE)
    return LeftOut(is_out, kind)


@lru_cache(maxsize=4)  # banks; computing their keys takes a tenth of the time of a search
def kept_keys(bank: Tensor, sizes: Tensor, dtype: torch.dtype) -> Tensor | list[Tensor]:
    """`keys_of` the bank; on a CPU those of each cell, see `keys_in_cells`."""
    keys = keys_of(bank, dtype)
    return keys_in_cells(keys, sizes) if bank.device.type == "cpu" else keys


def keys_of(bank: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys (p, -|p|^2 / 2), whose product with rows (y, 1) is highest for the nearest prototype p:
    |y - p|^2 = |y|^2 - 2 (y p - |p|^2 / 2). -|p|^2 / 2 takes two columns, for its coarse and its fine bits, so
    rows end with two ones: (P, C + 2)."""
    bias = bank.square().sum(dim=1) / -2
    coarse = bias.to(dtype)
    fine = (bias - coarse.float()).to(dtype)
    return torch.cat((bank.to(dtype), coarse[:, None], fine[:, None]), dim=1)


# ---------------------------------------------------------------- in cells


def divide(prototypes: nn.Module) -> None:
    """Divide the bank (P, C) into cells of about CELL prototypes, by k-means: each prototype belongs to the nearest of
    the `cell_centres` (K, C). The bank is sorted by cell; the first `cell_sizes[0]` prototypes are the first cell."""
    # Imported here: scikit-learn takes a second, and judging an image does not need it.
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    bank = prototypes.bank
    kmeans = KMeans(math.ceil(len(bank) / CELL), init="random", n_init=1, max_iter=10, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # equal prototypes give fewer cells
        kmeans.fit(bank.cpu().numpy())
    cell = torch.from_numpy(kmeans.labels_).long().to(bank.device)
    found, prototypes.cell_sizes = cell.unique(return_counts=True)
    prototypes.cell_centres = torch.from_numpy(kmeans.cluster_centers_).to(bank)[found]
    order = cell.argsort(stable=True)
    prototypes.bank = bank[order]
    prototypes.spacing = prototypes.spacing[order]
    prototypes.origin = prototypes.origin[order]


def keys_in_cells(keys: Tensor, sizes: Tensor) -> list[Tensor]:
    """The keys (p, C + 2) of the prototypes in each cell. In bfloat16 they are padded with keys that no query finds:
    see `shape_step`."""
    cells = []
    for members in keys.split(sizes.tolist()):
        padding = keys.new_zeros(-len(members) % shape_step(keys.dtype), keys.shape[1])
        padding[:, -2] = FAR
        cells.append(torch.cat((members, padding)))
    return cells


def shape_step(dtype: torch.dtype) -> int:
    """In this type, numbers of queries and of keys in a product should be multiples of this. A CPU's bfloat16 kernels
    are compiled for each new shape of a product, which takes longer than the product. So there should be few shapes."""
    return 1 if dtype == torch.float32 else 32


def among_cells(prototypes: nn.Module, queries: Tensor, out: LeftOut | None, looks: int) -> Tensor:
    """`among_all`, but each query searches only `looks` cells: those with the nearest centres, among the cells that
    have a prototype that counts."""
    sizes = prototypes.cell_sizes
    looks = min(looks, len(sizes))
    nearness = queries @ keys_of(prototypes.cell_centres, queries.dtype).T
    if out is not None:
        cells = out.is_out.split(sizes.tolist(), dim=1)
        is_empty = torch.stack([of_cell.all(dim=1) for of_cell in cells], dim=1)
        nearness[is_empty[out.kind]] = FAR

    # A visit is one query in one cell. The first `looks` visits belong to query 0, the next ones to query 1, ...
    cell = nearness.topk(looks, dim=1).indices.flatten()
    order = cell.argsort(stable=True)  # sorts the visits by cell
    visits = cell.bincount(minlength=len(sizes))  # of each cell
    step = shape_step(queries.dtype)
    places = (visits + step - 1) // step * step  # of each cell; a place that no visit takes repeats query 0
    place = torch.arange(len(cell)) + starts(places, visits) - starts(visits, visits)
    visitor = torch.zeros(int(places.sum()), dtype=torch.long)
    visitor[place] = order // looks

    found = []
    parts = zip(visitor.split(places.tolist()), kept_keys(prototypes.bank, sizes, queries.dtype), strict=True)
    for number, (visitors, keys) in enumerate(parts):
        similar = queries.index_select(0, visitors) @ keys.T  # queries[visitors] takes four times as long
        if out is not None and cells[number].any():
            similar[:, : cells[number].shape[1]][cells[number][out.kind[visitors]]] = FAR
        found.append(similar.max(dim=1))
    similarity, index = queries.new_empty(len(cell)), torch.empty_like(cell)
    similarity[order] = torch.cat([best.values for best in found])[place]
    index[order] = torch.cat([best.indices for best in found])[place] + starts(sizes, visits)
    best = similarity.view(-1, looks).argmax(dim=1, keepdim=True)
    return index.view(-1, looks).gather(1, best)[:, 0]


def starts(lengths: Tensor, times: Tensor) -> Tensor:
    """Where each of several consecutive parts with these `lengths` (K,) starts, repeated as many `times` (K,)."""
    return (lengths.cumsum(dim=0) - lengths).repeat_interleave(times)


# ---------------------------------------------------------------- through all


def among_all(parts: Sequence[Tensor], keys: Tensor, out: LeftOut | None = None) -> Tensor:
    """The index (N,) of the key (P, C + 2) that is nearest to each query. Queries come in equal parts (n, C + 2), since
    all products at once would fill the memory. Keys that are left `out` do not count."""
    missing = -len(keys) % GROUP
    padding = keys.new_zeros(missing, keys.shape[1])
    padding[:, -2] = FAR
    keys = torch.cat((keys, padding))
    count = parts[0].shape[0]
    room = keys.new_empty(len(keys), count)  # reused for all parts: new memory for each part takes longer
    found = []
    for number, part in enumerate(parts):
        similarity = torch.mm(keys, part.T, out=room)
        if out is not None:
            kind = out.kind[number * count : (number + 1) * count]
            similarity[: len(keys) - missing][out.is_out.T[:, kind]] = FAR
        similarity = similarity.view(len(keys) // GROUP, GROUP, count)
        # First the group with the best member, then this member: a single argmax takes twice as long.
        group = similarity.amax(dim=1).max(dim=0).indices
        members = similarity[group, :, torch.arange(count, device=group.device)]
        found.append(group * GROUP + members.max(dim=1).indices)
    return torch.cat(found)


def search_parts(height: int, width: int) -> int:
    """The number of equal parts for `among_all`, for the rows of a batch of maps (height, width). A part has eight
    lines of each map if that divides the height, and fewer if lines are long. With parts of one line, a single square
    image takes 1.7 times as long."""
    return height // math.gcd(height, max(1, min(8, CHUNK // width)))


def in_parts(rows: Tensor, image_indices: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows (N, C) and their images (N,), as many at a time as are searched at once."""
    count = ROWS_AT_ONCE if rows.device.type == "cpu" else CHUNK  # a GPU holds all products with the bank at once
    return zip(rows.split(count), image_indices.split(count), strict=True)


# ---------------------------------------------------------------- the choice of a bank


def prototype_count(settings: Settings, positions: int) -> int:
    """The number of prototypes for --bank N and images with this many positions: N, but at most CANDIDATES, and at most
    a tenth of all rows, so that most rows are not prototypes."""
    rows = (settings.images - settings.held_out) * positions
    return min(settings.bank, math.ceil(rows / 10), CANDIDATES)


def covering(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """PatchCore's coreset: the indices (count,) of rows that cover all rows (N, C). Greedy: each step chooses the row
    that is farthest from all chosen rows. Distances are measured in a random projection, which nearly preserves them
    (Johnson and Lindenstrauss)."""
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
    """The next rows (k,), k >= 1, of the greedy choice from rows (N, S). Only the FARTHEST rows are examined, so k
    varies. `distance` (N,) is the distance of each row to the chosen rows. A choice can only reduce distances. So the
    farthest of these few rows is the farthest of all, as long as its distance is not below those of all other rows."""
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
