"""The bank of prototypes: normal features that cover all others, and the local spacing between them. The residual of a
feature is its difference from the nearest prototype, divided by the spacing there. This spacing is the local scale.

This file has the plain form. Behind the same calls, kit/search.py searches large banks faster. Shapes: features
(B, C, h, w) of the backbone; rows y (N, C), one feature per position of each image. A bank has P prototypes p."""

import torch
from torch import Tensor, nn

from kit import InputError, search

AT_ONCE = 1024  # prototypes that are compared with all others at once, to save memory
NEIGHBOURS = 5  # of a prototype; their mean distance is the spacing there


class Prototypes(nn.Module):
    """A bank of P normal rows that cover all others, and its `spacing` (P,): the mean distance of each prototype to its
    5 nearest neighbours (after REB, arXiv 2308.12577), but at least the median of these distances. Distances are
    compared with the local spacing, since features of busy textures lie far apart, and those of smooth areas close
    together. The bank (P, C) is stored minus `centre` (C,), the mean of all candidates. `origin` (P,) is the index of
    each prototype's training image.

    If `fast`, kit/search.py chooses and searches the bank: it finds the nearest prototype, or one that is hardly
    farther. For this it divides the bank into cells, which have `cell_centres` and `cell_sizes`."""

    def __init__(self, channels: int, fast: bool = True):
        super().__init__()
        self.fast = fast
        self.register_buffer("centre", torch.zeros(channels))
        self.register_buffer("bank", torch.zeros(0, channels))
        self.register_buffer("spacing", torch.ones(0))
        self.register_buffer("origin", torch.zeros(0, dtype=torch.long))
        self.register_buffer("cell_centres", torch.zeros(0, channels))
        self.register_buffer("cell_sizes", torch.zeros(0, dtype=torch.long))

    def fit(self, candidates: Tensor, origin: Tensor, count: int, generator: torch.Generator) -> None:
        """Choose a bank of P = `count` prototypes from normal rows (N, C), N >= P; `origin` (N,) is the index of each
        row's training image. Raises InputError if a row is NaN or infinite."""
        if not candidates.isfinite().all():
            raise InputError("--weights: the backbone produced NaN or infinite features; give other weights")
        self.centre.copy_(candidates.mean(dim=0, dtype=torch.float32))
        candidates = candidates - self.centre  # in float32
        if self.fast:
            chosen = search.covering(candidates, count, generator)
        else:
            chosen = covering(candidates, count)
        self.bank = candidates[chosen].to(self.centre)
        self.origin = origin.to(chosen.device)[chosen].to(self.centre.device)
        self.spacing = spacing_of(self.bank)
        if self.fast:
            search.divide(self)

    def nearest(
        self, rows: Tensor, parts: int = 1, dtype: torch.dtype = torch.float32, excluded: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The index (N,) of the nearest prototype p of each of rows y (N, C), and y - p (N, C). For each row, the
        prototypes of the training images with the indices `excluded` (N, n) do not count. So a training image is judged
        as if it were new. Raises InputError if no prototype is left. The fast search takes the rows in equal `parts`,
        and computes in `dtype`."""
        y = rows - self.centre
        if self.fast:
            return search.nearest(self, y, parts, dtype, excluded)
        distances = torch.cdist(y, self.bank)
        if excluded is not None:
            is_excluded = (self.origin == excluded.to(self.origin.device)[..., None]).any(dim=1)  # (N, P)
            if is_excluded.all(dim=1).any():
                raise InputError(search.NOTHING_ELSE)
            distances = distances.masked_fill(is_excluded, torch.inf)
        index = distances.argmin(dim=1)
        return index, y - self.bank[index]

    def residual(
        self, rows: Tensor, parts: int = 1, dtype: torch.dtype = torch.float32, excluded: Tensor | None = None
    ) -> Tensor:
        """Residuals r = (y - p) / spacing of p, (N, C): rows y relative to their nearest prototypes p, on the local
        scale. For the other arguments see `nearest`."""
        index, difference = self.nearest(rows, parts, dtype, excluded)
        return difference / self.spacing[index][:, None]


def covering(rows: Tensor, count: int) -> Tensor:
    """PatchCore's coreset (arXiv 2106.08265): the indices (count,) of rows that cover all rows (N, C). Greedy: each
    step chooses the row that is farthest from all chosen rows."""
    chosen = [0]
    distance = torch.cdist(rows, rows[:1])[:, 0]  # to the nearest chosen row
    while len(chosen) < count:
        farthest = int(distance.argmax())
        chosen.append(farthest)
        distance = torch.minimum(distance, torch.cdist(rows, rows[farthest][None])[:, 0])
    return torch.tensor(chosen, device=rows.device)


def spacing_of(bank: Tensor) -> Tensor:
    """The mean distance of each prototype of a bank (P, C) to its NEIGHBOURS nearest ones, but at least the median of
    these distances: (P,). Where good parts are smooth, prototypes lie close together, and a camera's noise would move a
    feature by many spacings."""
    neighbours = min(NEIGHBOURS, len(bank) - 1)
    parts = []
    for part in bank.split(AT_ONCE):
        distances = torch.cdist(part, bank).topk(1 + neighbours, largest=False).values
        parts.append(distances[:, 1:].mean(dim=1))  # the nearest one is the vector itself
    spacing = torch.cat(parts)
    least = max(spacing.median(), 1e-3 * spacing.mean())  # if most vectors are equal: no division by zero
    return spacing.clamp(min=float(least))
