"""A quantized matrix before packing: integer codes and the grid they index. Rows are outputs.

Legend: O outputs, I inputs, G groups, S spans.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ptq.grids.grid import BlockGrid, Params

MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class QuantizedTensor:
    """Codes of one linear on a uniform grid: dequantize = scale * (code - zero).

    Attributes:
        codes: (O, I) uint8, each in 0..2**bits-1; 0, 1, 2 of the ternary grid.
        scale: (O, G) float32 whose values are exactly representable in fp16 (what the file stores); may be negative.
        zero: (O, G) float32; whole numbers in 0..2**bits-1, or 0.5 for the one-bit grid of values +-scale/2.
        g_idx: (I,) int32, the group of each input column.
        bits: Width of a code; 1.58 of the ternary grid.
        group_size: Columns per group as asked for (-1: one group per row); the last group of a row may be shorter.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    g_idx: torch.Tensor
    bits: float
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
        g, values = self.g_idx.long(), torch.empty(self.codes.shape, device=self.codes.device)
        step = max(1, MEBIBYTE // self.codes.shape[1])  # some rows at a time: the whole in three copies is large
        for first in range(0, len(values), step):
            part = slice(first, first + step)
            codes = self.codes[part].float().sub_(self.zero[part][:, g])
            torch.mul(self.scale[part][:, g], codes, out=values[part])
        return values

    def rows(self, part: slice) -> "QuantizedTensor":
        """The same for some of the outputs."""
        return replace(self, codes=self.codes[part], scale=self.scale[part], zero=self.zero[part])

    def gathered(self, gather: Callable[..., torch.Tensor]) -> "QuantizedTensor":
        """All outputs, where each rank holds some; `gather(tensor, dim)` as Ranks has it."""
        return replace(self, codes=gather(self.codes), scale=gather(self.scale), zero=gather(self.zero))

    @staticmethod
    def stack(parts: Sequence["QuantizedTensor"]) -> "QuantizedTensor":
        """Several linears that differ in their outputs alone, as one."""
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "scale", "zero")}
        return replace(parts[0], **joined)


@dataclass(frozen=True)
class BlockTensor:
    """Codes of one linear on a grid of blocks, such as llama.cpp's.

    Attributes:
        codes: (O, I) uint8.
        params: What the file stores for a span, one tensor (S, ..., O) for each kind of number.
        grid: Whose codes and numbers these are; I is a multiple of its span.
    """

    codes: torch.Tensor
    params: Params
    grid: BlockGrid

    def dequantize(self) -> torch.Tensor:
        """(O, I) float32 values, the file format's own arithmetic."""
        span, width = self.grid.span, self.grid.columns_per_step(self.grid.span)
        values = []
        for s, codes in enumerate(self.codes.T.float().split(span)):
            scale, zero = (p.repeat_interleave(width, 0) for p in self.grid.steps(tuple(p[s] for p in self.params)))
            values.append(self.grid.decode(codes, scale, zero))
        return torch.cat(values).T.contiguous()

    def rows(self, part: slice) -> "BlockTensor":
        """The same for some of the outputs."""
        return replace(self, codes=self.codes[part], params=tuple(p[..., part] for p in self.params))

    def gathered(self, gather: Callable[..., torch.Tensor]) -> "BlockTensor":
        """All outputs, where each rank holds some; `gather(tensor, dim)` as Ranks has it."""
        return replace(self, codes=gather(self.codes), params=tuple(gather(p, -1) for p in self.params))

    @staticmethod
    def stack(parts: Sequence["BlockTensor"]) -> "BlockTensor":
        """Several linears that differ in their outputs alone, as one."""
        params = tuple(torch.cat(p, -1) for p in zip(*(part.params for part in parts), strict=True))
        return replace(parts[0], codes=torch.cat([part.codes for part in parts]), params=params)


def digest(values: torch.Tensor) -> str:
    """Sha256 of fp32 values row by row; -0 counts as 0, since a mirrored grid may hold either."""
    sha = hashlib.sha256()
    step = max(1, MEBIBYTE // max(1, values.shape[1]))
    for rows in values.split(step):
        sha.update((rows + 0.0).contiguous().cpu().numpy().data)
    return sha.hexdigest()
