"""End-to-end tuning: the scales of all blocks, codes frozen, towards the full-precision model's predictions.

The loss is KL(full-precision || quantized) of the next token on calibration text (EfficientQAT, arXiv 2407.11062, tunes
the same numbers on the text itself). A step runs its batches forward block by block and keeps what enters each block;
then the blocks come again in reverse, each computed once more with gradients. So one block is in memory at a time,
beside the output head, the scales' factors and their moments. What is kept is the epoch with the smallest divergence on
rows that took no part.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import cos, isfinite, pi

import torch
from torch.nn import functional as F
from tqdm import tqdm

from calibration.capture import run_block
from calibration.errors import TrainingStopped
from calibration.store import ActivationStore
from ptq.clock import Clock
from ptq.evaluation.stream import LOGIT_ENTRIES, batches_of, final_states
from ptq.qtensor import QuantizedTensor
from ptq.quantizers.reconstruct.parameters import TrainedScales
from ptq.streamed import StreamedModel
from ptq.walk import digest
from ptq.workdir import WorkFolder

STEPS = 16  # of an epoch, at most: each loads every block twice
HELD_BACK = 8  # every so many-th batch is left out of training
WARM_UP = 5  # steps in which the learning rate rises
PATIENCE = 2  # epochs without gain after which tuning ends


@dataclass
class _Text:
    """Calibration batches: what enters the first block, other arguments of every block, the teacher's final states."""

    embedded: ActivationStore
    arguments: list[list[tuple]]
    teacher: ActivationStore


class ScaleTuning:
    """Tunes what a finished walk left in a work folder, and keeps it there.

    Args:
        model: The full-precision model, streamed.
        spec: QuantSpec: tune_epochs, tune_lr, seed.
        codec: Packs QuantizedTensors and back.
        work: Holds every block.
        clock: Gets the seconds.
        budget: Bytes of activations kept in memory; the rest is spilled. None for no limit. As many bytes of codes stay
            in memory between steps.
    """

    def __init__(self, model: StreamedModel, spec, codec, work: WorkFolder, clock: Clock, *, budget: int | None = None):
        self.model, self.spec, self.codec, self.work, self.clock, self.budget = model, spec, codec, work, clock, budget
        self._factors: list[dict[str, torch.Tensor]] = []
        self._held: dict[int, dict[str, QuantizedTensor]] = {}
        self._bytes = 0

    @torch.no_grad()
    def run(self, tokens):
        """Tunes and saves, unless an earlier run did or the spec asks for none.

        Args:
            tokens: (n_samples, seqlen) calibration tokens.

        Raises:
            TrainingStopped: A loss is not finite; the best scales are saved.
        """
        if not self.spec.tune_epochs or self.work.has_tuned:
            return
        with self.clock.phase("tune"):
            text = self._open(batches_of(tokens))
            self._start()
            with self.model.outside(head=True):
                report = self._train(text)
            self._save(report)
        if "stopped" in report:
            raise TrainingStopped(
                f"tuning: {report['stopped']}; the best scales are kept and --resume goes on with them,"
                " or start again with a smaller learning rate"
            )

    def _open(self, batches: Sequence[torch.Tensor]) -> _Text:
        teacher = final_states(
            self.model, batches, spill=self._spill("teacher"), budget=self._share, label="full precision"
        )
        embedded, arguments, by_rows = ActivationStore(self._spill("embedded"), self._share), [], {}
        with self.model.outside(head=False):
            for batch in batches:
                hidden, of_batch = self.model.embed(batch)
                arguments.append(by_rows.setdefault(len(batch), of_batch))
                embedded.append(hidden)
        return _Text(embedded, arguments, teacher)

    def _train(self, text: _Text) -> dict:
        """Leaves the factors at their best; the report."""
        count = len(text.embedded)
        held = list(range(0, count, HELD_BACK)) if count > 1 else [0]
        trained = [b for b in range(count) if b not in held] or held
        size = -(-len(trained) // STEPS)
        leaves = [factor for factors in self._factors for factor in factors.values()]
        optimizer = torch.optim.Adam(leaves, lr=self.spec.tune_lr, fused=True)
        total, generator = self.spec.tune_epochs * -(-len(trained) // size), self._generator()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / WARM_UP) * _cosine(s, total))
        best = self._divergence(text, held)
        report, kept, waited = {"kl_before": best, "kl_epochs": []}, _copies(leaves), 0
        bar = tqdm(range(self.spec.tune_epochs), desc="tuning", unit="epoch", disable=None)
        for epoch in bar:
            order = [trained[b] for b in torch.randperm(len(trained), generator=generator).tolist()]
            for start in range(0, len(order), size):
                loss = self._backward(text, order[start : start + size])
                if not isfinite(loss):
                    report["stopped"] = f"the divergence is {loss} at epoch {epoch + 1}, step {start // size + 1}"
                    break
                optimizer.step()
                schedule.step()
            reached = self._divergence(text, held)
            if "stopped" in report or not isfinite(reached):
                report.setdefault("stopped", f"the divergence is {reached} after epoch {epoch + 1}")
                break
            report["kl_epochs"].append(reached)
            bar.set_postfix_str(f"divergence {reached:.4g} (before {report['kl_before']:.4g})")
            waited += 1
            if reached < best:
                best, kept, waited = reached, _copies(leaves), 0
            if waited == PATIENCE:
                break
        for leaf, values in zip(leaves, kept, strict=True):
            leaf.copy_(values)
        return report | {"kl_after": best}

    def _backward(self, text, batches) -> float:
        """Sets the factors' gradients of the mean divergence over some batches, which is returned."""
        entering = ActivationStore(self._spill("entering"), self._share)
        leaving = self._forward(text, batches, entering)
        losses, gradients = zip(
            *(self._head(hidden, text.teacher[b]) for b, hidden in zip(batches, leaving, strict=True)), strict=True
        )
        gradients, predictions = list(gradients), _predictions(leaving)
        for i in reversed(range(len(self.model.blocks))):
            with self._block(i) as (block, linears):
                leaves = list(self._factors[i].values())
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

    def _divergence(self, text, batches) -> float:
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
            yield block, self._linears(i)

    def _start(self):
        """All factors at 0."""
        for i in range(len(self.model.blocks)):
            linears = self._quantized(i)
            self._factors.append(
                {name: TrainedScales(_on(qt, self.model.device)).factor for name, qt in linears.items()}
            )

    def _linears(self, i):
        """The linears of block i with their present factors, by name."""
        linears, factors = self._quantized(i), self._factors[i]
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

    def _save(self, report):
        scales, entries = {}, {}
        for i in range(len(self.model.blocks)):
            for name, linear in self._linears(i).items():
                full, tuned = self.model.stored_name(i, name), linear.finish()
                scales[f"{full}.scales"] = self.codec.pack(tuned)["scales"].cpu()
                entries[full] = {"sha256": digest(tuned.dequantize())}
        self.work.save_tuned(scales, report | {"linears": entries})

    def _generator(self):
        return torch.Generator().manual_seed(self.spec.seed)

    def _spill(self, name):
        return self.work.folder / "activations" / name

    @property
    def _share(self):
        return self.budget and self.budget // 3


def _cosine(step, steps):
    return (1 + cos(pi * step / steps)) / 2


def _predictions(states):
    return sum(x.shape[0] * x.shape[1] for x in states)


def _on(qt, device):
    parts = {name: getattr(qt, name).to(device) for name in ("codes", "scale", "zero", "g_idx")}
    return replace(qt, **parts)


@torch.no_grad()
def _copies(tensors):
    return [tensor.clone() for tensor in tensors]
