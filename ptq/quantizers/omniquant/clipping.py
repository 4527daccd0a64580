"""Learnable weight clipping (LWC): the range that a group's grid spans is shrunk by two learned factors.

With gamma, beta in (0, 1) sigmoids of what is learned (OmniQuant, arXiv 2308.13137, equation 2):

    scale = (gamma max(w) - beta min(w)) / (2^bits - 1),   zero = -round(beta min(w) / scale)

Rounding passes gradients straight through; the zero point gets none, as in the original's code. At gamma = beta = 1 the
grid is that of plain round-to-nearest. The scale is rounded to fp16 at every step: what is trained is what the file
holds. A symmetric grid spans the larger of the two clipped ends on both sides.

Legend: O outputs, I inputs, G groups, g columns of a group.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ptq.grids.affine import AffineGrid, half_exact
from ptq.qtensor import QuantizedTensor
from ptq.quantizers.omniquant.rounding import Rounded

START = 4.0  # sigmoid(4) = 0.982: nearly the full range, and a slope that still lets go of it
SMALLEST_SCALE = 2.0**-23


@dataclass(frozen=True)
class Groups:
    """A weight cut into groups: values (O, G, g), a shorter last group filled with zeros; low and high (O, G, 1).

    Every range holds 0, so the filling changes none.
    """

    values: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    inputs: int

    @classmethod
    def of(cls, W: torch.Tensor, width: int) -> "Groups":
        """Cuts W (O, I) into groups of `width` columns."""
        O, I = W.shape
        values = (F.pad(W, (0, -I % width)) if I % width else W).reshape(O, -1, width)
        low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
        return cls(values, low.clamp(max=0), high.clamp(min=0), I)

    def joined(self, values: torch.Tensor) -> torch.Tensor:
        """(O, G, g) back to (O, I)."""
        return values.reshape(len(values), -1)[:, : self.inputs]


class Clipping:
    """The learned bounds of all groups of a block's linears.

    Args:
        weights: The linears' weights in groups, by name; later calls bring the same names and shapes.
        grid: The linears' grid, of two bits or more.

    Attributes:
        logits: (2, groups of all linears) fp32, those of gamma and of beta; a leaf that takes gradients.
    """

    def __init__(self, weights: Mapping[str, Groups], grid: AffineGrid):
        self.grid, self.counts = grid, [cut.low.numel() for cut in weights.values()]
        device = next(iter(weights.values())).low.device
        self.logits = torch.full((2, sum(self.counts)), START, device=device, requires_grad=True)

    def grids(self, weights: Mapping[str, Groups]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Scale and zero of each linear's groups, each (O, G, 1)."""
        low = torch.cat([cut.low.view(-1) for cut in weights.values()])
        high = torch.cat([cut.high.view(-1) for cut in weights.values()])
        gamma, beta = self.logits.sigmoid()
        scale, zero = self._grid(gamma * high, beta * low)
        parts = zip(weights.items(), scale.split(self.counts), zero.split(self.counts), strict=True)
        return {name: (s.view_as(cut.low), z.view_as(cut.low)) for (name, cut), s, z in parts}

    def _grid(self, high, low):
        span = 2 * torch.maximum(high, -low) if self.grid.sym else high - low
        scale = (span / self.grid.top).clamp(min=SMALLEST_SCALE)
        scale = scale + (half_exact(scale.detach()) - scale.detach())  # exactly the second: the two are neighbours
        if self.grid.sym:
            return scale, torch.full_like(scale, self.grid.middle)
        return scale, (-low.detach() / scale.detach()).round_().clamp_(0, self.grid.top)

    def fake_quantize(self, weights: Mapping[str, Groups]) -> dict[str, torch.Tensor]:
        """(O, I) values of each rounded weight; gradients flow to the bounds, and to the weights that take them."""
        return {
            name: weights[name].joined(Rounded.apply(weights[name].values, scale, zero, self.grid.top))
            for name, (scale, zero) in self.grids(weights).items()
        }

    @torch.no_grad()
    def materialise(self, weights: Mapping[str, Groups], group_size: int) -> dict[str, QuantizedTensor]:
        """The same values as codes."""
        return {
            name: self._encode(weights[name], scale, zero, group_size)
            for name, (scale, zero) in self.grids(weights).items()
        }

    def _encode(self, cut, scale, zero, group_size):
        codes = cut.joined(self.grid.encode(cut.values, scale, zero)).to(torch.uint8).contiguous()
        g_idx = torch.arange(cut.inputs, dtype=torch.int32, device=codes.device) // cut.values.shape[-1]
        return QuantizedTensor(codes, scale.squeeze(-1), zero.squeeze(-1), g_idx, self.grid.bits, group_size)
