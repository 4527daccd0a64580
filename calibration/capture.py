"""Decoder blocks run from outside their model; the only place that calls one.

A block's arguments (masks, rotary tables) come from the model's own forward, run once with every block replaced by a
recorder, so no family needs code. A block's forward can be suspended at the first linear of each stage and go on
later with other weights: each linear then multiplies each token once, although the block is quantized stage by stage.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from greenlet import getcurrent, greenlet
from torch import nn
from torch.func import functional_call

from calibration.parking import ParkedStorages, Watcher, addresses


class _StopForward(Exception):
    """Leaves the model's forward once the last block has been recorded."""


@torch.no_grad()
def record_block_inputs(run: Callable, blocks: Sequence[nn.Module]) -> tuple[torch.Tensor, list[tuple]]:
    """What each block of a model is called with, without running any block.

    Args:
        run: Calls the model on one batch of tokens, without a key-value cache.
        blocks: The model's decoder blocks; their weights are not touched and may be on the meta device.

    Returns:
        The hidden states (batch, T, D) that enter the first block, and the other (args, kwargs) of every block.
    """
    first, arguments = [], []

    def recorder(hidden, *args, **kwargs):
        if not first:
            first.append(hidden)
        arguments.append((args, kwargs))
        if len(arguments) == len(blocks):
            raise _StopForward
        return hidden

    with replaced_blocks(blocks, [recorder] * len(blocks)):
        try:
            run()
        except _StopForward:
            pass
    return first[0], arguments


class replaced_blocks:
    """Context in which each block's forward is another function."""

    def __init__(self, blocks, forwards):
        self.blocks, self.forwards = blocks, forwards

    def __enter__(self):
        for block, forward in zip(self.blocks, self.forwards, strict=True):
            block.forward = forward

    def __exit__(self, *_):
        for block in self.blocks:
            del block.forward


def run_block(
    block: nn.Module, hidden: torch.Tensor, arguments: tuple, weights: Mapping[str, torch.Tensor] | None = None
) -> torch.Tensor:
    """The block's output hidden states; some blocks return them alone, some in a tuple.

    Args:
        block: The decoder block.
        hidden: (batch, T, D) hidden states.
        arguments: The block's other (args, kwargs).
        weights: Stand in, for this call, for the block's parameters of these names; gradients flow into them.
    """
    args, kwargs = arguments
    out = functional_call(block, weights, (hidden, *args), kwargs) if weights else block(hidden, *args, **kwargs)
    return out[0] if isinstance(out, tuple) else out


class SuspendedForwards:
    """Forwards of many batches through one block, all halted before the same stage.

    Args:
        block: The decoder block, with weights.
        inputs: Hidden states of each batch, on the block's device; read when a batch starts.
        arguments: The block's other arguments for each batch.
        stages: Linears of the block that read the same tensor, in the order in which they run.
        parking: Folder for activations of halted forwards past `budget` bytes; None keeps all in memory.
        budget: Bytes that halted forwards may keep in memory.

    Attributes:
        most_held: Bytes that they kept at most, or would have without parking; 0 where nothing may be parked.
    """

    def __init__(
        self, block, inputs, arguments, stages: Sequence[Sequence[nn.Module]], *, parking: Path | None = None, budget=0
    ):
        self.block, self.inputs, self.arguments = block, inputs, arguments
        self.parking, self.budget, self.most_held = parking, budget, 0
        self._runs: list[_Run | None] = [None] * len(inputs)
        self._by_greenlet: dict[greenlet, _Run] = {}
        self._hooks = [
            linear.register_forward_pre_hook(lambda _, args, stage=s: self._halt(stage, args[0]))
            for s, stage in enumerate(stages)
            for linear in stage
        ]

    def __len__(self):
        return len(self.inputs)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for hook in self._hooks:
            hook.remove()
        for run in filter(None, self._runs):  # a run that an error left halfway would keep its activations alive
            if not run.thread.dead:
                run.thread.throw()
        if self.parking is not None:
            shutil.rmtree(self.parking, ignore_errors=True)

    def advance(self, i: int) -> torch.Tensor:
        """Runs batch i up to its next halt.

        Returns:
            The tensor (batch, T, I) that the next stage's linears are about to read; the block's output at the end.
        """
        run = self._runs[i]
        if run is None:
            run = self._runs[i] = _Run(greenlet(lambda: self._forward(i)))
            self._by_greenlet[run.thread] = run
        run.unpark()
        watch = nullcontext() if self.parking is None else run.watcher
        with watch:
            result = run.thread.switch()
        run.reads = None if run.thread.dead else result  # the block's output is the caller's alone
        return result

    def done(self, i: int) -> bool:
        """Whether batch i has left the block."""
        return self._runs[i].thread.dead

    def reads(self, i: int) -> torch.Tensor:
        """What `advance` last returned for batch i, until it is advanced or settled."""
        self._runs[i].unpark()
        return self._runs[i].reads

    def round(self, i: int):
        """Keeps what `advance` last returned for batch i in bf16 until it is advanced, if it is fp32.

        For what linears alone read, and round on their way into a product (products.rounding_once): half the memory.
        """
        self._runs[i].round()

    def settle(self, i: int):
        """Says that batch i is not needed before it is advanced: its activations may go to disk."""
        if self.parking is None:
            return
        run = self._runs[i]
        storages = run.watcher.storages(run.spared | addresses((*self.block.parameters(), *self.block.buffers())))
        storages += [] if run.rounded is None else [run.rounded.untyped_storage()]
        others = [other for other in self._runs if other not in (None, run)]
        run.keeps = run.held = sum(storage.nbytes() for storage in storages)
        self.most_held = max(self.most_held, sum(other.keeps for other in others) + run.keeps)
        if sum(other.held for other in others) + run.held > self.budget:
            run.parked, run.held = ParkedStorages(storages, self.parking / f"batch-{i:05d}.bin"), 0

    def _forward(self, i):
        hidden = self.inputs[i]
        self._runs[i].spared = addresses((hidden, self.arguments[i]))
        return run_block(self.block, hidden, self.arguments[i])

    def _halt(self, stage, x):
        run = self._by_greenlet.get(getcurrent())
        if run is None:  # another set of forwards through the same block
            return
        if stage in run.reached:
            assert run.reached[stage] == x.data_ptr(), "linears of a stage read different tensors: the family is wrong"
            return
        run.reached[stage] = x.data_ptr()
        run.thread.parent.switch(x)
        run.reached[stage] = x.data_ptr()  # parking may have moved it


class _Run:
    """One batch's forward."""

    def __init__(self, thread: greenlet):
        self.thread, self.watcher = thread, Watcher()
        self.reached: dict[int, int] = {}
        self.reads: torch.Tensor | None = None
        self.rounded: torch.Tensor | None = None  # in its place, whose storage is empty then
        self.parked: ParkedStorages | None = None
        self.spared: set[int] = set()  # storages that belong to others
        self.keeps = self.held = 0  # bytes, and those of them that are in memory

    def unpark(self):
        if self.parked is not None:
            self.parked.restore()
            self.parked = None
        if self.rounded is not None:
            self.reads.untyped_storage().resize_(self.reads.nbytes)
            self.reads.copy_(self.rounded)
            self.rounded = None

    def round(self):
        storage = self.reads.untyped_storage()
        if self.reads.dtype == torch.float32 and storage.nbytes() == self.reads.nbytes and storage.resizable():
            self.rounded = self.reads.bfloat16()
            storage.resize_(0)
