"""A solved linear as a function of what is trained: real numbers behind its codes, and a factor for each scale.

    value = scale * (1 + factor) * (round(position) - zero)

The position starts inside its code's cell, where the original weight lies; rounding passes gradients straight through,
so a code changes when its position has been pushed out of the cell. The factor makes steps relative to the scale: one
learning rate suits all groups. Scales are rounded to fp16 at every step: what is trained is what the file holds.

Legend: O outputs, I inputs, G groups, g columns of a group.
"""

from dataclasses import replace

import torch
from torch.nn import functional as F

from ptq.grids.affine import half_exact, level_count
from ptq.qtensor import QuantizedTensor

EDGE = 0.45  # how near to its cell's edge, at 0.5, a position may start


class TrainedScales:
    """A linear whose scales are trained and whose codes stay.

    Args:
        start: The solved linear, groups in the order of columns.
        factor: Where an earlier look at the same linear left off; None for no change.

    Attributes:
        factor: (O, G, 1) fp32 relative change of each scale; a leaf that takes gradients.
    """

    def __init__(self, start: QuantizedTensor, factor: torch.Tensor | None = None):
        self.start, self.width = start, _group_width(start)
        self.scale, self.zero = start.scale[..., None], start.zero[..., None]
        self.factor = torch.zeros_like(self.scale, requires_grad=True) if factor is None else factor

    @classmethod
    def near(cls, start: QuantizedTensor, weight: torch.Tensor, edge: float = EDGE) -> "TrainedScales":
        """A solved linear, whatever the original weight."""
        return cls(start)

    def leaves(self) -> dict[str, torch.Tensor]:
        """What an optimizer may change, under the constructor's names."""
        return {"factor": self.factor}

    def values(self) -> torch.Tensor:
        """(O, I) values, differentiable."""
        return self._joined(_Decoded.apply(self._positions(), self._scale(), self.zero))

    @property
    def top(self) -> int:
        """The largest code."""
        return level_count(self.start.bits) - 1

    @torch.no_grad()
    def finish(self) -> QuantizedTensor:
        """The same values as codes and scales."""
        codes = self._joined(self._positions().round()).to(torch.uint8).contiguous()
        return replace(self.start, codes=codes, scale=self._scale().squeeze(-1).contiguous())

    def _scale(self):
        scale = self.scale * (1 + self.factor)
        return scale + (half_exact(scale.detach()) - scale.detach())  # exactly the second: the two are neighbours

    def _positions(self):
        return self._grouped(self.start.codes.float())

    def _grouped(self, W):
        """(O, I) to (O, G, g), a shorter last group filled with zeros."""
        return F.pad(W, (0, -W.shape[1] % self.width)).unflatten(1, (-1, self.width))

    def _joined(self, values):
        return values.flatten(1)[:, : self.start.codes.shape[1]]


class TrainedCodes(TrainedScales):
    """A linear whose codes are trained as well.

    Args:
        start: The solved linear.
        factor: As for TrainedScales.
        position: Where an earlier look at the same linear left off; None for the middle of each code's cell.

    Attributes:
        position: (O, G, g) fp32, between the outermost cells' outer edges; a leaf that takes gradients.
    """

    def __init__(
        self, start: QuantizedTensor, factor: torch.Tensor | None = None, position: torch.Tensor | None = None
    ):
        super().__init__(start, factor)
        middle = super()._positions
        self.position = middle().contiguous().requires_grad_() if position is None else position

    @classmethod
    def near(cls, start: QuantizedTensor, weight: torch.Tensor, edge: float = EDGE) -> "TrainedCodes":
        """A solved linear with each position where in its cell the original weight (O, I) lies, up to an edge."""
        linear, g = cls(start), start.g_idx.long()
        scale = start.scale[:, g]
        offset = weight.float() / torch.where(scale == 0, 1, scale) + start.zero[:, g] - start.codes.float()
        with torch.no_grad():
            linear.position += linear._grouped(offset.clamp_(-edge, edge))
        return linear

    def leaves(self) -> dict[str, torch.Tensor]:
        """What an optimizer may change, under the constructor's names."""
        return {"factor": self.factor, "position": self.position}

    def limit(self):
        """Brings positions that left the range of codes back to its edge; call it after each step."""
        limit_positions(self.position, self.top)

    def _positions(self):
        return self.position


@torch.no_grad()
def limit_positions(position: torch.Tensor, top: int):
    """Brings positions that left the range of codes, 0 to top, back to its edge, in place."""
    position.clamp_(-EDGE, top + EDGE)


class _Decoded(torch.autograd.Function):
    """scale * (round(position) - zero) with d value / d position = scale and d value / d scale = code - zero."""

    @staticmethod
    def forward(ctx, position, scale, zero):
        ctx.save_for_backward(position, scale, zero)  # what is there anyway
        return position.round().sub_(zero).mul_(scale)

    @staticmethod
    def backward(ctx, grad):
        position, scale, zero = ctx.saved_tensors
        grad_position = grad * scale if ctx.needs_input_grad[0] else None
        return grad_position, position.round().sub_(zero).mul_(grad).sum(-1, keepdim=True), None


def _group_width(qt):
    """Columns of a whole group.

    Groups must lie in the order of columns, which desc_act does not keep; the spec refuses the two together.
    """
    inputs, groups = qt.codes.shape[1], qt.scale.shape[1]
    width = inputs if groups == 1 else qt.group_size
    order = torch.arange(inputs, device=qt.g_idx.device, dtype=torch.int32) // width
    assert torch.equal(qt.g_idx, order), "groups are shuffled"
    return width
