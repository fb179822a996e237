"""What the methods' training loops share: a step of the optimizer, and what is told of an epoch."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn, optim

from kit.errors import InputError
from kit.processes import Processes


@dataclass(frozen=True)
class Epoch:
    """What a training loop yields: the means of the losses over an epoch's steps, by name, and `progress`, what it
    takes to go on from here besides the model. Number 0 is before the first step."""

    number: int
    losses: dict[str, float]
    progress: dict


class Descent:
    """Adam with clipped gradients, and one cycle of its learning rate over all `steps` of a training."""

    def __init__(self, losses: nn.Module, lr: float, steps: int, weight_decay: float):
        self.parameters = [p for p in losses.parameters() if p.requires_grad]
        self.adam = optim.Adam(self.parameters, lr, weight_decay=weight_decay, fused=True)
        self.cycle = optim.lr_scheduler.OneCycleLR(self.adam, lr, steps, pct_start=0.11)

    def step(self, losses: dict[str, Tensor]) -> dict[str, float]:
        """One step down losses["loss"]; the values of all. Raises InputError if training diverges."""
        loss = losses["loss"]
        if not loss.isfinite():
            raise InputError(f"--lr: training diverged to {loss.item()}; try a lower learning rate")
        self.adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adam.step()
        self.cycle.step()
        return {name: value.item() for name, value in losses.items()}

    def state(self) -> dict:
        return {"adam": self.adam.state_dict(), "cycle": self.cycle.state_dict()}

    def go_on_from(self, progress: dict | None) -> int:
        """Go on where a stopped training was, if this is one; the number of its last whole epoch."""
        if progress is None:
            return 0
        self.adam.load_state_dict(progress["adam"])
        self.cycle.load_state_dict(progress["cycle"])
        return progress["epoch"]

    def epoch(self, number: int, steps: list[dict[str, float]], processes: Processes) -> Epoch:
        """What is told of an epoch with these steps: the means over them, and over all processes, each of which has
        seen its part of every batch."""
        progress = self.state() | {"epoch": number}
        if not steps:
            return Epoch(number, {}, progress)
        means = torch.tensor([list(step.values()) for step in steps]).mean(dim=0)
        if processes.count > 1:
            means = means / processes.count
            dist.all_reduce(means)
        return Epoch(number, dict(zip(steps[0], means.tolist(), strict=True)), progress)


def shared(losses: nn.Module, processes: Processes) -> nn.Module:
    """The losses, with gradients that are the means of those of all processes. Buffers, the bank among them, are the
    same for all from the start, and need not be sent at each step."""
    return losses if processes.count == 1 else nn.parallel.DistributedDataParallel(losses, broadcast_buffers=False)


def seed_epoch(seed: int, number: int, rank: int = 0) -> None:
    """Random numbers of an epoch, so that --resume need not know where the generator was; for each process of its own,
    or all would draw the same noise. Seeds count modulo 2^32: no number must be lost in the upper bits."""
    torch.manual_seed(seed + 10_000 * number + 100_000_000 * rank)
