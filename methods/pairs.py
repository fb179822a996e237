"""Batches for methods that train on whole images: good images x+, and anomalous images x- that a painter made from some
of them."""

from collections.abc import Iterator
from functools import partial
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from kit.good import Painter, loader
from kit.images import to_tensor


def pairs(painter: Painter, numbers: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """This process's part of a batch of x+ with these numbers, and of x- for half of them (more x- did not help).

    Returns B images x+, then A images x- that were made from the first A of them, as (B + A, H, W, 3) float32; the
    masks, (A, H, W, 1) float32; and the boxes (y0, x0, y1, x1) around them, (A, 4). (H, W) is the images' shape, or a
    patch's.

    Of a batch [5, 3, 8, 1] two processes take [5, 8] and [3, 1]; x- are made from 5 and 3, the first half of the batch,
    so that each process makes one. Every process gets at least one image and one x-."""
    mine = painter.processes.part(numbers)
    half = (len(numbers) + 1) // 2  # of the whole batch
    with_defect = len(painter.processes.part(numbers[:half]))
    normal, painted, masks, boxes = zip(*(painter.pair(number) for number in mine[:with_defect]), strict=True)
    others = [painter.untouched(number) for number in mine[with_defect:]]
    return np.stack([*normal, *others, *painted]), np.float32(masks)[..., None], np.array(boxes)


class PairLoader:
    """Random batches of a painter's `pairs`, epoch by epoch, as tensors on the detector's `device`. Small sets of files
    are repeated to about `images_per_epoch`."""

    def __init__(self, painter: Painter, images_per_epoch: int, batch: int, device: torch.device):
        self.painter = painter
        self.device = device
        repeats = max(1, round(images_per_epoch / len(painter.files)))
        self.loader = loader(range(len(painter.files) * repeats), partial(pairs, painter), batch, shuffle=True)

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The batches of an epoch: images (B + A, 3, H, W), masks (A, 1, H, W), boxes (A, 4); see `pairs`. The order of
        the images depends on torch's seed at the time of this call."""
        self.painter.epoch = number
        batches = iter(self.loader)
        # A loader without background processes draws the order with its first batch. That has to be now: afterwards
        # each of several processes sets a seed of its own, and all of them need the same order.
        first = next(batches)
        return map(self.as_tensors, chain([first], batches))

    def as_tensors(self, batch: tuple[np.ndarray, np.ndarray, np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
        images, masks, boxes = batch
        parts = to_tensor(images), to_tensor(masks), torch.from_numpy(boxes)
        return tuple(part.to(self.device) for part in parts)
