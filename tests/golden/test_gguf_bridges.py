"""Uniform groups as llama.cpp's blocks: the values of what llama.cpp reads are those that were solved."""

import pytest
import torch

from calibration.errors import InputError
from ptq.export.gguf.bridges import bridge
from ptq.export.gguf.codecs import pack
from ptq.export.gguf.types import BY_NAME, dequantize
from ptq.grids.affine import half_exact
from ptq.qtensor import QuantizedTensor

OUTPUTS, INPUTS = 5, 512


def uniform(bits, sym, group_size, *, inputs=INPUTS, size=0.02):
    """Codes that use every value, scales of either sign."""
    generator, groups = torch.Generator().manual_seed(int(bits)), -(-inputs // group_size)
    codes = torch.randint(0, round(2**bits), (OUTPUTS, inputs), generator=generator).to(torch.uint8)
    scale = half_exact(size * torch.randn(OUTPUTS, groups, generator=generator))
    zero = torch.full_like(scale, {1: 0.5, 1.58: 1}.get(bits) or 2 ** (bits - 1))
    if not sym:
        zero = torch.randint(0, 2**bits, zero.shape, generator=generator).float()
        zero[0, 0], zero[0, 1] = 0, 2**bits - 1
    g_idx = torch.arange(inputs, dtype=torch.int32) // group_size
    return QuantizedTensor(codes, scale, zero, g_idx, bits, group_size)


def read_back(tensor):
    return torch.from_numpy(dequantize(pack(tensor), BY_NAME[tensor.grid.name].number).copy())


@pytest.mark.parametrize(
    ("bits", "sym", "group_size", "name"),
    [
        (1, True, 128, "Q1_0"), (1, True, 256, "Q1_0"), (2, True, 64, "Q2_0"), (2, True, 128, "Q2_0"),
        (1.58, True, 64, "Q2_0"), (1.58, True, 128, "Q2_0"), (1.58, True, 256, "TQ1_0"),
        (3, True, 32, "Q4_0"), (4, True, 32, "Q4_0"), (4, True, 128, "Q4_0"), (5, True, 64, "Q5_0"),
        (8, True, 32, "Q8_0"), (2, False, 32, "Q4_0"), (3, False, 96, "Q4_0"), (7, False, 64, "Q8_0"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [0.02, 1e-6])
def test_exact_types(bits, sym, group_size, name, size):
    quantized = uniform(bits, sym, group_size, inputs=480 if group_size == 96 else INPUTS, size=size)
    tensor = bridge(quantized)
    assert tensor.grid.name == name
    assert torch.equal(tensor.dequantize(), quantized.dequantize())
    assert torch.equal(read_back(tensor), quantized.dequantize())


@pytest.mark.parametrize(
    ("bits", "sym", "name"),
    [
        (1.58, True, "TQ2_0"), (1.58, True, "Q2_0"), (2, True, "TQ2_0"), (2, True, "Q4_0"), (4, False, "Q5_0"),
        (5, False, "Q8_0"),
    ],
)  # fmt: skip
def test_types_asked_for_by_name(bits, sym, name):
    quantized = uniform(bits, sym, 256)
    assert torch.equal(read_back(bridge(quantized, name)), quantized.dequantize())


@pytest.mark.parametrize(("bits", "name"), [(4, "Q4_1"), (5, "Q5_1")])
@pytest.mark.parametrize("size", [0.02, 1e-6])
def test_ramps_move_a_group_by_the_rounding_of_its_minimum(bits, name, size):
    quantized = uniform(bits, False, 64, size=size)
    tensor = bridge(quantized)
    assert tensor.grid.name == name and torch.equal(read_back(tensor), tensor.dequantize())
    minimum = (quantized.scale * quantized.zero)[:, quantized.g_idx.long()]
    moved = (tensor.dequantize() - quantized.dequantize()).abs()
    # Half an ulp of fp16, and the fp32 sum of two terms of up to 2**bits scales of up to 5 sizes.
    assert bool((moved <= minimum.abs() * 2**-11 + 2**-23 * 2**bits * size * 5).all())
    assert (float(moved.max()) > 0) == (size > 1e-3)  # small products are whole multiples of fp16's smallest number


def test_groups_may_stand_in_any_order():
    quantized = uniform(4, True, 32)
    shuffled = quantized.g_idx.view(-1, 32).flip(0).reshape(-1)
    moved = QuantizedTensor(quantized.codes, quantized.scale, quantized.zero, shuffled, 4, 32)
    assert torch.equal(read_back(bridge(moved)), moved.dequantize())


@pytest.mark.parametrize(
    ("quantized", "name", "message"),
    [
        ((2, True, 32), None, "blocks of Q2_0 are 64 columns.*groups of 32; Q4_0 holds it"),
        ((1, True, 64), None, "blocks of Q1_0 are 128 columns.*no type of blocks"),
        ((8, False, 32), None, "Q8_0 has no codes for its 8-bit values; no type"),
        ((4, True, 48), None, "32 columns of one group, not so in 512 columns with groups of 48; no type"),
        ((4, False, 32), "Q4_0", "Q4_0 has no codes for its 4-bit values; Q5_0 holds it"),
        ((4, True, 32), "Q4_K", "Q4_K is none of .*; Q4_0 holds it"),
        ((5, True, 32), "Q4_1", "Q4_1 has no codes for 5 bits; Q5_0 holds it"),
    ],
)
def test_what_does_not_fit_is_refused(quantized, name, message):
    with pytest.raises(InputError, match="^blk.0: .*" + message):
        bridge(uniform(*quantized), name, tensor="blk.0")
