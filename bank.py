"""The bank of prototypes: normal features that cover all others, and how far apart they lie. The local scale sees a
feature from its nearest prototype, in units of the spacing there.

Everything here is the plain form, as one reads it. The program searches large banks with kit/search.py, behind the same
calls. Shapes: features (B, C, h, w) of the backbone; rows y (N, C): one feature for each position of each image. A bank
has P prototypes p."""

import torch
from torch import Tensor, nn

from kit import search
from kit.backbone import as_rows
from kit.errors import InputError

NEIGHBOURS = 5  # of a bank vector, whose mean distance is the spacing there


class Prototypes(nn.Module):
    """A bank of P normal rows that cover all others, and its `spacing` (P,): the mean distance of each to its own 5
    nearest (after REB, arXiv 2308.12577). Features of a busy kind lie far apart, those of a smooth kind close together:
    what is near, and what is far, has to be asked place by place. The bank (P, C) is kept less its `centre` (C,), with
    its `origin` (P,): the number of the training image that each comes from.

    If `fast`, the bank is chosen and searched by kit/search.py, which finds the same prototype, or one that is hardly
    farther. For that it is divided into cells: each prototype belongs to that one of the `centres` (K, C) that it is
    nearest to. The bank is in the order of the cells; the first `sizes[0]` prototypes are of the first one."""

    def __init__(self, channels: int, fast: bool = True):
        super().__init__()
        self.fast = fast
        self.register_buffer("centre", torch.zeros(channels))
        self.register_buffer("bank", torch.zeros(0, channels))
        self.register_buffer("spacing", torch.ones(0))
        self.register_buffer("origin", torch.zeros(0, dtype=torch.long))
        self.register_buffer("centres", torch.zeros(0, channels))
        self.register_buffer("sizes", torch.zeros(0, dtype=torch.long))
        self.keys = search.Keys()

    def fit(self, candidates: Tensor, origin: Tensor, count: int, generator: torch.Generator) -> None:
        """Choose a bank of P = `count` from normal rows (N, C), N >= P, of the training images with these numbers
        (N,). Raises InputError if the backbone made no numbers of them."""
        candidates = candidates.float()
        if not candidates.isfinite().all():
            raise InputError("--weights: the backbone's features are no finite numbers; give other weights")
        self.centre.copy_(candidates.mean(dim=0))
        candidates = candidates - self.centre
        if self.fast:
            chosen = search.covering(candidates, count, generator)
        else:
            chosen = covering(candidates, count)
        self.bank = candidates[chosen].to(self.centre)
        self.origin = origin.to(chosen.device)[chosen].to(self.centre.device)
        self.spacing = spacing_of(self.bank)
        self.divide()

    def divide(self) -> None:
        """Divide the bank into cells, and put it into their order."""
        order, self.centres, self.sizes = search.cells_of(self.bank)
        self.bank, self.spacing, self.origin = self.bank[order], self.spacing[order], self.origin[order]

    def nearest(
        self, rows: Tensor, parts: int = 1, dtype: torch.dtype = torch.float32, without: Tensor | None = None
    ) -> Tensor:
        """Which prototype is nearest to each of rows (N, C): (N,). Prototypes that came from the training images with
        the numbers `without` (n,) do not count; or (N, n), for each row others. So an image is judged as if it, or what
        is like it, were new. The fast search takes the rows in equal `parts`, and computes in `dtype`."""
        if self.fast:
            return search.nearest(self, rows, parts, dtype, without)
        distances = torch.cdist(rows - self.centre, self.bank)
        if without is not None:
            distances = distances.masked_fill(self.is_left_out(without), torch.inf)
        return distances.argmin(dim=1)

    def is_left_out(self, without: Tensor) -> Tensor:
        """Which prototypes do not count, (P,) bool; or (N, P), for each row others. Raises InputError if none would
        count."""
        is_out = (self.origin == without.to(self.origin.device)[..., None]).any(dim=-2)
        if is_out.all(dim=-1).any():
            raise InputError(search.NOTHING_ELSE)
        return is_out

    def away(self, rows: Tensor, index: Tensor) -> Tensor:
        """Rows (N, C) less the prototypes with these numbers (N,)."""
        return rows - self.centre - self.bank[index]

    def relative(
        self, rows: Tensor, parts: int = 1, dtype: torch.dtype = torch.float32, without: Tensor | None = None
    ) -> Tensor:
        """The local scale, r = (y - p) / spacing of p, (N, C): rows y seen from where they are, p being the nearest
        prototype; see `nearest`."""
        index = self.nearest(rows, parts, dtype, without)
        return self.away(rows, index) / self.spacing[index][:, None]

    def energies(self, x: Tensor, local: bool, dtype: torch.dtype, without: Tensor | None = None) -> Tensor:
        """E = d / spacing (B, h, w) of features (B, C, h, w), d the distance to the nearest prototype. If `local`, the
        spacing is that of the bank there; else the bank's mean. For the others see `nearest`."""
        rows = as_rows(x)
        batch, _, height, width = x.shape
        index = self.nearest(rows, search.search_parts(height, width), dtype, without)
        spacing = self.spacing[index] if local else self.spacing.mean()
        return (self.away(rows, index).norm(dim=1) / spacing).view(batch, height, width)


def covering(rows: Tensor, count: int) -> Tensor:
    """PatchCore's coreset (arXiv 2106.08265): which `count` of rows (N, C) cover them. Greedy: the next one is always
    the row that is farthest from all that are chosen."""
    chosen = [0]
    distance = torch.cdist(rows, rows[:1])[:, 0]  # to the nearest chosen row
    while len(chosen) < count:
        farthest = int(distance.argmax())
        chosen.append(farthest)
        distance = torch.minimum(distance, torch.cdist(rows, rows[farthest][None])[:, 0])
    return torch.tensor(chosen, device=rows.device)


def spacing_of(bank: Tensor) -> Tensor:
    """The mean distance of each vector of a bank (P, C) to its own NEIGHBOURS nearest, but at least the median of these
    distances: (P,). Where good parts are smooth, prototypes lie so close together that the noise of a camera would be
    many spacings away."""
    neighbours = min(NEIGHBOURS, len(bank) - 1)
    parts = []
    for part in bank.split(search.CHUNK):  # all distances at once would fill the memory
        distances = torch.cdist(part, bank).topk(1 + neighbours, largest=False).values
        parts.append(distances[:, 1:].mean(dim=1))  # the nearest one is the vector itself
    spacing = torch.cat(parts)
    least = max(spacing.median(), 1e-3 * spacing.mean())  # if most vectors are equal: no division by zero
    return spacing.clamp(min=float(least))
