"""The quantized model with scales that take gradients, streamed: forward block by block, then the blocks in reverse.

What enters each block is kept (spilled past a budget); in reverse each block is computed once more with gradients. So
one block is in memory at a time, beside the output head and the factors of all scales.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from calibration.capture import run_block
from calibration.store import ActivationStore
from ptq.evaluation.stream import LOGIT_ENTRIES, final_states
from ptq.qtensor import QuantizedTensor
from ptq.quantizers.reconstruct.parameters import TrainedScales
from ptq.streamed import StreamedModel
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
        budget: Bytes of activations kept in memory; the rest is spilled. None for no limit. As many bytes of codes stay
            in memory between steps.

    Attributes:
        factors: Of each block by the linear's name, (O, G, 1): what is trained.
    """

    def __init__(self, model: StreamedModel, codec, work: WorkFolder, budget: int | None):
        self.model, self.codec, self.work, self.budget = model, codec, work, budget
        self._held: dict[int, dict[str, QuantizedTensor]] = {}
        self._bytes = 0
        self.factors: list[dict[str, torch.Tensor]] = []
        for i in range(len(model.blocks)):
            linears = self._quantized(i).items()
            self.factors.append({name: TrainedScales(_on(qt, model.device)).factor for name, qt in linears})

    def open(self, batches: Sequence[torch.Tensor]) -> Text:
        """Batches of token rows, made ready for both models."""
        teacher = final_states(
            self.model, batches, spill=self._spill("teacher"), budget=self._share, label="full precision"
        )
        embedded, arguments, by_rows = ActivationStore(self._spill("embedded"), self._share), [], {}
        with self.model.outside(head=False):
            for batch in batches:
                hidden, of_batch = self.model.embed(batch)
                arguments.append(by_rows.setdefault(len(batch), of_batch))
                embedded.append(hidden)
        return Text(embedded, arguments, teacher)

    def backward(self, text: Text, batches: Sequence[int]) -> float:
        """Sets the factors' gradients of the mean divergence over some batches, which is returned."""
        entering = ActivationStore(self._spill("entering"), self._share)
        leaving = self._forward(text, batches, entering)
        losses, gradients = zip(
            *(self._head(hidden, text.teacher[b]) for b, hidden in zip(batches, leaving, strict=True)), strict=True
        )
        gradients, predictions = list(gradients), _predictions(leaving)
        for i in reversed(range(len(self.model.blocks))):
            with self._block(i) as (block, linears):
                leaves = list(self.factors[i].values())
                sums = [torch.zeros_like(leaf) for leaf in leaves]
                for k, b in enumerate(batches):
                    with torch.enable_grad():
                        hidden = entering[i * len(batches) + k].to(self.model.device).requires_grad_(i > 0)
                        out = run_block(block, hidden, text.arguments[b][i], self._values(linears))
                    wanted = [*leaves, hidden] if i > 0 else leaves
                    found = torch.autograd.grad(out, wanted, gradients[k])
                    gradients[k] = found[-1]
                    torch._foreach_add_(sums, list(found[: len(leaves)]))
                for leaf, gradient in zip(leaves, sums, strict=True):
                    leaf.grad = gradient / predictions
        return sum(losses) / predictions

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
                values = self._values(linears)
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

    def _values(self, linears):
        """A block's linears as parameters of its forward."""
        values = {name: linear.values().to(self.model.dtype) for name, linear in linears.items()}
        return {f"{name}.weight": W.T if self.model.family.transposed else W for name, W in values.items()}

    @contextmanager
    def _block(self, i):
        """(block i with all but its linears' weights, its linears)."""
        with self.model.block(i, linears=False) as block:
            yield block, self.linears(i)

    def linears(self, i):
        """The linears of block i with their present factors, by name."""
        linears, factors = self._quantized(i), self.factors[i]
        return {name: TrainedScales(_on(qt, self.model.device), factors[name]) for name, qt in linears.items()}

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
    parts = {name: getattr(qt, name).to(device) for name in ("codes", "scale", "zero", "g_idx")}
    return replace(qt, **parts)
