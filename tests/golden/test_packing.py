"""Words and tensors of GPTQ files against literals computed by hand and a big-integer reading of the format."""

import pytest
import torch

from ptq.export.gptq_tensors import GptqCodec, from_gptq, packed_bits, to_gptq
from ptq.export.packing import pack_columns, pack_rows, unpack_columns, unpack_rows
from ptq.qtensor import QuantizedTensor

WIDTHS = (1, 2, 3, 4, 8)

# One column each: (bits, codes, words). The comments show the sum.
GOLDEN = [
    (1, [0, 1] * 16, [0xAAAAAAAA]),  # ...1010
    (2, [0, 1, 2, 3] * 4, [0xE4E4E4E4]),  # 0b11_10_01_00 = 0xE4, four times
    (2, [1] + [0] * 14 + [3], [0xC0000001]),  # code 15 in bits 30 and 31: the sign bit
    (4, list(range(16)), [0x76543210, 0xFEDCBA98]),  # one hex digit a code, the first lowest
    (8, [0, 1, 2, 3, 252, 253, 254, 255], [0x03020100, 0xFFFEFDFC]),  # one byte a code
    # 8 codes are 24 bits: octal 0o76543210 = 0xFAC688, bytes 88 C6 FA; four times: 88C6FA88 C6FA88C6 FA88C6FA.
    (3, list(range(8)) * 4, [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),
    # Code 10 = 0b111 is bits 30, 31, 32: two in word 0, one in word 1.
    (3, [0] * 10 + [7] + [0] * 21, [0xC0000000, 0x00000001, 0]),
    # Code 21 = 0b101 is bits 63, 64, 65: its lowest bit ends word 1, 0b10 starts word 2.
    (3, [0] * 21 + [5] + [0] * 10, [0, 0x80000000, 0x00000002]),
    # All ones but bits 30, 32 (code 10 = 0b010) and 65 (code 21 = 0b011): sign bits copied by a right shift would show.
    (3, [7] * 9 + [7, 2, 7] + [7] * 9 + [3] + [7] * 10, [0xBFFFFFFF, 0xFFFFFFFE, 0xFFFFFFFD]),
]

# Symmetric zero points 2^(bits-1), 32 outputs, one group: (bits, format, words of one row of qzeros).
GOLDEN_ZEROS = [
    (2, "gptq", [0x55555555] * 2),
    (2, "gptq_v2", [0xAAAAAAAA] * 2),
    (3, "gptq", [0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D]),  # 0b011 repeated: 0o33333333 = 0x6DB6DB
    (3, "gptq_v2", [0x24924924, 0x49249249, 0x92492492]),  # 0b100 repeated: 0o44444444 = 0x924924
    (4, "gptq", [0x77777777] * 4),
    (4, "gptq_v2", [0x88888888] * 4),
    (8, "gptq", [0x7F7F7F7F] * 8),
    (8, "gptq_v2", [0x80808080] * 8),
]


def int32(words):
    return torch.tensor([w - 2**32 if w >= 2**31 else w for w in words], dtype=torch.int32)


def stream_words(column, bits):
    """The words of one column, from one big integer."""
    stream = sum(code << (i * bits) for i, code in enumerate(column))
    return int32([(stream >> (32 * w)) & 0xFFFFFFFF for w in range(len(column) * bits // 32)])


def stream_codes(words, bits):
    """The codes of one column of words, from one big integer."""
    stream = sum((w & 0xFFFFFFFF) << (32 * i) for i, w in enumerate(words))
    return [(stream >> (i * bits)) & (2**bits - 1) for i in range(len(words) * 32 // bits)]


def read_without_wrap(tensors, bits, v1):
    """(O, I) values as a reader sees them that adds 1 to a v1 zero and does not wrap at 2^bits."""
    codes = torch.tensor([stream_codes(column, bits) for column in tensors["qweight"].T.tolist()])
    zeros = torch.tensor([stream_codes(row, bits) for row in tensors["qzeros"].tolist()]).T + int(v1)
    g = tensors["g_idx"].long()
    return tensors["scales"].T.float()[:, g] * (codes - zeros[:, g])


def random_codes(rows, columns, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(round(2**bits), (rows, columns), generator=generator, dtype=torch.uint8)


def random_tensor(bits, group_size=32, O=32, I=96, seed=0, zero=None, shuffle=False):
    g = torch.Generator().manual_seed(seed)
    G = 1 if group_size == -1 else -(-I // group_size)
    g_idx = torch.arange(I, dtype=torch.int32) // (I if group_size == -1 else group_size)
    return QuantizedTensor(
        codes=random_codes(O, I, bits, seed),
        scale=torch.randn(O, G, generator=g).half().float(),
        zero=torch.randint(2**bits, (O, G), generator=g).float() if zero is None else torch.full((O, G), float(zero)),
        g_idx=g_idx[torch.randperm(I, generator=g)] if shuffle else g_idx,
        bits=bits,
        group_size=group_size,
    )


@pytest.mark.parametrize("bits,codes,words", GOLDEN)
def test_hand_computed_words(bits, codes, words):
    column = torch.tensor(codes, dtype=torch.uint8)[:, None]
    packed = int32(words)[:, None]
    assert torch.equal(pack_rows(column, bits), packed)
    assert torch.equal(unpack_rows(packed, bits, len(codes)), column)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("rows,columns", [(32, 1), (64, 7), (96, 32), (256, 5)])
def test_words_are_one_bit_stream_per_column(bits, rows, columns):
    codes = random_codes(rows, columns, bits)
    packed = pack_rows(codes, bits)
    assert packed.dtype == torch.int32 and packed.shape == (rows * bits // 32, columns)
    assert torch.equal(packed, torch.stack([stream_words(c, bits) for c in codes.T.tolist()], dim=1))
    assert torch.equal(unpack_rows(packed, bits, rows), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_columns_are_packed_along_rows(bits):
    codes = random_codes(3, 64, bits)
    packed = pack_columns(codes, bits)
    assert torch.equal(packed, torch.stack([stream_words(row, bits) for row in codes.tolist()]))
    assert packed.is_contiguous() and torch.equal(unpack_columns(packed, bits, 64), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_strided_views_pack_like_their_copies(bits):
    wide = random_codes(8, 128, bits)
    view = wide[:, ::2].T
    packed = pack_rows(view, bits)
    assert torch.equal(packed, pack_rows(view.clone(memory_format=torch.contiguous_format), bits))
    assert torch.equal(unpack_rows(packed.T.contiguous().T, bits, 64), view)


@pytest.mark.parametrize("bits,rows", [(1, 16), (2, 24), (3, 16), (4, 12), (8, 6)])
def test_partial_words_are_refused_with_the_numbers(bits, rows):
    codes = torch.zeros(rows, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"{rows} codes of {bits} bits"):
        pack_rows(codes, bits)
    with pytest.raises(ValueError, match=f"{rows} codes of {bits} bits"):
        pack_columns(codes.T, bits)


def test_a_row_count_that_is_not_in_the_words_is_refused():
    words = torch.zeros(4, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="4 words of 32 bits do not hold exactly 40 codes of 4 bits"):
        unpack_rows(words, 4, 40)


@pytest.mark.parametrize("bits", [0, 5, 6, 7, 16])
def test_widths_without_a_bit_stream_layout_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits {bits} "):
        pack_rows(torch.zeros(32, 1, dtype=torch.uint8), bits)


def test_a_code_too_wide_for_its_field_is_refused():
    with pytest.raises(AssertionError, match="neighbours"):
        pack_rows(torch.full((8, 1), 16, dtype=torch.uint8), 4)


@pytest.mark.parametrize("bits,checkpoint_format,words", GOLDEN_ZEROS)
def test_symmetric_zero_words(bits, checkpoint_format, words):
    qt = random_tensor(bits, group_size=-1, zero=2 ** (bits - 1))
    tensors = to_gptq(qt, checkpoint_format)
    assert torch.equal(tensors["qzeros"], int32(words)[None])
    assert torch.equal(from_gptq(tensors, bits, -1, checkpoint_format).zero, qt.zero)


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size,shuffle", [(32, False), (40, False), (-1, False), (32, True), (40, True)])
def test_files_hold_the_values_of_the_tensor(bits, checkpoint_format, group_size, shuffle):
    qt = random_tensor(bits, group_size=group_size, shuffle=shuffle)
    tensors = to_gptq(qt, checkpoint_format)
    G = qt.scale.shape[1]
    shapes = {name: (t.dtype, tuple(t.shape), t.is_contiguous()) for name, t in tensors.items()}
    assert shapes == {
        "qweight": (torch.int32, (96 * bits // 32, 32), True),
        "qzeros": (torch.int32, (G, bits), True),
        "scales": (torch.float16, (G, 32), True),
        "g_idx": (torch.int32, (96,), True),
    }
    assert torch.equal(tensors["g_idx"], qt.g_idx)
    assert torch.equal(read_without_wrap(tensors, bits, v1=checkpoint_format == "gptq"), qt.dequantize())
    back = from_gptq(tensors, bits, group_size, checkpoint_format)
    assert torch.equal(back.dequantize(), qt.dequantize())
    assert (back.bits, back.group_size) == (bits, group_size)


def test_ragged_last_group():
    tensors = to_gptq(random_tensor(4, group_size=40), "gptq_v2")
    assert tensors["g_idx"].tolist() == [0] * 40 + [1] * 40 + [2] * 16
    assert tensors["scales"].shape == (3, 32)


def test_v2_keeps_codes_and_zeros_as_they_are():
    qt = random_tensor(3)
    qt.zero[0, 0] = 0
    back = from_gptq(to_gptq(qt, "gptq_v2"), 3, 32, "gptq_v2")
    assert torch.equal(back.codes, qt.codes) and torch.equal(back.zero, qt.zero) and torch.equal(back.scale, qt.scale)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_v1_mirrors_only_the_groups_whose_zero_is_0(bits):
    qt = random_tensor(bits, zero=1)
    qt.zero[5, 1] = 0
    qt.scale[5, 2] = 0
    tensors = to_gptq(qt, "gptq")
    back = from_gptq(tensors, bits, 32, "gptq")
    top = 2**bits - 1
    assert torch.equal(back.codes[5, 32:64], top - qt.codes[5, 32:64])
    assert back.zero[5].tolist() == [1, top, 1] and back.scale[5, 1] == -qt.scale[5, 1]
    others = torch.arange(32) != 5
    assert torch.equal(back.codes[others], qt.codes[others]) and torch.equal(back.scale[others], qt.scale[others])
    # Field 5 of the second row: zero 2^bits-1 is stored as 2^bits-2, never as the all ones of a wrapped zero 0.
    assert stream_codes(tensors["qzeros"][1].tolist(), bits)[5] == top - 1
    assert torch.equal(read_without_wrap(tensors, bits, v1=True), qt.dequantize())


def test_v1_mirror_of_an_all_zero_group_stores_plus_zero():
    qt = random_tensor(4, zero=0)
    qt.scale[:] = 0
    tensors = to_gptq(qt, "gptq")
    assert not bool(torch.signbit(tensors["scales"]).any())
    assert torch.equal(from_gptq(tensors, 4, 32, "gptq").dequantize(), qt.dequantize())


def test_wrapped_v1_zeros_of_other_writers_read_as_0():
    tensors = to_gptq(random_tensor(4, zero=8), "gptq")
    tensors["qzeros"].fill_(-1)
    assert bool((from_gptq(tensors, 4, 32, "gptq").zero == 0).all())
    assert bool((from_gptq(tensors, 4, 32, "gptq_v2").zero == 15).all())


@pytest.mark.parametrize("checkpoint_format,word", [("gptq", 0), ("gptq_v2", 0x55555555)])
def test_one_bit_grid_is_exact_in_two_bit_words(checkpoint_format, word):
    qt = random_tensor(1, zero=0.5)
    tensors = to_gptq(qt, checkpoint_format)
    assert packed_bits(1) == 2 and tensors["qweight"].shape == (96 * 2 // 32, 32)
    assert bool((tensors["qzeros"] == word).all())  # zero 1 in every field
    assert torch.equal(read_without_wrap(tensors, 2, v1=checkpoint_format == "gptq"), qt.dequantize())
    back = from_gptq(tensors, 2, 32, checkpoint_format)
    assert back.bits == 2 and torch.equal(back.codes, qt.codes * 2)
    assert torch.equal(back.dequantize(), qt.dequantize())


@pytest.mark.parametrize("checkpoint_format,word", [("gptq", 0x55555555), ("gptq_v2", -0x55555556)])
def test_three_values_are_a_symmetric_two_bit_grid_without_its_lowest_code(checkpoint_format, word):
    qt = random_tensor(1.58, zero=1)
    tensors = to_gptq(qt, checkpoint_format)
    assert packed_bits(1.58) == 2 and bool((tensors["qzeros"] == word).all())  # zero 2 in every field, 0xaaaaaaaa in v2
    assert torch.equal(read_without_wrap(tensors, 2, v1=checkpoint_format == "gptq"), qt.dequantize())
    stored = from_gptq(tensors, 2, 32, checkpoint_format).codes
    assert torch.equal(stored, qt.codes + 1) and set(stored.unique().tolist()) == {1, 2, 3}


@pytest.mark.parametrize("bits,zero", [(1, 0.5), (1.58, 1), (2, 2), (3, 4)])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_the_codec_gives_back_the_same_grid(bits, zero, checkpoint_format):
    qt, codec = random_tensor(bits, zero=zero), GptqCodec(bits, 32, checkpoint_format)
    back = codec.unpack(codec.pack(qt))
    assert back.bits == bits and torch.equal(back.codes, qt.codes)
    assert torch.equal(back.scale, qt.scale) and torch.equal(back.zero, qt.zero)


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_one_bit_grids_with_a_zero_level_are_exact_too(zero, checkpoint_format):
    qt = random_tensor(1, zero=zero)
    tensors = to_gptq(qt, checkpoint_format)
    assert torch.equal(read_without_wrap(tensors, 2, v1=checkpoint_format == "gptq"), qt.dequantize())


def test_one_bit_scale_without_an_exact_half_is_refused():
    qt = random_tensor(1, zero=0.5)
    qt.scale[3, 1] = 3 * 2.0**-24  # an odd multiple of the smallest fp16
    with pytest.raises(ValueError, match="1.78813934"):
        to_gptq(qt, "gptq")
    qt.scale[3, 1] = 2 * 2.0**-24
    assert torch.equal(from_gptq(to_gptq(qt, "gptq"), 2, 32, "gptq").dequantize(), qt.dequantize())


@pytest.mark.parametrize("bits,zero", [(2, 0.5), (4, 16.0)])
def test_a_zero_that_the_file_cannot_hold_is_refused(bits, zero):
    with pytest.raises(AssertionError, match="whole zeros"):
        to_gptq(random_tensor(bits, zero=zero), "gptq_v2")


def test_unknown_checkpoint_format_is_refused():
    with pytest.raises(ValueError, match="'marlin'"):
        to_gptq(random_tensor(4, zero=8), "marlin")


def test_groups_that_do_not_fit_the_file_are_refused():
    tensors = to_gptq(random_tensor(4), "gptq")
    with pytest.raises(ValueError, match="scales has 3 groups, but 96 inputs by group_size 64: 2"):
        from_gptq(tensors, 4, 64, "gptq")
    for bad in (-1, 3):
        tensors["g_idx"] = torch.full((96,), bad, dtype=torch.int32)
        with pytest.raises(ValueError, match="outside the 3 groups"):
            from_gptq(tensors, 4, 32, "gptq")


@pytest.mark.gpu
@pytest.mark.parametrize("bits", WIDTHS)
def test_cuda_words_equal_cpu_words(bits):
    codes = random_codes(256, 64, bits)
    packed = pack_rows(codes.cuda(), bits)
    assert torch.equal(packed.cpu(), pack_rows(codes, bits))
    assert torch.equal(unpack_rows(packed, bits, 256).cpu(), codes)
