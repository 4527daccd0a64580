"""Block tensors as the bytes of llama.cpp's types, and back: a change of representation, nothing is rounded.

Legend: O outputs, I inputs, S blocks of a row, n = O * S blocks, k whole-number params of a block.
"""

from dataclasses import dataclass

import numpy as np
import torch

from ptq.export.gguf.codebooks import pack_blocks, unpack_blocks
from ptq.export.gguf.fields import Bits, Half, SixBits, Trits
from ptq.export.gguf.layout import EncodedTensor
from ptq.export.gguf.types import BY_NAME
from ptq.grids.blocks import BLOCK_GRIDS
from ptq.qtensor import BlockTensor

CODES, WHOLE, D, M = range(4)  # what fields hold: codes, all whole-number params side by side, one or two fp16 params


@dataclass(frozen=True)
class Layout:
    """The fields of a block in the order of its bytes; fields of the same target hold different bits of its numbers.

    Attributes:
        fields: Each with its target.
        code_bias: Added to codes before they are stored, modulo 256.
        whole_bias: The same for whole-number params.
        wholes: How many params WHOLE stands for.
    """

    fields: tuple[Half | Bits | SixBits | Trits, ...]
    code_bias: int = 0
    whole_bias: int = 0
    wholes: int = 0


FOUR = Bits(CODES, 32, 4, run=16)
FIVE = Bits(CODES, 32, 1, run=1, shift=4), FOUR
TWO_K, FOUR_K = Bits(CODES, 256, 2, run=32), Bits(CODES, 256, 4, run=32)
RAMPS_K = Half(D), Half(M), SixBits(WHOLE)

LAYOUTS: dict[str, Layout] = {  # those of codebooks are in codebooks.py
    "Q1_0": Layout((Half(D), Bits(CODES, 128, 1, run=1))),
    "TQ1_0": Layout((Trits(CODES), Half(D))),
    "TQ2_0": Layout((TWO_K, Half(D))),
    "Q2_0": Layout((Half(D), Bits(CODES, 64, 2, run=1))),
    "Q4_0": Layout((Half(D), FOUR)),
    "Q5_0": Layout((Half(D), *FIVE)),
    "Q8_0": Layout((Half(D), Bits(CODES, 32, 8, run=1)), code_bias=128),
    "IQ4_NL": Layout((Half(D), FOUR)),
    "Q4_1": Layout((Half(D), Half(M), FOUR)),
    "Q5_1": Layout((Half(D), Half(M), *FIVE)),
    "Q2_K": Layout((Bits(WHOLE, 32, 4, run=16), TWO_K, Half(D), Half(M)), wholes=2),
    "Q4_K": Layout((*RAMPS_K, FOUR_K), wholes=2),
    "Q5_K": Layout((*RAMPS_K, Bits(CODES, 256, 1, run=32, shift=4), FOUR_K), wholes=2),
    "Q3_K": Layout(
        (
            Bits(CODES, 256, 1, run=32, shift=2), TWO_K,
            Bits(WHOLE, 16, 4, run=8), Bits(WHOLE, 16, 2, run=4, shift=4), Half(D),
        ),
        whole_bias=32, wholes=1,
    ),
    "Q6_K": Layout(
        (
            Bits(CODES, 256, 4, run=64), Bits(CODES, 256, 2, run=32, shift=4),
            Bits(WHOLE, 16, 8, run=1), Half(D),
        ),
        wholes=1,
    ),
    "IQ4_XS": Layout(
        (
            Half(D), Bits(WHOLE, 8, 2, run=1, shift=4), Bits(WHOLE, 8, 4, run=1), Bits(CODES, 256, 4, run=16),
        ),
        whole_bias=32, wholes=1,
    ),
}  # fmt: skip


def pack(tensor: BlockTensor) -> np.ndarray:
    """Rows of bytes, uint8 (O, row bytes), in the type that the tensor's grid is named after."""
    grid, outputs = tensor.grid, len(tensor.codes)
    blocks = [_by_block(p, outputs) for p in tensor.params]
    if grid.vector > 1:
        codes = tensor.codes.cpu().numpy().reshape(-1, grid.span)
        return pack_blocks(grid.name, codes, *blocks).reshape(outputs, -1)
    layout = LAYOUTS[grid.name]
    numbers = dict(enumerate(blocks[layout.wholes :], D))
    numbers[CODES] = tensor.codes.cpu().numpy().reshape(-1, grid.span) + np.uint8(layout.code_bias)
    if layout.wholes:
        wholes = np.concatenate(blocks[: layout.wholes], axis=1)
        numbers[WHOLE] = (wholes.astype(np.int16) + layout.whole_bias).astype(np.uint8)
    content = np.concatenate([field.write(numbers[field.target]) for field in layout.fields], axis=1)
    return content.reshape(outputs, -1)


def unpack(rows: np.ndarray, name: str) -> BlockTensor:
    """The tensor of rows of bytes, uint8 (O, row bytes), in llama.cpp's type `name`, a key of BLOCK_GRIDS."""
    grid, outputs = BLOCK_GRIDS[name], len(rows)
    content = rows.reshape(-1, BY_NAME[name].block_bytes)
    if grid.vector > 1:
        codes, *params = unpack_blocks(name, content)
        return _tensor(codes, params, grid, outputs)
    layout, numbers, start = LAYOUTS[name], {}, 0
    for field in layout.fields:
        found = field.read(content[:, start : start + field.nbytes])
        numbers[field.target] = found | numbers[field.target] if field.target in numbers else found
        start += field.nbytes
    codes = numbers.pop(CODES) - np.uint8(layout.code_bias)
    params = [numbers[target] for target in (D, M) if target in numbers]
    if layout.wholes:
        wholes = (numbers[WHOLE] - np.uint8(layout.whole_bias)).view(np.int8).astype(np.float32)
        params = np.split(wholes, layout.wholes, axis=1) + params
    return _tensor(codes, params, grid, outputs)


def _tensor(codes, params, grid, outputs):
    return BlockTensor(torch.from_numpy(codes.reshape(outputs, -1)), tuple(_by_span(p, outputs) for p in params), grid)


def encoded(tensor: BlockTensor) -> EncodedTensor:
    """The tensor for the writer of files; packed when it is read."""
    return EncodedTensor(BY_NAME[tensor.grid.name].number, lambda: pack(tensor))


def _by_block(param, outputs):
    """(S, O) or (S, k, O) to (n, 1) or (n, k)."""
    blocks = param.cpu().movedim(-1, 0)
    return blocks.reshape(outputs * len(param), -1).numpy()


def _by_span(numbers, outputs):
    """(n, 1) or (n, k) to (S, O) or (S, k, O)."""
    param = torch.from_numpy(numbers.reshape(outputs, -1, numbers.shape[1])).permute(1, 2, 0)
    return (param[:, 0] if numbers.shape[1] == 1 else param).contiguous()
