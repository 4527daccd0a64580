"""The quantized model with codes and scales that are trained, streamed: forward block by block, then in reverse.

What enters each block is kept (spilled past a budget); in reverse each block is computed once more with gradients, and
takes its step before the next. So one block's weights are in memory at a time, beside the output head.
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isfinite

import torch
from torch.nn import functional as F

from calibration.capture import run_block
from calibration.products import rounding_once
from calibration.store import ActivationStore
from ptq.evaluation.stream import LOGIT_ENTRIES, final_states
from ptq.qtensor import BlockTensor, QuantizedTensor
from ptq.streamed import StreamedModel
from ptq.tuning.trained import Linear, TrainedBlocks
from ptq.workdir import WorkFolder


@dataclass
class Text:
    """Calibration batches: what enters the first block, other arguments of every block, the teacher's final states."""

    embedded: ActivationStore
    arguments: list[list[tuple]]
    teacher: ActivationStore


class StreamedStudent:
    """The model whose blocks lie in a work folder, beside the full-precision one, its teacher.

    Its methods are called without gradients; `backward` and `divergence` inside model.outside(head=True).

    Args:
        model: The full-precision model, streamed.
        codec: Unpacks QuantizedTensors.
        work: Holds every block.
        budget: Bytes of activations, of codes and of what is trained that stay in memory from one step to the next; the
            rest is spilled. None for no limit.
        codes: Train codes beside scales.

    Attributes:
        trained: What is trained, of all blocks.
    """

    def __init__(self, model: StreamedModel, codec, work: WorkFolder, budget: int | None, *, codes: bool):
        self.model, self.codec, self.work, self.budget = model, codec, work, budget
        self._held: dict[int, dict[str, QuantizedTensor | BlockTensor]] = {}
        self._bytes = 0
        self.trained = TrainedBlocks(self._spill("trained"), self._share, codes=codes)
        for i in range(len(model.blocks)):
            with model.block(i):
                self.trained.add(self._quantized(i), {name: model.weight(i, name) for name in model.family.linears})

    def open(self, batches: Sequence[torch.Tensor], embed: Callable[[torch.Tensor], None] | None = None) -> Text:
        """Batches of token rows, made ready for both models.

        Args:
            batches: Token rows (rows, T).
            embed: Overwrites the loaded embedding (V, D) with the values that the artefact holds; None where those are
                the model's own.
        """
        teacher = final_states(
            self.model, batches, spill=self._spill("teacher"), budget=self._share, label="full precision"
        )
        embedded, arguments, by_rows = ActivationStore(self._spill("embedded"), self._share), [], {}
        with self.model.outside(head=False):
            if embed is not None:
                embed(self.model.embedding_weight)
            for batch in batches:
                hidden, of_batch = self.model.embed(batch)
                arguments.append(by_rows.setdefault(len(batch), of_batch))
                embedded.append(hidden)
        return Text(embedded, arguments, teacher)

    def backward(
        self, text: Text, batches: Sequence[int], take: Callable[[int, str, list[torch.Tensor]], None]
    ) -> float:
        """The mean divergence over some batches, and its gradients.

        Args:
            text: From `open`.
            batches: Those that count.
            take: Called for every linear in which something is trained, those of the last block first, with its block's
                number, its name and the gradients of its leaves; not where the divergence is not finite.
        """
        entering, states = ActivationStore(self._spill("entering"), self._share), []
        self._forward(text, batches, states, entering)
        losses, gradients = zip(
            *(self._head(hidden, text.teacher[b]) for b, hidden in zip(batches, states, strict=True)), strict=True
        )
        predictions, gradients = _predictions(states), list(gradients)
        divergence = sum(losses) / predictions
        if isfinite(divergence):
            for i in reversed(range(len(self.model.blocks))):
                self._block_backward(i, text, batches, entering, gradients, predictions, take)
        return divergence

    def _block_backward(self, i, text, batches, entering, gradients, predictions, take):
        """Gives `take` the gradients of block i; those of each batch's states go from its end to its start.

        Besides the weights one more copy of them is held at most, their gradients, and of one linear what follows.
        """
        with self._block(i) as (block, linears):
            with torch.enable_grad():
                values = self._values(i, linears)
            W = {name: value.detach().to(self.model.dtype) for name, value in values.items()}
            trained = [name for name, value in values.items() if value.requires_grad]
            if not trained and i == 0:
                return
            inputs = [W[name].requires_grad_() for name in trained]
            sums = {name: _Sum(W[name]) for name in trained}
            for k, b in enumerate(batches):
                with torch.enable_grad(), rounding_once(self.model.linear(i, name) for name in W):
                    hidden = entering[i * len(batches) + k].to(self.model.device).requires_grad_(i > 0)
                    out = run_block(block, hidden, text.arguments[b][i], self._parameters(W))
                torch.autograd.backward(out, gradients[k], inputs=[*inputs, hidden] if i > 0 else inputs)
                gradients[k], hidden.grad = hidden.grad, None
            del W, inputs, out
            for name in trained:
                leaves = list(linears[name].leaves().values())
                end = sums.pop(name).total.div_(predictions)
                take(i, name, list(torch.autograd.grad(values.pop(name), leaves, end)))

    def divergence(self, text: Text, batches: Sequence[int]) -> float:
        """Mean divergence over some batches."""
        states = ActivationStore(self._spill("states"), self._share)
        self._forward(text, batches, states)
        pairs = zip(batches, states, strict=True)
        return sum(self._head(x, text.teacher[b], backward=False)[0] for b, x in pairs) / _predictions(states)

    def _forward(self, text, batches, states, entering=None):
        """Puts what leaves the last block for some batches into `states`; what enters each is kept in `entering`."""
        for b in batches:
            states.append(text.embedded[b].to(self.model.device))
        for i in range(len(self.model.blocks)):
            with self._block(i) as (block, linears):
                W = {name: value.to(self.model.dtype) for name, value in self._values(i, linears).items()}
                values = self._parameters(W)
                for k, b in enumerate(batches):
                    hidden = states[k].to(self.model.device)
                    if entering is not None:
                        entering.append(hidden)
                    states[k] = run_block(block, hidden, text.arguments[b][i], values)

    def _head(self, hidden, teacher, *, backward=True):
        """(divergence summed over predictions, its gradient to hidden (rows, T, D)), a few predictions at a time.

        A sum, because the gradient of a mean over many tokens would be too small for fp16.
        """
        shape, step = hidden.shape, max(1, LOGIT_ENTRIES // self.model.config.vocab_size)
        hidden, teacher = hidden.flatten(0, 1)[None], teacher.to(hidden.device).flatten(0, 1)[None]
        total, gradient = 0.0, torch.zeros_like(hidden)
        for start in range(0, hidden.shape[1], step):
            some = slice(start, start + step)
            wanted = self.model.logits(teacher[:, some]).float().log_softmax(-1)
            with torch.set_grad_enabled(backward):
                leaf = hidden[:, some].detach().requires_grad_(backward)
                found = self.model.logits(leaf).float().log_softmax(-1)
                loss = F.kl_div(found, wanted, reduction="sum", log_target=True)
            total += loss.item()
            if backward:
                gradient[:, some] = torch.autograd.grad(loss, leaf)[0]
        return total, gradient.view(shape)

    def _values(self, i, linears):
        """Weights (O, I) of block i as they are now, by linear."""
        values = {}
        for name, linear in linears.items():
            values[name] = linear.values()
            self.trained.let_go(i, name)
        return values

    def _parameters(self, W):
        """Weights (O, I) by linear as parameters of a block's forward."""
        return {f"{name}.weight": value.T if self.model.family.transposed else value for name, value in W.items()}

    @contextmanager
    def _block(self, i):
        """(block i with all but its linears' weights, its linears)."""
        with self.model.block(i, linears=False) as block:
            yield block, self.linears(i)

    def linears(self, i: int) -> dict[str, Linear]:
        """The linears of block i as they are now, by name."""
        return self.trained.linears(i, {name: _on(qt, self.model.device) for name, qt in self._quantized(i).items()})

    def _quantized(self, i):
        """The linears of block i by name, as the walk left them; kept while there is room."""
        if i in self._held:
            return self._held[i]
        packed, found = self.work.load_block(i), {}
        for name in self.model.family.linears:
            prefix = self.model.stored_name(i, name) + "."
            found[name] = self.codec.unpack(
                {k.removeprefix(prefix): v for k, v in packed.items() if k.startswith(prefix)}
            )
        size = sum(qt.codes.nbytes for qt in found.values())
        if self._share is None or self._bytes + size <= self._share:
            self._held[i] = found
            self._bytes += size
        return found

    def _spill(self, name):
        return self.work.folder / "activations" / name

    @property
    def _share(self):
        """Of the budget: for codes, what is trained, the teacher's states, embedded text, and states on their way."""
        return self.budget and self.budget // 5


class _Sum:
    """The sum in fp32 of a leaf's gradients, each taken as soon as it is there.

    Args:
        leaf: Keeps no gradient itself.
    """

    def __init__(self, leaf: torch.Tensor):
        self.total = None
        leaf.register_post_accumulate_grad_hook(self._take)

    def _take(self, leaf):
        gradient, leaf.grad = leaf.grad.float(), None
        self.total = gradient if self.total is None else self.total.add_(gradient)


def _predictions(states):
    return sum(x.shape[0] * x.shape[1] for x in states)


def _on(qt, device):
    if isinstance(qt, BlockTensor):
        return replace(qt, codes=qt.codes.to(device), params=tuple(p.to(device) for p in qt.params))
    parts = {name: getattr(qt, name).to(device) for name in ("codes", "scale", "zero", "g_idx")}
    return replace(qt, **parts)
