"""The training loop that all methods share: the epochs, the optimizer step, and the record of an epoch."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn, optim

from kit import InputError
from kit.processes import Processes, counted


@dataclass(frozen=True)
class Epoch:
    """The record that a training loop yields: the means of the losses over an epoch's steps, by name, and `progress`,
    the state that is needed besides the model to continue from here. Number 0 is before the first step."""

    number: int
    losses: dict[str, float]
    progress: dict


class Descent:
    """Adam with clipped gradients and a one-cycle learning rate over all steps of a training.

    `losses` is a module: `losses(*batch)` returns the losses of a batch by name, and "loss" is minimised.
    `losses.model` is the detector; its settings give the number of epochs and the learning rate."""

    def __init__(self, losses: nn.Module, steps_per_epoch: int, weight_decay: float, processes: Processes):
        self.settings = losses.model.settings
        self.steps_per_epoch = steps_per_epoch
        self.processes = processes
        self.losses = losses
        if processes.count > 1:  # gradients are averaged; buffers, such as the bank, are the same from the start
            self.losses = nn.parallel.DistributedDataParallel(losses, broadcast_buffers=False)
        self.parameters = [p for p in self.losses.parameters() if p.requires_grad]
        lr = self.settings.lr
        self.adam = optim.Adam(self.parameters, lr, weight_decay=weight_decay, fused=True)
        steps = self.settings.epochs * steps_per_epoch
        self.cycle = optim.lr_scheduler.OneCycleLR(self.adam, lr, steps, pct_start=0.11)

    def step(self, batch: Iterable[Tensor]) -> dict[str, float]:
        """One step down the loss of a batch. Returns the values of all losses. Raises InputError if training
        diverges."""
        losses = self.losses(*batch)
        loss = losses["loss"]
        if not loss.isfinite():
            raise InputError(f"--lr: training diverged (the loss is {loss.item()}); try a lower learning rate")
        self.adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adam.step()
        self.cycle.step()
        return {name: value.item() for name, value in losses.items()}

    def resume(self, progress: dict | None) -> int:
        """Restore the state of a stopped training, if there is one. Returns the number of its last complete epoch."""
        if progress is None:
            return 0
        self.adam.load_state_dict(progress["adam"])
        self.cycle.load_state_dict(progress["cycle"])
        return progress["epoch"]

    def epoch(self, number: int, steps: list[dict[str, float]]) -> Epoch:
        """The record of an epoch with these steps: the means over the steps and over all processes. Each process has
        seen its part of every batch."""
        progress = {"epoch": number, "adam": self.adam.state_dict(), "cycle": self.cycle.state_dict()}
        if not steps:
            return Epoch(number, {}, progress)
        means = torch.tensor([list(step.values()) for step in steps]).mean(dim=0)
        if self.processes.count > 1:
            means = means / self.processes.count
            dist.all_reduce(means)
        return Epoch(number, dict(zip(steps[0], means.tolist(), strict=True)), progress)


def train_epochs(
    descent: Descent, batches: Callable[[int], Iterable], progress: dict | None, name: str = "epoch"
) -> Iterator[Epoch]:
    """Train for all epochs. Yields before the first step and after each epoch. `batches(number)` returns the batches of
    an epoch; what it draws when it is called, such as the order of the images, is the same in all processes. With the
    `progress` of an earlier epoch, training continues from there. `name` names an epoch on the progress line."""
    settings, rank = descent.settings, descent.processes.rank
    done = descent.resume(progress)
    yield descent.epoch(done, [])
    for number in range(done + 1, settings.epochs + 1):
        seed_epoch(settings.seed, number)
        drawn = batches(number)
        if rank:  # the noise differs between processes
            seed_epoch(settings.seed, number, rank)
        what = f"{name} {number}/{settings.epochs}, steps"
        steps = [descent.step(batch) for batch in counted(drawn, what, descent.steps_per_epoch)]
        yield descent.epoch(number, steps)


def seed_epoch(seed: int, number: int, rank: int = 0) -> None:
    """Seed the random numbers of an epoch, so that --resume does not need the state of the generator. Each process has
    its own seed, or all would draw the same noise. Seeds are taken modulo 2^32, so the sum must stay below that."""
    torch.manual_seed(seed + 10_000 * number + 100_000_000 * rank)
