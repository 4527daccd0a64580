"""A quantized matrix before packing: integer codes and the grid they index.

`dequantize = scale * (code - zero)`, rows are outputs. Legend: O outputs, I inputs, G groups.
"""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class QuantizedTensor:
    """Codes of one linear on a uniform grid.

    Attributes:
        codes: (O, I) uint8, each in 0..2**bits-1.
        scale: (O, G) float32 whose values are exactly representable in fp16 (what the file stores); may be negative.
        zero: (O, G) float32; whole numbers in 0..2**bits-1, or 0.5 for the one-bit grid of values +-scale/2.
        g_idx: (I,) int32, the group of each input column.
        bits: Width of a code.
        group_size: Columns per group as asked for (-1: one group per row); the last group of a row may be shorter.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    g_idx: torch.Tensor
    bits: int
    group_size: int

    def __post_init__(self):
        O, I = self.codes.shape
        G = self.scale.shape[1]
        assert self.codes.dtype == torch.uint8 and int(self.codes.max()) < 2**self.bits
        assert self.scale.shape == self.zero.shape == (O, G) and self.scale.dtype == self.zero.dtype == torch.float32
        assert torch.equal(self.scale, self.scale.half().float()), "scales must be exact in fp16"
        assert bool(torch.isfinite(self.scale).all())
        assert self.g_idx.shape == (I,) and self.g_idx.dtype == torch.int32 and int(self.g_idx.max()) < G

    def dequantize(self) -> torch.Tensor:
        """(O, I) float32 values; one multiplication and one subtraction per weight, so the result is exact in order."""
        g = self.g_idx.long()
        return self.scale[:, g] * (self.codes.float() - self.zero[:, g])

    def rows(self, part: slice) -> "QuantizedTensor":
        """The same for some of the outputs."""
        return replace(self, codes=self.codes[part], scale=self.scale[part], zero=self.zero[part])
