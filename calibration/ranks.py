"""Several processes that work on one run, started by torchrun: what they exchange, by torch.distributed alone.

Each rank has its share of the calibration batches and of every solve's outputs. CPU tensors travel by gloo, those of
GPUs by NCCL. A process by itself is a rank among one: nothing is exchanged then.
"""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from calibration.errors import InputError, RankLost

T = TypeVar("T")
LOST = "another rank has ended, so all stop"
PATIENCE = timedelta(days=30)  # rank 0 may take gradients for hours; torch would give up after half an hour of them


@dataclass(frozen=True)
class Ranks:
    """This process among `size`; rank 0 alone writes and prints.

    Attributes:
        rank: 0 .. size - 1.
        size: How many processes there are.
        local: Rank among those of this machine.
        store: What torchrun lends for small notes; None for a process by itself.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    store: dist.Store | None = None

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0

    def leave(self, said: str, status: int):
        """Ends the process after an error that every rank meets: the first to come here says it.

        One of several ends at once: an orderly end of torch takes seconds, and another rank may be gone already.
        """
        if self.size == 1:
            print(said, file=sys.stderr)
            sys.exit(status)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self.speaks():
            print(said, file=sys.stderr, flush=True)
        os._exit(status)

    def finish(self):
        """Ends a process that has done its share, where there are several.

        Not by the interpreter's own end: torch's threads, still there, abort it now and then, and torchrun would take
        that for a failure and end the others too.
        """
        if self.size > 1:
            dist.destroy_process_group()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    def speaks(self) -> bool:
        """Whether no rank has asked before."""
        try:
            return self.store.add("spoken", 1) == 1
        except RuntimeError:  # the store ended with the rank that was lost
            return True

    def device(self, name: str) -> str:
        """The device that this rank takes where a command names `name`.

        Raises:
            InputError: It names one GPU for all ranks of this machine.
        """
        if self.size == 1:
            return name
        if name.startswith("cuda:"):
            raise InputError(f"device {name!r} is one GPU for {self.size} ranks; cuda gives each its own")
        return f"cuda:{self.local}" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else name

    def share(self, count: int) -> slice:
        """Which of `count` things in a row are this rank's."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over all ranks, in place."""
        if self.size > 1:
            with _exchange():
                dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """All ranks' tensors side by side along `dim`, in which alone they may differ."""
        if self.size == 1:
            return tensor
        lengths = torch.zeros(self.size, dtype=torch.int64, device=tensor.device)
        lengths[self.rank] = tensor.shape[dim]
        parts, shape = [], list(tensor.shape)
        for rank, shape[dim] in enumerate(self.all_reduce(lengths).tolist()):
            parts.append(tensor.contiguous() if rank == self.rank else tensor.new_empty(shape))
            with _exchange():
                dist.broadcast(parts[-1], src=rank)
        return torch.cat(parts, dim)

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` gives on rank 0, on every rank: plain values, or tensors on the CPU."""
        if self.size == 1:
            return make()
        box = [make() if self.first else None]
        with _exchange():
            dist.broadcast_object_list(box, src=0)
        return box[0]


ALONE = Ranks()


def join_ranks() -> Ranks:
    """This process's place among those that torchrun started; ALONE without torchrun.

    From here on a SIGTERM, which torchrun sends when a rank ends early, raises RankLost.
    """
    if not dist.is_torchelastic_launched():
        return ALONE
    store, rank, size = next(dist.rendezvous("env://"))
    signal.signal(signal.SIGTERM, _stop)
    dist.init_process_group(store=store, rank=rank, world_size=size, timeout=PATIENCE)
    return Ranks(rank, size, int(os.environ["LOCAL_RANK"]), store)


def _stop(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the error is on its way already
    raise RankLost(LOST)


@contextmanager
def _exchange():
    try:
        yield
    except RuntimeError as error:  # a connection that broke; torch has no narrower class for gloo
        raise RankLost(LOST) from error
