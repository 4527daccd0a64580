"""The tensor types of GGUF: their numbers, the size of their blocks, and what their bytes stand for.

A row is cut into blocks of `block` weights, `block_bytes` each. Values come from the gguf package, but for the two
types that it does not decode:

    Q1_0  128 weights: fp16 d, then one bit each, lowest first:   d * (2 * bit - 1)
    Q2_0   64 weights: fp16 d, then two bits each, lowest first:  d * (code - 1)
"""

from dataclasses import dataclass

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from gguf.quants import dequantize as gguf_dequantize

Q1_0, Q2_0 = 41, 42


@dataclass(frozen=True)
class GgmlType:
    """A tensor type.

    Attributes:
        number: What the file stores.
        name: llama.cpp's name.
        block: Weights in a block.
        block_bytes: Bytes of a block.
    """

    number: int
    name: str
    block: int
    block_bytes: int

    def row_bytes(self, inputs: int) -> int:
        """Bytes of a row of `inputs` weights, a multiple of the block."""
        assert inputs % self.block == 0
        return inputs // self.block * self.block_bytes


TYPES: dict[int, GgmlType] = {
    member.value: GgmlType(member.value, member.name, *GGML_QUANT_SIZES[member]) for member in GGMLQuantizationType
} | {Q1_0: GgmlType(Q1_0, "Q1_0", 128, 18), Q2_0: GgmlType(Q2_0, "Q2_0", 64, 18)}
BY_NAME: dict[str, GgmlType] = {ggml_type.name: ggml_type for ggml_type in TYPES.values()}

# general.file_type says what most of a file is; it only labels the file. The package's list ends before the last two.
_FILE_TYPES = {member.name.removeprefix("MOSTLY_"): member.value for member in LlamaFileType} | {
    "F32": LlamaFileType.ALL_F32.value,
    "Q1_0": 40,
    "Q2_0": 41,
}


def file_type(name: str) -> int | None:
    """llama.cpp's number for a file that is mostly of one type, such as "Q4_K"; None if it has none."""
    return _FILE_TYPES.get(name, _FILE_TYPES.get(f"{name}_S"))


def dequantize(rows: np.ndarray, number: int) -> np.ndarray:
    """Values float32 (O, I) of encoded rows uint8 (O, row bytes).

    Raises:
        NotImplementedError: The type holds no weights that are decoded here.
    """
    if number == Q1_0:
        return _unpack(rows, TYPES[number], bits=1, offset=0.5) * np.float32(2)
    if number == Q2_0:
        return _unpack(rows, TYPES[number], bits=2, offset=1)
    return gguf_dequantize(rows, GGMLQuantizationType(number))


def _unpack(rows, ggml_type, *, bits, offset):
    blocks = rows.reshape(len(rows), -1, ggml_type.block_bytes)
    d = blocks[..., :2].copy().view(np.float16).astype(np.float32)
    fields = np.unpackbits(blocks[..., 2:], axis=-1, bitorder="little").reshape(*blocks.shape[:2], -1, bits)
    codes = fields @ (1 << np.arange(bits, dtype=np.uint8))
    return (d * (codes.astype(np.float32) - np.float32(offset))).reshape(len(rows), -1)
