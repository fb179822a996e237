"""Several processes, started by torchrun, that share the work; the device of each."""

import ctypes
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from kit.errors import InputError


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
