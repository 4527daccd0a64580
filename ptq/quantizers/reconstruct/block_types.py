"""A solved linear of llama.cpp's block types as a function of the positions behind its codes.

value = decode(round(position)), the stored numbers of a block as the solver left them. Rounding passes gradients
straight through: a position counts as if values went on evenly between its code's neighbours. Types of codebooks, whose
codes are no steps of anything, stay as they are.

Legend: O outputs, I inputs.
"""

from dataclasses import replace

import torch

from ptq.qtensor import BlockTensor
from ptq.quantizers.reconstruct.parameters import EDGE


class TrainedBlockCodes:
    """A linear of a scalar type whose codes are trained.

    Args:
        start: The solved linear.
        position: Where an earlier look at the same linear left off; None for the middle of each code's cell.

    Attributes:
        position: (I, O) fp32, between the outermost cells' outer edges; a leaf that takes gradients.
    """

    def __init__(self, start: BlockTensor, position: torch.Tensor | None = None):
        self.start = start
        self.position = start.codes.T.float().requires_grad_() if position is None else position

    @classmethod
    def near(cls, start: BlockTensor, weight: torch.Tensor, edge: float = EDGE) -> "TrainedBlockCodes":
        """A solved linear with each position where in its cell the original weight (O, I) lies, up to an edge."""
        linear = cls(start)
        with torch.no_grad():
            slope = linear._slope()
            offset = (weight.float() - linear.values()).T / torch.where(slope == 0, 1, slope)
            linear.position += offset.clamp_(-edge, edge)
        return linear

    def leaves(self) -> dict[str, torch.Tensor]:
        """What an optimizer may change, under the constructor's names."""
        return {"position": self.position}

    def values(self) -> torch.Tensor:
        """(O, I) values, differentiable."""
        decoded = self.start.grid.decode(self.position.detach().round(), *_steps(self.start))
        return _Straight.apply(self.position, decoded, self._slope).T

    @property
    def top(self) -> int:
        """The largest code."""
        return self.start.grid.arithmetic.top

    @torch.no_grad()
    def finish(self) -> BlockTensor:
        """The same values as codes."""
        return replace(self.start, codes=self.position.round().to(torch.uint8).T.contiguous())

    def _slope(self):
        """D value / d position (I, O): half the way from the code below to the one above, the whole way at an end."""
        codes, decode, steps = self.position.detach().round(), self.start.grid.decode, _steps(self.start)
        below, above = (codes - 1).clamp_(min=0), (codes + 1).clamp_(max=self.top)
        return (decode(above, *steps) - decode(below, *steps)) / (above - below)


class Untrained:
    """A linear that stays as the solver left it."""

    top = None

    def __init__(self, start):
        self.start = start

    @classmethod
    def near(cls, start, weight: torch.Tensor, edge: float = EDGE) -> "Untrained":
        """The same for any weight."""
        return cls(start)

    def leaves(self) -> dict[str, torch.Tensor]:
        """Nothing."""
        return {}

    def values(self) -> torch.Tensor:
        """(O, I) values."""
        return self.start.dequantize()

    def finish(self):
        """The solved linear."""
        return self.start


class _Straight(torch.autograd.Function):
    """Decoded values whose derivative in the positions is slope()."""

    @staticmethod
    def forward(ctx, position, decoded, slope):
        ctx.slope = slope
        return decoded.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.slope(), None, None


def _steps(start):
    """Scale and zero of every weight, (I, O) each."""
    grid, width = start.grid, start.grid.columns_per_step(start.grid.span)
    spans = start.codes.shape[1] // grid.span
    pairs = [grid.steps(tuple(p[s] for p in start.params)) for s in range(spans)]
    return tuple(torch.cat(numbers).repeat_interleave(width, 0) for numbers in zip(*pairs, strict=True))
