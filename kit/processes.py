"""Several processes, started by torchrun, that share the work; the device of each; and the line on a terminal that
tells how far the work is."""

import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.distributed as dist

from kit.errors import InputError, is_first

Item = TypeVar("Item")

SHOW_EVERY = 0.2  # seconds
CLEAR = "\r\x1b[K"


@dataclass(frozen=True)
class Processes:
    """This process, number `rank` of `count` that share a run; the first one prints and writes, for all of them.
    `local_rank` and `local_count` count those of this machine."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def alone(self) -> "Processes":
        """For a run that this process does by itself, whatever the others on its machine do."""
        return replace(self, rank=0, count=1)

    def part(self, items: Sequence) -> Sequence:
        """This process's part of `items`, of which there is at least one: at least one."""
        return items[self.rank % len(items) :: self.count]

    def concatenated(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows (N, ...) of all processes, in their order; the same for each."""
        if self.count == 1:
            return rows
        found: list = [None] * self.count
        dist.all_gather_object(found, rows.cpu())
        return torch.cat(found).to(rows.device)


ALONE = Processes()


def join_processes() -> Processes:
    """Meet the other processes that torchrun started, if it did; all but the first fall silent."""
    here = Processes(
        *(
            int(os.environ.get(name, default))
            for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
        )
    )
    if here.count > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if not here.first:
        sys.stdout = open(os.devnull, "w", errors="replace")
    return here


def pick_device(name: str | None, local_rank: int) -> str:
    """The device called `name`; for None a GPU where there is one, each process of a machine its own.
    Raises InputError if it is not there."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        hint = "; start one process for each GPU, or give --device cpu" if local_rank else ""
        raise InputError(f"--device {name}: not available here ({error!r:.200}){hint}") from error
    return name


def keep_freed_memory() -> None:
    """Let glibc keep the big blocks that tensors free: to get them anew from the system takes a fifth longer."""
    mallopt = glibc("mallopt")
    if mallopt is None:
        return
    trim_threshold, mmap_max = -1, -4  # names of glibc's malloc.h
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)


def return_freed_memory() -> None:
    """Give the system back what was kept, after something large: the next large thing would not fit into the holes."""
    malloc_trim = glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def glibc(name: str) -> Callable | None:
    """One of its functions, where it is the C library."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


# ---------------------------------------------------------------- how far it is


# One line that moves: what is being done, how much of it, how fast, how long yet. On standard error, so that the output
# can be piped; into a file nothing is written.


def is_shown() -> bool:
    """Only on a terminal, and only by the first of several processes."""
    return sys.stderr.isatty() and is_first()


def counted(items: Iterable[Item], what: str, total: int, each: int = 1) -> Iterator[Item]:
    """The items, while a line counts them to `total`; an item stands for `each` of what is counted."""
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
                sys.stderr.write(CLEAR + line(what, done, total, now - started))
                sys.stderr.flush()
    finally:
        clear()


def line(what: str, done: int, total: int, seconds: float) -> str:
    rate = done / seconds
    return f"{what}: {done} of {total}, {rate:.3g} a second, {(total - done) / rate:.0f} s left"


def clear() -> None:
    """Wipe the line, before something else is printed."""
    if is_shown():
        sys.stderr.write(CLEAR)
        sys.stderr.flush()
