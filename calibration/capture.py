"""Decoder blocks run from outside their model; the only place that calls one.

A block's arguments (masks, rotary tables) come from the model's own forward, run once with every block replaced by a
recorder, so no family needs code. A block's forward can be suspended at the first linear of each stage and go on
later with other weights: each linear then multiplies each token once, although the block is quantized stage by stage.
"""

from collections.abc import Callable, Sequence

import torch
from greenlet import getcurrent, greenlet
from torch import nn


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


def run_block(block: nn.Module, hidden: torch.Tensor, arguments: tuple) -> torch.Tensor:
    """The block's output hidden states; some blocks return them alone, some in a tuple."""
    args, kwargs = arguments
    out = block(hidden, *args, **kwargs)
    return out[0] if isinstance(out, tuple) else out


class SuspendedForwards:
    """Forwards of many batches through one block, all halted before the same stage.

    Args:
        block: The decoder block, with weights.
        inputs: Hidden states of each batch.
        arguments: The block's other arguments for each batch.
        stages: Linears of the block that read the same tensor, in the order in which they run.
    """

    def __init__(self, block, inputs, arguments, stages: Sequence[Sequence[nn.Module]]):
        self.block, self.inputs, self.arguments = block, inputs, arguments
        self._runs: list[greenlet | None] = [None] * len(inputs)
        self._reached: dict[greenlet, dict[int, torch.Tensor]] = {}
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
        for run in self._runs:  # a run that an error left halfway would keep its activations alive
            if run is not None and not run.dead:
                run.throw()

    def _halt(self, stage, x):
        run = getcurrent()
        reached = self._reached.get(run)
        if reached is None:  # another set of forwards through the same block
            return
        if stage in reached:
            assert reached[stage] == x.data_ptr(), "linears of one stage read different tensors: the family is wrong"
            return
        reached[stage] = x.data_ptr()
        run.parent.switch(x)

    def advance(self, i: int) -> torch.Tensor:
        """Runs batch i up to its next halt.

        Returns:
            The tensor (batch, T, I) that the next stage's linears are about to read; the block's output at the end.
        """
        run = self._runs[i]
        if run is None:
            run = self._runs[i] = greenlet(lambda: run_block(self.block, self.inputs[i], self.arguments[i]))
            self._reached[run] = {}
        out = run.switch()
        if run.dead:
            del self._reached[run]
        return out
