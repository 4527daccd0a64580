"""One `QuantizedTensor` as the four tensors of a GPTQ linear, and back, without a second rounding.

`qweight` int32 (I*bits/32, O), `qzeros` int32 (G, O*bits/32), `scales` fp16 (G, O), `g_idx` int32 (I,).
The file's grid is scale * (code - zero) with whole zeros. checkpoint_format "gptq" (v1) stores zero-1 modulo 2^bits,
"gptq_v2" stores zero. Two grids are rewritten to fit, value for value:

- v1, zero 0: would be stored as all ones, which readers that do not wrap take for 2^bits. Such groups are mirrored:
  s*(q-0) == -s*(q'-zero') with q' = 2^bits-1-q and zero' = 2^bits-1.
- one bit: there are no one-bit words, so s*(q-zero) is held in 2-bit words as s/2*(2q-2*zero).
- ternary: -s, 0, s are the codes 1, 2, 3 of a symmetric 2-bit grid; the code 0 does not occur.

Names and shards of files are not known here. Legend: O outputs, I inputs, G groups.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from calibration.errors import InputError
from ptq.export.packing import pack_columns, pack_rows, unpack_columns, unpack_rows
from ptq.grids.affine import TERNARY
from ptq.qtensor import QuantizedTensor

CHECKPOINT_FORMATS = ("gptq", "gptq_v2")


def packed_bits(bits: float) -> int:
    """Width of a code in the file."""
    return 2 if bits in (1, TERNARY) else bits


@dataclass(frozen=True)
class GptqCodec:
    """Packs and unpacks the linears of one artefact.

    Attributes:
        bits: Width of a code before packing.
        group_size: As in the artefact's config.
        checkpoint_format: "gptq" or "gptq_v2".
    """

    bits: float
    group_size: int
    checkpoint_format: str

    def grid(self, linear: str, inputs: int) -> None:
        """The uniform groups that the spec names: no grid of its own."""

    def pack(self, qt: QuantizedTensor) -> dict[str, torch.Tensor]:
        """The four tensors of a linear."""
        return to_gptq(qt, self.checkpoint_format)

    def unpack(self, parts: Mapping[str, torch.Tensor]) -> QuantizedTensor:
        """A linear from its four tensors; equal values to what was packed, on the same grid."""
        return _narrowed(from_gptq(parts, packed_bits(self.bits), self.group_size, self.checkpoint_format), self.bits)


def to_gptq(qt: QuantizedTensor, checkpoint_format: str) -> dict[str, torch.Tensor]:
    """Pack codes and grid; the result dequantizes to the same values.

    Raises:
        InputError: I or O does not fill whole words, or a one-bit scale has no exact half in fp16.
    """
    assert qt.scale.shape[1] == _group_count(qt.g_idx.numel(), qt.group_size)
    qt = _widened(qt)
    if checkpoint_format == "gptq":
        qt = _mirror_zero_groups(qt)
    zeros = qt.zero.T.to(torch.uint8)
    assert torch.equal(zeros.float(), qt.zero.T) and int(zeros.max()) < 2**qt.bits, "the file holds whole zeros only"
    return {
        "qweight": pack_rows(qt.codes.T, qt.bits),
        "qzeros": pack_columns(_shift_zeros(zeros, -1, qt.bits, checkpoint_format), qt.bits),
        "scales": qt.scale.T.half().contiguous(),
        "g_idx": qt.g_idx,
    }


def from_gptq(
    tensors: Mapping[str, torch.Tensor], bits: int, group_size: int, checkpoint_format: str
) -> QuantizedTensor:
    """Unpack one linear; `bits` is the width in the file, so one-bit and ternary grids come back as 2 bits."""
    g_idx = tensors["g_idx"]
    G, O = tensors["scales"].shape
    expected = _group_count(g_idx.numel(), group_size)
    if G != expected:
        raise InputError(f"scales has {G} groups, but {g_idx.numel()} inputs by group_size {group_size}: {expected}")
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= G:
        raise InputError(f"g_idx spans {int(g_idx.min())}..{int(g_idx.max())}, outside the {G} groups of scales")
    zeros = _shift_zeros(unpack_columns(tensors["qzeros"], bits, O), 1, bits, checkpoint_format)
    return QuantizedTensor(
        codes=unpack_rows(tensors["qweight"], bits, g_idx.numel()).T.contiguous(),
        scale=tensors["scales"].T.float().contiguous(),
        zero=zeros.T.float().contiguous(),
        g_idx=g_idx,
        bits=bits,
        group_size=group_size,
    )


def _shift_zeros(zeros: torch.Tensor, step: int, bits: int, checkpoint_format: str) -> torch.Tensor:
    """True zeros to stored ones (step -1) or back (step +1): the only place that knows of v1's off-by-one."""
    if checkpoint_format not in CHECKPOINT_FORMATS:
        raise InputError(f"checkpoint_format {checkpoint_format!r} is not one of {CHECKPOINT_FORMATS}")
    if checkpoint_format == "gptq_v2":
        return zeros
    return ((zeros.int() + step) & (2**bits - 1)).to(torch.uint8)


def _mirror_zero_groups(qt: QuantizedTensor) -> QuantizedTensor:
    mirrored = qt.zero == 0
    if not bool(mirrored.any()):
        return qt
    top = 2**qt.bits - 1
    return replace(
        qt,
        codes=torch.where(mirrored[:, qt.g_idx.long()], top - qt.codes, qt.codes),
        # 0 - s, not -s: a zero scale stays +0 in the file.
        scale=torch.where(mirrored, 0 - qt.scale, qt.scale),
        zero=torch.where(mirrored, float(top), qt.zero),
    )


def _widened(qt: QuantizedTensor) -> QuantizedTensor:
    """One-bit and ternary grids as 2-bit ones of the same values."""
    if qt.bits == TERNARY:
        return replace(qt, codes=qt.codes + 1, zero=qt.zero + 1, bits=packed_bits(qt.bits))
    if qt.bits != 1:
        return qt
    half = qt.scale / 2
    inexact = half != half.half().float()
    if bool(inexact.any()):
        value = float(qt.scale[inexact][0])
        raise InputError(f"one-bit scale {value!r} has no exact half in fp16, which the 2-bit words of the file need")
    return replace(qt, codes=qt.codes * 2, scale=half, zero=qt.zero * 2, bits=packed_bits(qt.bits))


def _narrowed(qt: QuantizedTensor, bits: float) -> QuantizedTensor:
    """The inverse of `_widened`."""
    if bits == TERNARY:
        return replace(qt, codes=qt.codes - 1, zero=qt.zero - 1, bits=bits)
    if bits == 1:
        return replace(qt, codes=qt.codes // 2, scale=2 * qt.scale, zero=qt.zero / 2, bits=bits)
    return qt


def _group_count(inputs: int, group_size: int) -> int:
    """The last group of a row may be shorter; group_size -1 is one group."""
    return 1 if group_size == -1 else -(-inputs // group_size)
