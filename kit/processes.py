"""Several processes, started by torchrun, that share the work; the device of each; and the progress line on a
terminal."""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.distributed as dist

from kit import InputError
from kit.command_line import is_first

Item = TypeVar("Item")

SHOW_EVERY = 0.2  # seconds
CLEAR = "\r\x1b[K"


@dataclass(frozen=True)
class Processes:
    """This process, number `rank` of `count` that share a run. The first one prints and writes for all. `local_rank`
    and `local_count` are the same for this machine."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def alone(self) -> "Processes":
        """For a run that this process trains alone, independently of the others on its machine."""
        return replace(self, rank=0, count=1)

    def part(self, items: Sequence) -> Sequence:
        """This process's part of a non-empty sequence: at least one item."""
        return items[self.rank % len(items) :: self.count]

    def concatenated(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows (N, ...) of all processes, in the order of the processes; all get the same result."""
        if self.count == 1:
            return rows
        found: list = [None] * self.count
        dist.all_gather_object(found, rows.cpu())
        return torch.cat(found).to(rows.device)


ALONE = Processes()


def join_processes() -> Processes:
    """Join the other processes if torchrun started several. Only the first one prints from now on."""
    here = Processes(
        rank=int(os.environ.get("RANK", 0)),
        count=int(os.environ.get("WORLD_SIZE", 1)),
        local_rank=int(os.environ.get("LOCAL_RANK", 0)),
        local_count=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
    )
    if here.count > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if not here.first:
        sys.stdout = open(os.devnull, "w", errors="replace")
    return here


def pick_device(name: str | None, local_rank: int) -> str:
    """The device called `name`. For None a GPU if available, a different one for each process of a machine.
    Raises InputError if the device is not available."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        hint = "start one process for each GPU, or give --device cpu" if local_rank else "give another, such as cpu"
        raise InputError(f"--device {name}: not available here ({error!r:.200}); {hint}") from error
    return name


# ---------------------------------------------------------------- the progress line


# One line that is rewritten: the task, how much is done, the speed, the time left. It goes to standard error, so that
# the output can be piped. Nothing is written into a file.


def is_shown() -> bool:
    """Whether to show it: only on a terminal, and only by the first of several processes."""
    return sys.stderr.isatty() and is_first()


def counted(items: Iterable[Item], what: str, total: int, each: int = 1) -> Iterator[Item]:
    """The items, while a line counts up to `total`; each item counts as `each`."""
    if not is_shown():
        yield from items
        return
    started = shown = time.monotonic()
    done = 0
    try:
        for item in items:
            yield item
            done = min(done + each, total)
            now = time.monotonic()
            if now - shown > SHOW_EVERY:
                shown = now
                sys.stderr.write(CLEAR + progress_line(what, done, total, now - started))
                sys.stderr.flush()
    finally:
        clear()


def progress_line(what: str, done: int, total: int, seconds: float) -> str:
    rate = done / seconds
    return f"{what}: {done} of {total}, {rate:.3g} per second, {(total - done) / rate:.0f} s left"


def clear() -> None:
    """Erase the progress line before something else is printed."""
    if is_shown():
        sys.stderr.write(CLEAR)
        sys.stderr.flush()
