"""The processes that share one cell, as torchrun starts them: who does what part, and how the parts become one again.

Weights, gradients and optimizer state are spread over the ranks by FSDP2 (trainers/shards.py); each rank has a sampler of
its own. Rollouts, rewards, scores and micro-batches are dealt out, and their results are gathered, so that every rank has
the whole step; rank 0 alone writes the record. One process is a world of one: a group without a network, and the same code.

torch's default process group is the only one. On a GPU its tensors travel by NCCL and its objects by gloo.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property

from suite.errors import UserError

PATIENCE = timedelta(minutes=30)  # for a long step of another rank; a dead one is noticed by its closed connection
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what it tells each process
LOST = ("closed by peer", "reset by peer", "remote process exited", "broken pipe", "gloo", "nccl")  # in errors of a torn connection


class ReplicaError(RuntimeError):
    """Ranks that must hold the same weights do not."""


class PeerLost(RuntimeError):
    """Another rank ended while this one waited for it; what ended it is that rank's to tell."""


@dataclass(frozen=True)
class World:
    """This process's number, from 0, among `size` processes, and among those of its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def device(self):
        """The GPU of this rank, or the CPU."""
        import torch

        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", self.local_rank % torch.cuda.device_count())  # a rank may see its own GPU alone

    @cached_property
    def mesh(self):
        """All ranks along one dimension, over which FSDP2 spreads a model; makes the group of a world of one."""
        from torch.distributed.device_mesh import init_device_mesh

        ensure_group()
        return init_device_mesh(self.device.type, (self.size,), mesh_dim_names=("shard",))

    def share(self, items: list) -> list:
        """This rank's block of a list; the blocks of all ranks, in their order, are the list."""
        return items[len(items) * self.rank // self.size : len(items) * (self.rank + 1) // self.size]

    def spread(self, items: list, work: Callable[[list], list]) -> list:
        """`work(items)`, whose results stand for the items one by one, with the items shared out over the ranks."""
        return [result for part in self.gather(work(self.share(items))) for result in part]

    def deal(self, costs: list[int]) -> list[int | None]:
        """The pieces of work of this rank, by number: all in one process, otherwise about the same cost for each rank and
        the same number of pieces, since every forward of a spread model needs all ranks. None, always first, is a piece
        without content."""
        if self.size == 1:
            return list(range(len(costs)))
        room = -(-len(costs) // self.size)
        dealt, load = [[] for _ in range(self.size)], [0] * self.size
        for piece in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
            rank = min((r for r in range(self.size) if len(dealt[r]) < room), key=lambda r: (load[r], r))
            dealt[rank].append(piece)
            load[rank] += costs[piece]
        own = dealt[self.rank]
        return [None] * (room - len(own)) + sorted(own)

    def gather(self, value) -> list:
        """The value of every rank, in their order. Tensors in it must be on the CPU. Raises PeerLost."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        found = [None] * self.size
        with naming_a_lost_peer(self):
            dist.all_gather_object(found, value)
        return found

    def first(self, value):
        """Rank 0's value, on every rank. Raises PeerLost."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        found = [value]
        with naming_a_lost_peer(self):
            dist.broadcast_object_list(found, src=0)
        return found[0]

    def add_up(self, tensors: list) -> None:
        """Replace each tensor, in place, by its sum over the ranks: the same bits on all of them. Raises PeerLost."""
        import torch.distributed as dist

        with naming_a_lost_peer(self):
            for tensor in tensors if self.size > 1 else ():
                dist.all_reduce(tensor)


def join() -> World:
    """The world of this process, from the environment that torchrun gives it; of one without. Raises UserError for a
    WORLD_SIZE that no torchrun has set."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return World()
    if missing := [name for name in TORCHRUN if name not in os.environ]:
        raise UserError(
            f"WORLD_SIZE: found {os.environ['WORLD_SIZE']} without {', '.join(missing)}, allowed: what torchrun sets "
            "(start with torchrun, or unset it)"
        )
    ensure_group()
    return World(*(int(os.environ[name]) for name in TORCHRUN[:3]))


def ensure_group() -> None:
    """Make torch's default process group, unless it is there: of the ranks that torchrun started, or of this process."""
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return
    on_gpu = torch.cuda.is_available()
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        dist.init_process_group(backend, timeout=PATIENCE)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


@contextmanager
def keeping_the_group():
    """Inside, the default process group outlives a library that takes it down when it ends, as vLLM's engine does."""
    import torch.distributed as dist

    destroy = dist.destroy_process_group
    dist.destroy_process_group = lambda group=None: None if group is None else destroy(group)
    try:
        yield
    finally:
        dist.destroy_process_group = destroy


@contextmanager
def naming_a_lost_peer(world: World):
    """Inside, an error of a connection that another rank has left is a PeerLost."""
    try:
        yield
    except RuntimeError as problem:
        if world.size == 1 or isinstance(problem, PeerLost) or not any(word in str(problem).lower() for word in LOST):
            raise
        raise PeerLost("another rank ended; its own error says why") from problem
