"""Training one block: its linears on their grids, the rest as it is, against the full-precision block's outputs.

The block is Hugging Face's, untouched: rounded weights are handed to it by `torch.func.functional_call`. One row of
text a step, rows in order, AdamW without decay, the mean squared error of the block's output: the original's loop.
What it does not do: move activations between blocks, or know which block this is.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite

import torch
from torch import nn
from torch.nn import functional as F

from calibration.capture import run_block
from calibration.products import bf16_products
from ptq.grids.affine import AffineGrid
from ptq.qtensor import QuantizedTensor
from ptq.quantizers.omniquant.clipping import Clipping, Groups
from ptq.quantizers.omniquant.transform import Transformation


@dataclass(frozen=True)
class TrainedBlock:
    """What a block became.

    Attributes:
        quantized: Each linear by name.
        changed: Other parameters of the block that the transformation changed, by name.
        losses: Mean loss of every finished epoch.
        stopped: Why training ended early, in words; None if it did not.
    """

    quantized: dict[str, QuantizedTensor]
    changed: dict[str, torch.Tensor]
    losses: list[float]
    stopped: str | None


def omniquant(
    block: nn.Module,
    weights: Mapping[str, torch.Tensor],
    inputs: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    arguments: Sequence[tuple],
    spec,
    *,
    transformation: Transformation | None = None,
    transposed: bool = False,
    bf16: bool = False,
    epochs: Iterable[int] | None = None,
) -> TrainedBlock:
    """Quantizes the linears of a block by training their clipping, and its transformation where there is one.

    Args:
        block: The decoder block with its weights; not changed.
        weights: (O, I) weight of each linear that is to be quantized, by name.
        inputs: Hidden states (batch, T, D) of the quantized stream, a batch a step.
        targets: What the block should give for them, of the same shapes.
        arguments: The block's other arguments for each batch.
        spec: QuantSpec: bits, group_size, sym, epochs, lwc_lr, let_lr, aug_loss.
        transformation: Learnable equivalent transformation, or None for clipping alone.
        transposed: The block's linears hold (I, O) weights.
        bf16: Form the products of the block's passes in bf16 (calibration/products.py); those of a fold stay as they
            are, since the file holds their results.
        epochs: range(spec.epochs), perhaps wrapped in a progress bar.
    """
    student = _Student(block, weights, spec, transformation, transposed)
    losses, stopped = [], None
    if spec.epochs:
        epochs = range(spec.epochs) if epochs is None else epochs
        losses, stopped = _train(student, inputs, targets, arguments, spec, epochs, bf16)
    return TrainedBlock(*student.finish(), losses, stopped)


class _Student:
    """The block's parameters as functions of what is learned."""

    def __init__(self, block, weights, spec, transformation, transposed):
        self.block, self.spec, self.transformation, self.transposed = block, spec, transformation, transposed
        self.plain = {name: Groups.of(W.float(), spec.columns_per_group(W.shape[1])) for name, W in weights.items()}
        self.clipping = Clipping(self.plain, AffineGrid(spec.bits, spec.sym))

    def learned(self) -> list[dict]:
        """Parameter groups of the optimizer."""
        groups = [{"params": [self.clipping.logits], "lr": self.spec.lwc_lr}]
        if self.transformation is not None:
            groups.append({"params": self.transformation.parameters(), "lr": self.spec.let_lr})
        return groups

    def rounded(self) -> dict[str, torch.Tensor]:
        """Parameters for a forward of the block, differentiable."""
        weights, others = self._transformed(stored=False)
        values = self.clipping.fake_quantize(weights)
        return others | {f"{name}.weight": Q.T if self.transposed else Q for name, Q in values.items()}

    @torch.no_grad()
    def finish(self):
        """(quantized linears, other changed parameters) by name."""
        weights, others = self._transformed(stored=True)
        return self.clipping.materialise(weights, self.spec.group_size), others

    def _transformed(self, stored):
        """The linears in groups, and the other parameters that the transformation changes."""
        if self.transformation is None:
            return self.plain, {}
        changed = self.transformation.fold(stored=stored)
        weights = {}
        for name, plain in self.plain.items():
            W = changed.pop(f"{name}.weight", None)
            weights[name] = plain if W is None else Groups.of(W, plain.values.shape[-1])
        return weights, changed


def _train(student, inputs, targets, arguments, spec, epochs, bf16):
    """(mean loss of each epoch, why it stopped or None); leaves the student at its last state, or at its best."""
    groups = student.learned()
    leaves = [leaf for group in groups for leaf in group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    losses, best, kept = [], inf, [leaf.detach().clone() for leaf in leaves]
    for epoch in epochs:
        total = 0.0
        for step in range(len(inputs)):
            if student.transformation is not None:
                student.transformation.limit()
            loss = _loss(student, inputs[step], targets[step], arguments[step], spec, bf16)
            value = loss.item()
            if not isfinite(value):
                _restore(leaves, kept)
                return losses, f"the loss is {value} at epoch {epoch + 1}, step {step + 1}"
            optimizer.zero_grad()
            with bf16_products(bf16):
                loss.backward()
            optimizer.step()
            total += value
        if not all(bool(torch.isfinite(leaf).all()) for leaf in leaves):
            _restore(leaves, kept)
            return losses, f"a gradient is not finite at epoch {epoch + 1}, step {len(inputs)}"
        losses.append(total / len(inputs))
        if losses[-1] < best:
            best, kept = losses[-1], [leaf.detach().clone() for leaf in leaves]
    return losses, None


def _loss(student, hidden, target, arguments, spec, bf16):
    """Mean squared error of the block's output.

    With aug_loss the original adds a second such term, against the full-precision block on the same quantized inputs.
    The target is then the mean of the two: |q - a|^2 + |q - b|^2 = 2 |q - (a + b) / 2|^2 + |a - b|^2 / 2, and the last
    term is constant.
    """
    half = hidden.dtype in (torch.bfloat16, torch.float16)
    with torch.enable_grad():
        with torch.autocast(hidden.device.type, dtype=torch.bfloat16, enabled=half):
            weights = student.rounded()
            with bf16_products(bf16):
                out = run_block(student.block, hidden, arguments, weights)
        loss = F.mse_loss(out.float(), target.float())
        return 2 * loss if spec.aug_loss else loss


@torch.no_grad()
def _restore(leaves, kept):
    for leaf, values in zip(leaves, kept, strict=True):
        leaf.copy_(values)
