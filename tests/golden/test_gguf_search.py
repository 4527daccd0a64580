"""The searches of block grids against llama.cpp's own quantizer, importances the same; TQ2_0's fourth value."""

import ctypes

import numpy as np
import pytest
import torch
from test_gguf_types import c_library

from ptq.export.gguf.codecs import pack
from ptq.export.gguf.types import BY_NAME, dequantize
from ptq.grids.blocks import BLOCK_GRIDS
from ptq.qtensor import BlockTensor
from ptq.quantizers.spans import fit_spans

ROWS, INPUTS = 96, 512
# Median over rows of our weighted error as a share of llama.cpp's: normal weights, then heavy-tailed ones. Measured
# with importances drawn log-normally (sigma 1), plus 0.02.
SHARES = {
    "Q1_0": (1.00, 1.00), "TQ1_0": (0.31, 0.52), "TQ2_0": (0.21, 0.38), "Q2_0": (0.23, 0.38),
    "Q4_0": (0.98, 0.97), "Q5_0": (1.00, 0.99), "Q8_0": (0.79, 0.89), "IQ4_NL": (0.95, 0.96),
    "Q4_1": (0.98, 0.99), "Q5_1": (0.99, 1.00), "Q2_K": (0.92, 0.84), "Q4_K": (0.97, 0.94),
    "Q5_K": (0.92, 0.88), "Q3_K": (0.98, 0.97), "Q6_K": (0.99, 0.98), "IQ4_XS": (0.94, 0.95),
    "IQ2_XXS": (0.86, 0.75), "IQ2_XS": (0.86, 0.76), "IQ2_S": (0.89, 0.80), "IQ3_XXS": (0.91, 0.85),
    "IQ3_S": (0.86, 0.84),
}  # fmt: skip


def reference(W, name, importance):
    """Values (O, I) of llama.cpp's quantizer with an importance matrix."""
    quantize = c_library().ggml_quantize_chunk
    quantize.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p] + 3 * [ctypes.c_int64] + [ctypes.c_void_p]
    quantize.restype = ctypes.c_size_t
    weights, importance, ggml_type = W.numpy(), importance.numpy(), BY_NAME[name]
    rows = np.zeros((len(W), ggml_type.row_bytes(W.shape[1])), np.uint8)
    arguments = weights.ctypes.data, rows.ctypes.data, 0, *W.shape, importance.ctypes.data
    assert quantize(ggml_type.number, *arguments) == rows.size
    return torch.from_numpy(dequantize(rows, ggml_type.number).copy())


def rounded(W, name, importance):
    """Our fit and nearest codes; of a codebook's vectors those that are nearest with the importance as weights."""
    grid = BLOCK_GRIDS[name]
    params, width = fit_spans(W, grid.span, grid.fit, importance), grid.columns_per_step(grid.span)
    codes = []
    for w, weight, numbers in zip(W.T.split(grid.span), importance.split(grid.span), params, strict=True):
        scale, zero = (p.repeat_interleave(width, 0) for p in grid.steps(numbers))
        if grid.vector == 1:
            codes.append(grid.encode(w, scale, zero))
            continue
        x, weight, scale = (t.T.reshape(-1, grid.vector) for t in (w, weight[:, None].expand_as(w), scale))
        codes.append(grid.book.nearest(x, weight, scale[:, 0]).view(-1, grid.span).T)
    return BlockTensor(torch.cat(codes).T.to(torch.uint8), tuple(map(torch.stack, zip(*params, strict=True))), grid)


@pytest.mark.parametrize("name", BLOCK_GRIDS)
def test_no_worse_than_llama_cpp_s_quantizer(name):
    generator = torch.Generator().manual_seed(0)
    for heavy, most in enumerate(SHARES[name]):
        W = 0.05 * torch.randn(ROWS, INPUTS, generator=generator)
        W /= torch.rand(ROWS, INPUTS, generator=generator) ** (0.4 * heavy)
        importance = torch.exp(torch.randn(INPUTS, generator=generator))
        ours, theirs = (
            ((values - W).double().square() * importance).sum(1)
            for values in (rounded(W, name, importance).dequantize(), reference(W, name, importance))
        )
        share = float((ours / theirs).median())
        print(f"{name} {'heavy' if heavy else 'normal'} {share:.3f}")
        assert share <= most


@pytest.mark.parametrize("kernel", ["ggml_vec_dot_tq2_0_q8_K", "ggml_vec_dot_tq2_0_q8_K_generic"])
def test_llama_cpp_multiplies_the_fourth_value_of_tq2_0(kernel):
    """Two bits hold -1, 0, 1 and 2 times d: products with activations that 8 bits hold exactly are exact."""
    library, generator = c_library(), torch.Generator().manual_seed(1)
    codes = torch.randint(0, 4, (1, INPUTS), generator=generator).to(torch.uint8)
    tensor = BlockTensor(codes, (torch.tensor([[0.5], [-0.25]]),), BLOCK_GRIDS["TQ2_0"])
    row, x = pack(tensor), torch.randint(-127, 128, (INPUTS,), generator=generator).float().numpy()
    x[::256] = -127  # the largest of each block of activations decides their scale: 1
    stored, result = np.zeros(INPUTS // 256 * 292, np.uint8), np.zeros(1, np.float32)
    pointer, whole = ctypes.c_void_p, ctypes.c_int64
    library.ggml_cpu_init()  # fills the tables that fp16 numbers are read through
    library.quantize_row_q8_K.argtypes = pointer, pointer, whole
    library.quantize_row_q8_K(x.ctypes.data, stored.ctypes.data, INPUTS)
    dot = getattr(library, kernel)
    size = ctypes.c_size_t
    dot.argtypes = ctypes.c_int, pointer, size, pointer, size, pointer, size, ctypes.c_int
    dot(INPUTS, result.ctypes.data, 0, row.ctypes.data, 0, stored.ctypes.data, 0, 1)
    expected = float(tensor.dequantize()[0].double() @ torch.from_numpy(x).double())
    assert float(result[0]) == pytest.approx(expected, rel=1e-6) and abs(expected) > 100
