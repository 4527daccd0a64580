"""The two streams of activations that a walk takes through the blocks, and how they go through one of them.

Both are halted before each stage of a block. The block has one set of weights: the full-precision stream runs ahead
through a stage with the original weights, then the stage's quantized weights are written and the quantized stream
follows. Each linear multiplies each token once in each stream.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

from calibration.capture import SuspendedForwards
from calibration.hessian import Hessian
from calibration.store import ActivationStore
from ptq.memory import release_freed
from ptq.streamed import StreamedModel

RELEASE_EVERY = 4  # batches: what they freed lies between what halted forwards keep, and was a tenth of a small peak


def rows_of_batch(model: StreamedModel, tokens: torch.Tensor) -> int:
    """How many rows of tokens (n_samples, seqlen) a forward takes at once."""
    return max(1, model.batch_tokens // tokens.shape[1])


@dataclass
class Streams:
    """Activations entering the current block, and every block's other arguments for each batch.

    Attributes:
        quantized: Of the model whose earlier blocks are quantized.
        full: Of the full-precision model; None where nothing needs them.
        arguments: Of each batch, of every block.
        budget: Bytes of activations kept in memory; the rest is spilled. None for no limit. Half goes to what lies
            between blocks, half to forwards halted inside one; either half is shared by the two streams.
        spill: Where the rest goes.
        most_held: What halted forwards of a stream kept at most in the blocks so far, bytes; None before the first.
    """

    quantized: ActivationStore
    full: ActivationStore | None
    budget: int | None
    spill: Path
    most_held: int | None = None
    arguments: list[list[tuple]] = field(default_factory=list)

    def __iter__(self):
        return iter([self.quantized] if self.full is None else [self.quantized, self.full])

    def at(self, block: int) -> list[tuple]:
        """Arguments of one block, batch by batch."""
        return [of_batch[block] for of_batch in self.arguments]

    @property
    def share(self) -> int | None:
        """Bytes of each stream, between blocks and inside one."""
        return self.budget and self.budget // 4

    @property
    def may_park(self) -> bool:
        """Whether halted forwards are watched, to be parked: not where twice what they ever kept has room."""
        return self.budget is not None and (self.most_held is None or 2 * self.most_held > self.share)


def open_streams(
    model: StreamedModel, batches: Sequence[torch.Tensor], spill: Path, budget: int | None,
    *, two: bool, embed: Callable[[torch.Tensor], None] | None = None,
) -> Streams:  # fmt: skip
    """Embeds batches of token rows.

    Args:
        model: The model, streamed.
        batches: Token rows (rows, T).
        spill: Folder for activations past the budget.
        budget: Bytes of activations kept in memory; None for no limit.
        two: Have a full-precision stream as well.
        embed: Overwrites the loaded embedding (V, D) with the values that the artefact holds; None where those are
            the model's own.
    """
    quantized, *full = (ActivationStore(spill / n, budget and budget // 4) for n in ["quantized", "full"][: 1 + two])
    streams, by_rows = Streams(quantized, full[0] if two else None, budget, spill), {}
    with model.outside(head=False):
        for batch in batches:
            hidden, arguments = model.embed(batch)
            streams.arguments.append(by_rows.setdefault(len(batch), arguments))
            for store in streams:
                store.append(hidden)
        if embed is not None:
            embed(model.embedding_weight)
            for b, batch in enumerate(batches):
                streams.quantized[b], _ = model.embed(batch)
    return streams


class BlockForwards:
    """Both streams on their way through a block that is loaded, stage by stage; a context.

    Args:
        model: The model, streamed.
        i: The block.
        streams: What enters the block; in the end, what leaves it.
        products: Gives a context for the work of a phase, by its name.
        bf16: Whether linears multiply in bf16 there. What they read is then kept so, where it is wider than the hidden
            states; one that is not may be these states themselves, which others read as well.
        keep: Gives a context for many forwards, in which the memory of one may be kept for the next.
    """

    def __init__(
        self, model: StreamedModel, i: int, streams: Streams, products: Callable,
        *, bf16: bool = False, keep: Callable = nullcontext,
    ):  # fmt: skip
        self.model, self.i, self.streams, self.products, self.bf16, self.keep = model, i, streams, products, bf16, keep

    def __enter__(self):
        with ExitStack() as opened:  # what goes wrong on the way to the first halt ends both
            self.quantized, *self.full = (opened.enter_context(self._through(store)) for store in self.streams)
            self._run_ahead(self.full, self.streams.full)
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *error):
        held = [forwards.most_held for forwards in (self.quantized, *self.full)]
        self.streams.most_held = max(self.streams.most_held or 0, *held)
        return self._opened.__exit__(*error)

    def sum_inputs(self, hessian: Hessian):
        """Runs the quantized stream up to the next stage and sums what that will read.

        What the full-precision stream reads is needed here alone: it goes on to its next halt at once, since a
        stage's inputs may be wider than its outputs.
        """
        with self.keep():
            for b in range(len(self.quantized)):
                with self.products("forward"):
                    x = self.quantized.advance(b)
                with self.products("hessian"):
                    hessian.add(x, *(forwards.reads(b) for forwards in self.full))
                if self.bf16 and x.shape[-1] > self.model.config.hidden_size:
                    self.quantized.round(b)
                self._settle(self.quantized, b)
                for forwards in self.full:
                    self._advance(forwards, b, self.streams.full)
                if b % RELEASE_EVERY == RELEASE_EVERY - 1:
                    release_freed()

    def finish(self):
        """Takes the quantized stream out of the block."""
        self._run_ahead([self.quantized], self.streams.quantized)

    def _through(self, store):
        """One stream's forwards, halting at the stages."""
        model, streams = self.model, self.streams
        modules = [[model.linear(self.i, name) for name in stage] for stage in model.family.stages]
        parking = streams.spill / f"halted-{store.name}" if streams.may_park else None
        inputs = store.on(model.device)
        return SuspendedForwards(
            model.blocks[self.i], inputs, streams.at(self.i), modules, parking=parking, budget=streams.share
        )

    def _run_ahead(self, several, store):
        """Runs every batch up to its next halt."""
        with self.keep():
            for forwards in several:
                for b in range(len(forwards)):
                    self._advance(forwards, b, store)

    def _advance(self, forwards, b, store):
        """Runs a batch up to its next halt; what comes out of the block's end enters the next one."""
        with self.products("forward"):
            out = forwards.advance(b)
            if forwards.done(b):
                store[b] = out
            else:
                self._settle(forwards, b)

    def _settle(self, forwards, b):
        """What a halted batch keeps may go to disk, and what it still holds of a file is read again."""
        forwards.settle(b)
        forwards.inputs.let_go(b)
