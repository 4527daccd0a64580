"""Every block type, bytes to grid and back, against llama.cpp's own arithmetic: bit for bit."""

import numpy as np
import pytest
import torch

from ptq.export.gguf import codebooks
from ptq.export.gguf.codecs import LAYOUTS, encoded, pack, unpack
from ptq.export.gguf.types import BY_NAME, dequantize
from ptq.grids.blocks import BLOCK_GRIDS

ROWS, BLOCKS = 24, 3


def random_rows(name, seed=0):
    """Bytes (ROWS, BLOCKS blocks) of any content but infinite fp16 numbers; ternary digits as llama.cpp's."""
    ggml_type, generator = BY_NAME[name], np.random.default_rng(seed)
    rows = generator.integers(0, 256, (ROWS, BLOCKS * ggml_type.block_bytes), dtype=np.uint8)
    content, start = rows.reshape(-1, ggml_type.block_bytes), 0
    if name in codebooks.LAYOUTS:
        content[:, 1] &= 0xBF
        return rows
    for field in LAYOUTS[name].fields:
        if type(field).__name__ == "Half":
            content[:, start + 1] &= 0xBF  # the top bit of the exponent: magnitudes below 2, subnormal ones among them
        if type(field).__name__ == "Trits":
            part = content[:, start : start + field.nbytes]
            part[:, :48] = (generator.integers(0, 243, (len(part), 48)) * 256 + 242) // 243
            part[:, 48:] = (generator.integers(0, 81, (len(part), 4)) * 3 * 256 + 242) // 243
        start += field.nbytes
    assert start == ggml_type.block_bytes
    return rows


def same_bits(ours, theirs):
    return np.array_equal(ours.numpy().view(np.uint32), theirs.view(np.uint32))


def test_every_grid_has_a_layout():
    assert LAYOUTS.keys() | codebooks.LAYOUTS.keys() == BLOCK_GRIDS.keys()
    for name, grid in BLOCK_GRIDS.items():
        assert (grid.name, grid.span) == (name, BY_NAME[name].block)


@pytest.mark.parametrize("name", BLOCK_GRIDS)
def test_random_bytes(name):
    rows = random_rows(name)
    tensor, expected = unpack(rows, name), dequantize(rows, BY_NAME[name].number)
    assert tensor.codes.shape == expected.shape == (ROWS, BLOCKS * BY_NAME[name].block)
    assert same_bits(tensor.dequantize(), expected)
    assert np.array_equal(pack(tensor), rows)
    part = tensor.rows(slice(5, 9))
    assert np.array_equal(pack(part), rows[5:9]) and np.array_equal(pack(part.stack([part, part]))[4:], rows[5:9])
    assert encoded(part).number == BY_NAME[name].number and np.array_equal(encoded(part).read(), rows[5:9])


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_code_is_used(name):
    """Random bytes decode to all the values that the grid says there are, and each is its own nearest."""
    grid, tensor = BLOCK_GRIDS[name], unpack(random_rows(name), name)
    codes = tensor.codes.unique()
    assert codes.tolist() == list(range(grid.levels.count))
    scale, zero = grid.steps(tuple(p[0] for p in tensor.params))
    values = grid.decode(codes.float()[:, None, None], scale, zero)
    found = grid.encode(values, scale, zero)
    assert torch.equal(found[:, scale != 0], codes.float()[:, None, None].expand_as(found)[:, scale != 0])


@pytest.mark.parametrize("name", BLOCK_GRIDS)
def test_zero_bytes(name):
    rows = np.zeros((2, BY_NAME[name].row_bytes(256)), np.uint8)
    tensor = unpack(rows, name)
    assert same_bits(tensor.dequantize(), dequantize(rows, BY_NAME[name].number))
    assert np.array_equal(pack(tensor), rows)


@pytest.mark.parametrize("name", codebooks.LAYOUTS)
def test_every_bit_of_a_block_is_one_number_s(name):
    places = np.concatenate([np.arange(16), *(of.places.ravel() for of in codebooks.LAYOUTS[name])])
    assert np.array_equal(np.sort(places), np.arange(8 * BY_NAME[name].block_bytes))


@pytest.mark.parametrize("name", codebooks.LAYOUTS)
def test_every_vector_is_its_own_nearest(name):
    """Random bytes hold vectors of every kind; each has all its columns' codes, in any order of entries and signs."""
    grid, tensor = BLOCK_GRIDS[name], unpack(random_rows(name, 1), name)
    assert tensor.codes.unique().tolist() == list(range(grid.levels.count))
    params = tuple(p[0] for p in tensor.params)
    scale, zero = (p.repeat_interleave(grid.width, 0) for p in grid.steps(params))
    codes = tensor.codes.T[: grid.span].float()
    found = grid.encode(grid.decode(codes, scale, zero), scale, zero)
    assert torch.equal(found[scale != 0], codes[scale != 0])
