"""Vectors of codebooks as the bytes of llama.cpp's IQ2 and IQ3 types, and back.

A block holds fp16 d, then numbers of a few bits each: the entry of every few columns, the minus signs of every eight
columns, the sub-scale of every step. Seven signs are stored where the eighth makes their number even. All bits count
from the lowest of a byte, the bytes of a block one after the other.

Legend: n blocks, w columns of an entry.
"""

from dataclasses import dataclass

import numpy as np

from ptq.grids.blocks.codebook import CODEBOOKS

ENTRY, SIGNS, SUB = range(3)
D_BITS = 16
EIGHT = np.arange(8, dtype=np.uint8)


@dataclass(frozen=True)
class Numbers:
    """Where some numbers lie: number (i, j, ...) at bit `first` + i strides[0] + j strides[1] + ...

    Attributes:
        kind: ENTRY, SIGNS or SUB.
        first: Bit of the block.
        counts: How many along each axis.
        strides: Bits from one to the next along each axis.
        bits: Of a number that lie here.
        shift: Which of its bits is the first of them.
    """

    kind: int
    first: int
    counts: tuple[int, ...]
    strides: tuple[int, ...]
    bits: int
    shift: int = 0

    @property
    def places(self) -> np.ndarray:
        """(numbers, bits) of the block's bits."""
        places = self.first + np.arange(self.bits)
        for count, stride in zip(self.counts[::-1], self.strides[::-1], strict=True):
            places = np.arange(count).reshape(-1, *(1,) * places.ndim) * stride + places
        return places.reshape(-1, self.bits)


LAYOUTS: dict[str, tuple[Numbers, ...]] = {
    "IQ2_XXS": (  # eight times: four entries, then a word of four signs and a sub-scale
        Numbers(ENTRY, 16, (8, 4), (64, 8), 8), Numbers(SIGNS, 48, (8, 4), (64, 7), 7),
        Numbers(SUB, 76, (8,), (64,), 4),
    ),
    "IQ2_XS": (
        Numbers(ENTRY, 16, (32,), (16,), 9), Numbers(SIGNS, 25, (32,), (16,), 7), Numbers(SUB, 528, (16,), (4,), 4),
    ),
    "IQ2_S": (
        Numbers(ENTRY, 16, (32,), (8,), 8), Numbers(SIGNS, 272, (32,), (8,), 8),
        Numbers(ENTRY, 528, (32,), (2,), 2, shift=8), Numbers(SUB, 592, (16,), (4,), 4),
    ),
    "IQ3_XXS": (
        Numbers(ENTRY, 16, (64,), (8,), 8), Numbers(SIGNS, 528, (8, 4), (32, 7), 7), Numbers(SUB, 556, (8,), (32,), 4),
    ),
    "IQ3_S": (
        Numbers(ENTRY, 16, (64,), (8,), 8), Numbers(ENTRY, 528, (64,), (1,), 1, shift=8),
        Numbers(SIGNS, 592, (32,), (8,), 8), Numbers(SUB, 848, (8,), (4,), 4),
    ),
}  # fmt: skip


def pack_blocks(name: str, codes: np.ndarray, sub: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Bytes (n, block bytes) of codes uint8 (n, 256), sub-scales (n, k) and d (n, 1)."""
    entries, minus = CODEBOOKS[name].split(codes)
    assert entries.min() >= 0, "codes side by side that are no entry"
    signs = np.packbits(minus.reshape(-1, 8), axis=1, bitorder="little").reshape(len(codes), -1)
    numbers = {ENTRY: entries, SIGNS: signs, SUB: sub}
    bits = np.zeros((len(codes), max(int(of.places.max()) for of in LAYOUTS[name]) + 1), np.uint8)
    for of in LAYOUTS[name]:
        held = numbers[of.kind].astype(np.uint16)[..., None] >> (of.shift + np.arange(of.bits, dtype=np.uint16))
        bits[:, of.places] = (held & 1).astype(np.uint8)
    half = d.astype(np.float16)
    assert np.array_equal(half.astype(np.float32), d), "a number that is not exact in fp16"
    bits[:, :D_BITS] = np.unpackbits(half.view(np.uint8), axis=1, bitorder="little")
    return np.packbits(bits, axis=1, bitorder="little")


def unpack_blocks(name: str, content: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """codes, sub-scales as float32, and d, of bytes (n, block bytes)."""
    bits, numbers = np.unpackbits(content, axis=1, bitorder="little"), {}
    for of in LAYOUTS[name]:
        found = bits[:, of.places] @ (1 << np.arange(of.bits, dtype=np.uint16)) << np.uint16(of.shift)
        numbers[of.kind] = numbers.get(of.kind, np.uint16(0)) | found
    minus = numbers[SIGNS].astype(np.uint8)[..., None] >> EIGHT & 1
    if CODEBOOKS[name].even:
        minus[..., 7] = minus[..., :7].sum(-1) % 2
    codes = CODEBOOKS[name].join(numbers[ENTRY], minus.reshape(len(content), -1))
    d = content[:, :2].copy().view(np.float16).astype(np.float32)
    return codes, numbers[SUB].astype(np.float32), d
