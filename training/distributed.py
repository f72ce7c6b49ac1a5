"""One run over several processes, as torchrun starts them; a single process needs none of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

_LONGEST_WAIT: Final = timedelta(days=2)  # the others wait while process 0 computes all features


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    rank: int
    """Number of this process, from 0; process 0 logs, evaluates and writes."""
    size: int
    """Processes in the run."""
    device: torch.device
    """Where this process computes."""

    @property
    def is_main(self) -> bool:
        """Whether this process logs and writes."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Sum of a tensor over all processes."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def broadcast(self, value: T) -> T:
        """The value that process 0 has."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def find_or_compute(self, compute: Callable[[], T]) -> T:
        """What `compute` gives: process 0 works it out, the others then find it on the disk."""
        found: T | None = None
        for turn in range(self.size):
            if turn == min(self.rank, 1):
                found = compute()
            self.gather(None)
        return cast("T", found)

    def gather(self, value: T) -> Sequence[T]:
        """The values of all processes, in order, on every process."""
        if self.size == 1:
            return [value]
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value)
        return values


@contextmanager
def join_world() -> Iterator[World]:
    """Join the processes that torchrun started, or be alone; leave them at the end."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if size == 1:
        yield World(rank=0, size=1, device=device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_LONGEST_WAIT)
    try:
        yield World(rank=rank, size=size, device=device)
    finally:
        dist.destroy_process_group()
