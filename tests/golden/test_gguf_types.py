"""Blocks of Q1_0 and Q2_0 from bytes written by hand, and as llama.cpp's own code reads them."""

import ctypes

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from llama_client import c_library

from ptq.export.gguf.types import BY_NAME, Q1_0, Q2_0, TYPES, dequantize, file_type


def test_q2_0_by_hand():
    """d = -0.5 (fp16 0xb800); 0x1b is the codes 3, 2, 1, 0, so 2 d, d, 0, -d; 0x00 is four times -d."""
    row = np.frombuffer(bytes.fromhex("00b8" + "1b" + "00" * 15), np.uint8)
    values = dequantize(row[None], Q2_0)
    assert values.dtype == np.float32 and values.shape == (1, 64)
    assert values[0, :8].tolist() == [-1.0, -0.5, 0.0, 0.5, 0.5, 0.5, 0.5, 0.5] and set(values[0, 8:]) == {0.5}


def test_q1_0_by_hand():
    """d = 0.25 (fp16 0x3400); 0x05 sets the bits of weights 0 and 2."""
    row = np.frombuffer(bytes.fromhex("0034" + "05" + "00" * 15), np.uint8)
    values = dequantize(np.stack([row, row]), Q1_0)
    assert values.shape == (2, 128)
    assert values[1, :4].tolist() == [0.25, -0.25, 0.25, -0.25] and set(values[1, 4:]) == {-0.25}


DECODED = ["Q1_0", "Q2_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ2_XXS",
           "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "IQ1_S", "IQ1_M", "TQ1_0", "TQ2_0"]  # fmt: skip


@pytest.mark.parametrize("name", DECODED)
def test_llama_cpp_reads_the_same_values(name):
    decode = getattr(c_library(), f"dequantize_row_{name.lower().replace('_k', '_K')}")
    decode.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64
    decode.restype = None
    generator, ggml_type = np.random.default_rng(0), BY_NAME[name]
    blocks = generator.integers(0, 256, (64, ggml_type.block_bytes), dtype=np.uint8)
    blocks[0] = 0
    expected = np.empty((64, ggml_type.block), np.float32)
    decode(blocks.ctypes.data, expected.ctypes.data, expected.size)
    with np.errstate(all="ignore"):  # random scales: some are infinite or no numbers
        values = dequantize(blocks, ggml_type.number)
    finite = np.isfinite(expected)
    assert finite.mean() > 0.5 and np.array_equal(values[finite], expected[finite])


def test_the_table_is_the_package_s_where_that_has_the_type():
    for member, sizes in GGML_QUANT_SIZES.items():
        assert (TYPES[member].block, TYPES[member].block_bytes) == sizes and TYPES[member].name == member.name
    assert TYPES[Q2_0].row_bytes(128) == 36 and Q2_0 not in set(GGMLQuantizationType)


def test_file_types():
    names = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0", "Q2_K": "MOSTLY_Q2_K"}
    names |= {"Q4_K": "MOSTLY_Q4_K_S", "Q6_K": "MOSTLY_Q6_K", "IQ2_XS": "MOSTLY_IQ2_XS", "TQ2_0": "MOSTLY_TQ2_0"}
    assert all(file_type(name) == LlamaFileType[member] for name, member in names.items())
    assert (file_type("Q1_0"), file_type("Q2_0"), file_type("I8")) == (40, 41, None)
