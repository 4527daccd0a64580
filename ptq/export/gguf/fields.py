"""The fields of llama.cpp's blocks: how numbers lie in bytes.

A field turns n blocks' bytes (n, nbytes) into what it holds, and back. Most are bit fields: a byte holds 8 / bits
numbers that stand `run` places apart, the first in its lowest bits.
"""

from dataclasses import dataclass

import numpy as np

TRITS = (0, 160, 32), (160, 80, 16), (240, 16, 4)  # first weight, weights, bytes
POWERS = 81, 27, 9, 3, 1


@dataclass(frozen=True)
class Half:
    """One fp16 number, given as float32 (n, 1)."""

    target: int
    nbytes = 2

    def read(self, content):
        """Bytes to numbers."""
        return content.copy().view(np.float16).astype(np.float32)

    def write(self, numbers):
        """Numbers to bytes; they must be fp16 already."""
        stored = numbers.astype(np.float16)
        assert np.array_equal(stored.astype(np.float32), numbers), "a number that is not exact in fp16"
        return stored.view(np.uint8)


@dataclass(frozen=True)
class Bits:
    """Some bits of whole numbers, given shifted to their place: (n, count) uint8."""

    target: int
    count: int
    bits: int
    run: int
    shift: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the field."""
        return self.count * self.bits // 8

    def read(self, content):
        """Bytes to numbers."""
        parts = content.reshape(len(content), -1, 1, self.run) >> self._places
        return ((parts & self._mask) << self.shift).reshape(len(content), -1)

    def write(self, numbers):
        """Numbers to bytes."""
        parts = (numbers >> self.shift & self._mask).reshape(len(numbers), -1, 8 // self.bits, self.run)
        return np.bitwise_or.reduce(parts << self._places, axis=2).reshape(len(numbers), -1)

    @property
    def _places(self):
        return np.arange(0, 8, self.bits, dtype=np.uint8)[:, None]

    @property
    def _mask(self):
        return np.uint8(2**self.bits - 1)


@dataclass(frozen=True)
class SixBits:
    """Eight pairs of 6-bit numbers in 12 bytes, given as (n, 16) uint8: Q4_K's sub-scales, then its sub-minima.

    Bytes 0-3 hold the first four sub-scales, bytes 4-7 the first four sub-minima; their top bits and bytes 8-11 the
    other four of each.
    """

    target: int
    nbytes = 12

    def read(self, content):
        """Bytes to numbers."""
        first, second, shared = np.split(content, 3, axis=1)
        sub = [first & 63, shared & 15 | first >> 2 & 48]
        low = [second & 63, shared >> 4 | second >> 2 & 48]
        return np.concatenate(sub + low, axis=1)

    def write(self, numbers):
        """Numbers to bytes."""
        sub, sub_late, low, low_late = np.split(numbers, 4, axis=1)
        top = (sub | (sub_late & 48) << 2, low | (low_late & 48) << 2, sub_late & 15 | low_late << 4)
        return np.concatenate(top, axis=1)


@dataclass(frozen=True)
class Trits:
    """256 numbers 0, 1, 2, five to a byte (four in the last four bytes): (n, 256) uint8.

    Five digits to base 3, the first the most significant, make a whole number below 243; the byte is the fraction of
    it, in 256ths and rounded up, so that multiplying by 3 brings digit after digit to the top.
    """

    target: int
    nbytes = 52

    def read(self, content):
        """Bytes to numbers."""
        parts, start = [], 0
        for _, count, width in TRITS:
            digits = content[:, None, start : start + width] * np.array(POWERS[::-1], np.uint8)[: count // width, None]
            parts.append((digits.astype(np.uint16) * 3 >> 8).astype(np.uint8).reshape(len(content), -1))
            start += width
        return np.concatenate(parts, axis=1)

    def write(self, numbers):
        """Numbers to bytes."""
        parts = []
        for first, count, width in TRITS:
            digits = numbers[:, first : first + count].reshape(len(numbers), -1, width)
            whole = (digits * np.array(POWERS, np.uint16)[: count // width, None]).sum(1)
            parts.append(((whole * 256 + 242) // 243).astype(np.uint8))
        return np.concatenate(parts, axis=1)
