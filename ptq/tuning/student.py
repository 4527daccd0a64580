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
        budget: Bytes of activations kept in memory; the rest is spilled. None for no limit. As many bytes of codes, and
            as many of what is trained, stay in memory between steps.
        codes: Train codes beside scales.

    Attributes:
        trained: What is trained, of all blocks.
    """

    def __init__(self, model: StreamedModel, codec, work: WorkFolder, budget: int | None, *, codes: bool):
        self.model, self.codec, self.work, self.budget = model, codec, work, budget
        self._held: dict[int, dict[str, QuantizedTensor | BlockTensor]] = {}
        self._bytes = 0
        self.trained = TrainedBlocks(self._spill("trained"), budget, codes=codes)
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

    def backward(self, text: Text, batches: Sequence[int], take: Callable[[int, list[torch.Tensor]], None]) -> float:
        """The mean divergence over some batches, and its gradients.

        Args:
            text: From `open`.
            batches: Those that count.
            take: Called for every block, the last one first, with its number and the gradients of what is trained in
                it; not where the divergence is not finite.
        """
        entering = ActivationStore(self._spill("entering"), self._share)
        leaving = self._forward(text, batches, entering)
        losses, gradients = zip(
            *(self._head(hidden, text.teacher[b]) for b, hidden in zip(batches, leaving, strict=True)), strict=True
        )
        predictions, gradients = _predictions(leaving), list(gradients)
        divergence = sum(losses) / predictions
        if isfinite(divergence):
            for i in reversed(range(len(self.model.blocks))):
                take(i, self._block_gradients(i, text, batches, entering, gradients, predictions))
        return divergence

    def _block_gradients(self, i, text, batches, entering, gradients, predictions):
        """Gradients of what is trained in block i; those of each batch's states go from its end to its start."""
        with self._block(i) as (block, linears):
            with torch.enable_grad():
                values = {name: linear.values() for name, linear in linears.items()}
            W = {name: value.detach().to(self.model.dtype) for name, value in values.items()}
            trained = [name for name, value in values.items() if value.requires_grad]
            inputs = [W[name].requires_grad_() for name in trained]
            sums = [torch.zeros_like(values[name]) for name in trained]
            if not inputs and i == 0:
                return []
            for k, b in enumerate(batches):
                with torch.enable_grad():
                    hidden = entering[i * len(batches) + k].to(self.model.device).requires_grad_(i > 0)
                    out = run_block(block, hidden, text.arguments[b][i], self._parameters(W))
                wanted = [*inputs, hidden] if i > 0 else inputs
                found = torch.autograd.grad(out, wanted, gradients[k])
                gradients[k] = found[-1]
                for of_linear, gradient in zip(sums, found[: len(sums)], strict=True):
                    of_linear += gradient
            leaves = [leaf for linear in linears.values() for leaf in linear.leaves().values()]
            ends = [of_linear / predictions for of_linear in sums]
            return torch.autograd.grad([values[name] for name in trained], leaves, ends) if leaves else []

    def divergence(self, text: Text, batches: Sequence[int]) -> float:
        """Mean divergence over some batches."""
        leaving = self._forward(text, batches)
        pairs = zip(batches, leaving, strict=True)
        return sum(self._head(x, text.teacher[b], backward=False)[0] for b, x in pairs) / _predictions(leaving)

    def _forward(self, text, batches, entering=None) -> list[torch.Tensor]:
        """What leaves the last block for some batches; what enters each block is kept in `entering`."""
        states = [text.embedded[b].to(self.model.device) for b in batches]
        for i in range(len(self.model.blocks)):
            with self._block(i) as (block, linears):
                W = {name: linear.values().to(self.model.dtype) for name, linear in linears.items()}
                values = self._parameters(W)
                for k, b in enumerate(batches):
                    if entering is not None:
                        entering.append(states[k])
                    states[k] = run_block(block, states[k], text.arguments[b][i], values)
        return states

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
        if self.budget is None or self._bytes + size <= self.budget:
            self._held[i] = found
            self._bytes += size
        return found

    def _spill(self, name):
        return self.work.folder / "activations" / name

    @property
    def _share(self):
        return self.budget and self.budget // 3


def _predictions(states):
    return sum(x.shape[0] * x.shape[1] for x in states)


def _on(qt, device):
    if isinstance(qt, BlockTensor):
        return replace(qt, codes=qt.codes.to(device), params=tuple(p.to(device) for p in qt.params))
    parts = {name: getattr(qt, name).to(device) for name in ("codes", "scale", "zero", "g_idx")}
    return replace(qt, **parts)
