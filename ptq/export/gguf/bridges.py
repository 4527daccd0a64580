"""Tensors on uniform grids, such as those of a GPTQ file, as llama.cpp's blocks: the same values in other words.

A group's values are scale * v with whole v = code - zero (halves at one bit). A type with one fp16 scale a block holds
them exactly if its codes reach every v, or every -v with the scale's sign turned. Only asymmetric groups of 4 and 5
bits go to a ramp, scale * code + m, where m = -scale * zero is rounded to fp16: all values of a group move by the same
amount, at most 2**-11 of |m|. Asked for by name, Q5_0 holds those of 4 bits exactly, and Q8_0 those of 5.

Legend: O outputs, I inputs, S blocks of a row.
"""

import torch

from calibration.errors import InputError
from ptq.grids.affine import TERNARY, AffineGrid
from ptq.grids.blocks import BLOCK_GRIDS
from ptq.grids.blocks.levels import half
from ptq.grids.blocks.single import RampGrid
from ptq.qtensor import BlockTensor, QuantizedTensor

SYMMETRIC = {
    1: "Q1_0", TERNARY: "Q2_0", 2: "Q2_0", 3: "Q4_0", 4: "Q4_0", 5: "Q5_0", 6: "Q8_0", 7: "Q8_0", 8: "Q8_0",
}  # fmt: skip
ASYMMETRIC = {2: "Q4_0", 3: "Q4_0", 4: "Q4_1", 5: "Q5_1", 6: "Q8_0", 7: "Q8_0", 8: "Q8_0"}
EXACT = "Q1_0", "Q2_0", "TQ2_0", "TQ1_0", "Q4_0", "Q5_0", "Q8_0"  # one scale a block; in the order of preference
RAMPS = "Q4_1", "Q5_1"


def bridge(quantized: QuantizedTensor, name: str | None = None, *, tensor: str = "the tensor") -> BlockTensor:
    """The same values as llama.cpp's blocks; zeros may come out as -0.

    Args:
        quantized: On a uniform grid.
        name: llama.cpp's type, of EXACT or RAMPS; None for TQ1_0 where the values are three and its blocks lie inside
            groups, else for the one that suits bits and zero points.
        tensor: What messages call it.

    Raises:
        InputError: The type does not hold these values, or its blocks do not lie inside groups.
    """
    name = name or _usual(quantized)
    try:
        return _converted(quantized, name)
    except _DoesNotFitError as reason:
        other = next((n for n in EXACT if _fits(quantized, n)), None)
        advice = f"{other} holds it" if other else "no type of blocks holds it: quantize on a block type's own grid"
        raise InputError(f"{tensor}: {reason}; {advice}") from None


class _DoesNotFitError(Exception):
    """Says why in words."""


def _usual(quantized):
    if _fits(quantized, "TQ1_0"):
        return "TQ1_0"
    symmetric = bool((quantized.zero == AffineGrid(quantized.bits, True).middle).all())
    return (SYMMETRIC if symmetric else ASYMMETRIC)[quantized.bits]


def _fits(quantized, name):
    try:
        return _converted(quantized, name) is not None
    except _DoesNotFitError:
        return False


def _converted(quantized, name):
    if name not in EXACT + RAMPS:
        raise _DoesNotFitError(f"{name} is none of {', '.join(EXACT + RAMPS)}")
    grid, groups = BLOCK_GRIDS[name], _groups_of_blocks(quantized, name)
    if isinstance(grid, RampGrid):
        if quantized.bits < 2 or 2**quantized.bits > grid.levels.count:
            raise _DoesNotFitError(f"{name} has no codes for {quantized.bits} bits")
        d, zero = quantized.scale.T[groups], quantized.zero.T[groups]
        return BlockTensor(quantized.codes, (d, half(-d * zero)), grid)
    codes, share = _single_codes(quantized, grid)
    return BlockTensor(codes, (share * quantized.scale.T[groups],), grid)


def _groups_of_blocks(quantized, name):
    """(S,) which group each block lies in."""
    I, span = quantized.codes.shape[1], BLOCK_GRIDS[name].span
    groups = quantized.g_idx.long().view(-1, span) if I % span == 0 else None
    if groups is None or not bool((groups == groups[:, :1]).all()):
        raise _DoesNotFitError(
            f"blocks of {name} are {span} columns of one group, not so in {I} columns with groups of "
            f"{quantized.group_size}"
        )
    return groups[:, 0]


def _single_codes(quantized, grid):
    """Codes on a grid of one scale a block, and what share of the group's scale is the block's."""
    if quantized.bits == 1 and grid.levels.count == 2:
        return quantized.codes, 0.5
    v = quantized.codes.float() - quantized.zero[:, quantized.g_idx.long()]
    low, high = grid.levels.ends
    for sign in (1, -1):
        smallest, largest = (sign * v).aminmax()
        if low <= smallest and largest <= high and grid.levels.count > 2 and quantized.bits > 1:
            return (sign * v - low).to(torch.uint8), float(sign)
    raise _DoesNotFitError(f"{grid.name} has no codes for its {quantized.bits}-bit values")
