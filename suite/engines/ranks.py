"""The processes that share one cell (data parallel): who does what part, and how the parts become one again.

Every rank holds a whole trainer and a whole sampler. Rollouts, rewards, scores and micro-batches are shared out; their
results are gathered, so that every rank has the whole step, and gradients are summed, so that every rank takes the same
one. Rank 0 alone writes the record. One process is a `Ranks` too, and pays nothing for it.

The ranks talk through a gloo group of their own. torch's default group is left to vLLM: each in-process engine makes one
of a single process, and takes it down, with all groups that are registered beside it, when it is closed.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta


class ReplicaError(RuntimeError):
    """Ranks that must hold the same weights do not."""


class PeerLost(RuntimeError):
    """Another rank ended while this one waited for it; what ended it is that rank's to tell."""


PATIENCE = timedelta(minutes=30)  # a long step of another rank; a dead one is noticed by the launcher


@dataclass(frozen=True)
class Ranks:
    """This process's number, from 0, among `size` processes."""

    rank: int = 0
    size: int = 1
    group: object = field(default=None, repr=False, compare=False)  # torch's ProcessGroupGloo, where there are several

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, items: list) -> list:
        """This rank's block of a list; the blocks of all ranks, in their order, are the list."""
        return items[len(items) * self.rank // self.size : len(items) * (self.rank + 1) // self.size]

    def spread(self, items: list, work: Callable[[list], list]) -> list:
        """`work(items)`, whose results stand for the items one by one, with the items shared out over the ranks."""
        return [result for part in self.gather(work(self.share(items))) for result in part]

    def gather(self, value) -> list:
        """The value of every rank, in their order. Tensors in it must be on the CPU."""
        if self.size == 1:
            return [value]
        import torch

        own = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        lengths = [length.item() for length in self._all(torch.tensor([len(own)]))]
        padded = torch.nn.functional.pad(own, (0, max(lengths) - len(own)))
        parts = zip(self._all(padded), lengths, strict=True)
        return [pickle.loads(part[:length].numpy().tobytes()) for part, length in parts]

    def _all(self, tensor) -> list:
        import torch

        found = [torch.empty_like(tensor) for _ in range(self.size)]
        try:
            self.group.allgather([found], [tensor]).wait()
        except RuntimeError as problem:
            raise PeerLost("another rank ended; its own error says why") from problem
        return found

    def first(self, value):
        """Rank 0's value, on every rank."""
        return self.gather(value if self.is_first else None)[0]

    def add_up(self, tensors: list) -> None:
        """Replace each tensor, in place, by its sum over the ranks: the same bits on all of them."""
        for tensor in tensors if self.size > 1 else ():
            self.group.allreduce([tensor]).wait()


def join() -> Ranks:
    """The ranks of this process, from RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as suite/machine/processes.py sets them."""
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if size == 1:
        return Ranks()
    from torch.distributed import ProcessGroupGloo, TCPStore

    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, rank == 0, timeout=PATIENCE)
    return Ranks(rank, size, ProcessGroupGloo(store, rank, size, PATIENCE))
