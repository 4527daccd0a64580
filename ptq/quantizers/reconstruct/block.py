"""Block reconstruction: codes and scales of a solved block, trained against the full-precision block's outputs.

Training starts from the solver's codes, not from rounding, and moves them by gradients of the mean squared error of the
block's output: straight-through rounding as in EfficientQAT's Block-AP (arXiv 2407.11062), a bounded position behind
each code as in SignRound (arXiv 2309.05516). Inputs come from the quantized stream, targets from the full-precision
one. Learning rates fall linearly to nothing, so the last state is nearly always the best.

What this does not do: move activations between blocks, or decide whether what was trained is kept.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite

import torch
from torch import nn
from torch.nn import functional as F

from calibration.capture import run_block
from ptq.qtensor import QuantizedTensor
from ptq.quantizers.reconstruct.parameters import TrainedCodes


def reconstruct(
    block: nn.Module,
    start: Mapping[str, QuantizedTensor],
    weights: Mapping[str, torch.Tensor],
    inputs: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    arguments: Sequence[tuple],
    spec,
    *,
    batches: Sequence[int],
    generator: torch.Generator,
    transposed: bool = False,
    epochs: Iterable[int] | None = None,
) -> tuple[dict[str, QuantizedTensor], str | None]:
    """Trains codes and scales of a block's linears.

    Args:
        block: The decoder block; not changed.
        start: The solved linears by name.
        weights: (O, I) original weight of each.
        inputs: Hidden states (batch, T, D) of the quantized stream, a batch a step.
        targets: What the block should give for them, of the same shapes.
        arguments: The block's other arguments for each batch.
        spec: QuantSpec: reconstruct_epochs, code_lr, scale_lr.
        batches: Those to train on.
        generator: Draws their order.
        transposed: The block's linears hold (I, O) weights.
        epochs: range(spec.reconstruct_epochs), perhaps wrapped in a progress bar.

    Returns:
        The linears by name, and why training ended early, in words, or None. After such an end they are those of
        `start`.
    """
    linears = {name: TrainedCodes.near(start[name], weights[name]) for name in start}
    dtype = next(block.parameters()).dtype
    groups = [
        {"params": [linear.factor for linear in linears.values()], "lr": spec.scale_lr},
        {"params": [linear.position for linear in linears.values()], "lr": spec.code_lr},
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), fused=True)
    steps = max(1, spec.reconstruct_epochs * len(batches))
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for epoch in range(spec.reconstruct_epochs) if epochs is None else epochs:
        for step, k in enumerate(torch.randperm(len(batches), generator=generator).tolist(), 1):
            b = batches[k]
            with torch.enable_grad():
                values = {name: linear.values().to(dtype) for name, linear in linears.items()}
                parameters = {f"{name}.weight": W.T if transposed else W for name, W in values.items()}
                out = run_block(block, inputs[b], arguments[b], parameters)
                loss = F.mse_loss(out.float(), targets[b].float())
            if not isfinite(loss.item()):
                return dict(start), f"the loss is {loss.item()} at epoch {epoch + 1}, step {step} of reconstruction"
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
            for linear in linears.values():
                linear.limit()
    if not all(bool(torch.isfinite(leaf).all()) for linear in linears.values() for leaf in linear.leaves().values()):
        return dict(start), "a gradient of reconstruction is not finite"
    return {name: linear.finish() for name, linear in linears.items()}, None
