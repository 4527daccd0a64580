"""The solver on llama.cpp's block types: codes against the textbook surgeon in fp64, losses, refinement, bytes."""

from functools import lru_cache

import numpy as np
import pytest
import torch
from test_columns import correlated, damped, one_thread, remaining_inverses, trace, visiting_order  # noqa: F401

from ptq.export.gguf.codecs import pack, unpack
from ptq.export.gguf.types import BY_NAME, dequantize
from ptq.grids.blocks import BLOCK_GRIDS
from ptq.grids.grid import Knob
from ptq.quantizers.gptq import gptq
from ptq.quantizers.refine import Local
from ptq.quantizers.spans import Span
from ptq.spec import QuantSpec

OUTPUTS, INPUTS, DAMP = 24, 256, 0.01
SPEC = {"damp_percent": DAMP, "correction": 0.0}
ONE_OF_EACH_KIND = "Q2_0", "IQ4_NL", "Q4_1", "Q2_K", "Q3_K", "IQ4_XS"


@lru_cache
def problem(inputs=INPUTS):
    """Weights (OUTPUTS, inputs) of a linear's size, and H; fp64 numbers that fp32 holds."""
    W, _, H = correlated(0, OUTPUTS, inputs, tokens=2 * inputs)
    return (0.05 * W).float().double(), H.float().double()


@lru_cache
def inverses(order):
    """The damped Hessian in visiting order, less its first columns one by one, inverted."""
    H = problem()[1]
    visited = visiting_order(H, order == "activation")
    return visited, remaining_inverses(damped(H, DAMP)[visited][:, visited])


def solve(name, inputs=INPUTS, **changes):
    W, H = problem(inputs)
    return gptq(W.float(), H.float(), QuantSpec(**SPEC, **changes), grid=BLOCK_GRIDS[name])


def values_of_columns(quantized):
    """Every value that each weight could have had, (count, O, I) fp64, from the format's own decoding."""
    count = quantized.grid.levels.count
    return torch.stack(
        [type(quantized)(torch.full_like(quantized.codes, q), quantized.params, quantized.grid).dequantize()
         for q in range(count)]
    ).double()  # fmt: skip


@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_codes_are_the_surgeons_on_the_chosen_values(name, order):
    """Optimal Brain Surgeon with the remaining Hessian inverted at every column, over the solution's own values."""
    solution = solve(name, refine_rounds=0, column_order=order)
    visited, inverse = inverses(order)
    values, W = values_of_columns(solution.quantized)[..., visited], problem()[0][:, visited].clone()
    step = (values[-1] - values[0]).abs() / (len(values) - 1)
    codes, margin = torch.empty(OUTPUTS, INPUTS), torch.ones(OUTPUTS).double()
    loss = torch.zeros(OUTPUTS).double()
    for k, remaining in enumerate(inverse):
        distance = (values[..., k] - W[:, k]).abs()
        nearest = distance.topk(2, 0, largest=False)
        codes[:, k] = nearest.indices[0]
        margin = torch.minimum(margin, (nearest.values[1] - nearest.values[0]) / step[:, k])
        error = W[:, k] - values[nearest.indices[0], torch.arange(OUTPUTS), k]
        loss += error**2 / remaining[0, 0]
        W[:, k:] -= (error / remaining[0, 0])[:, None] * remaining[0]
    # Targets are fp32 sums of INPUTS terms of up to `count` steps; random signs gain back the root of INPUTS.
    clear = margin > 2**-23 * len(values) * INPUTS**0.5 * 2
    assert clear.double().mean() > 0.6
    assert torch.equal(solution.quantized.codes[:, visited][clear].float(), codes[clear])
    torch.testing.assert_close(solution.loss[clear].double(), loss[clear], rtol=len(values) * 2**-23 * INPUTS, atol=0)


@pytest.mark.parametrize("name", BLOCK_GRIDS)
def test_what_is_solved_is_what_the_file_holds(name):
    """Over two blocks a row: losses as stated and falling, numbers that pack without rounding, llama.cpp's values."""
    W, H = problem(2 * INPUTS)
    solution = solve(name, 2 * INPUTS, refine_rounds=2)
    quantized = solution.quantized
    rows = pack(quantized)
    assert rows.shape == (OUTPUTS, BY_NAME[name].row_bytes(2 * INPUTS))
    values = quantized.dequantize()
    assert np.array_equal(values.numpy().view(np.uint32), dequantize(rows, BY_NAME[name].number).view(np.uint32))
    again = unpack(rows, name)
    assert torch.equal(again.codes, quantized.codes)
    assert all(torch.equal(a, b) for a, b in zip(again.params, quantized.params, strict=True))
    # D is a difference of numbers up to `count` times as large; losses are fp32 sums over the columns.
    rtol = quantized.grid.levels.count * 2**-23 * 2 * INPUTS
    torch.testing.assert_close(solution.loss.double(), trace(values - W, damped(H, DAMP)), rtol=rtol, atol=0)
    unrefined = solve(name, 2 * INPUTS, refine_rounds=0)
    assert torch.equal(unrefined.loss, solution.loss_gptq)
    assert bool((solution.loss <= solution.loss_gptq * (1 + rtol)).all())
    assert solution.loss.sum() < 0.97 * solution.loss_gptq.sum() < 0.6 * solution.loss_rtn.sum()


@pytest.mark.parametrize("size", [1e-6, 1e-9, 0.0])
@pytest.mark.parametrize("name", BLOCK_GRIDS)
def test_tiny_and_zero_weights(name, size):
    W, H = problem()
    W = (W * size).float()
    W[3] = 0
    solution = gptq(W.clone(), H.float(), QuantSpec(**SPEC, refine_rounds=1), grid=BLOCK_GRIDS[name])
    values = solution.quantized.dequantize()
    assert bool(torch.isfinite(values).all()) and float(values[3].abs().max()) <= 2.0**-24
    assert np.array_equal(unpack(pack(solution.quantized), name).dequantize(), values)


def test_two_numbers_move_to_their_joint_minimum():
    """With every real number storable, a pair lands on the solution of two-dimensional least squares."""
    generator = torch.Generator().manual_seed(0)
    H = problem(32)[1].float()
    Wt, D = torch.randn(2, 32, 5, generator=generator)
    directions = torch.rand(2, 8, 5, generator=generator) + torch.tensor([0.0, 1.0])[:, None, None]
    numbers, columns = torch.zeros(2, 5), list(range(4, 20, 2))

    class Pair:
        def knobs(self, params, codes, step):
            second = Knob(numbers[1], columns, directions[1], torch.clone)
            yield Knob(numbers[0], columns, directions[0], torch.clone, second)

        def steps(self, params):
            return torch.zeros(2, 1, 5)

        def decode(self, codes, scale, zero):
            return codes

    local = Local(Wt, H, Wt.clone(), D.clone(), Span(slice(0, 32), [0] * 32))
    local.refit(Pair(), None)
    factor = torch.linalg.cholesky(H.double())
    for row in range(5):
        design = torch.zeros(32, 2, dtype=torch.float64)
        design[columns] = directions[:, :, row].T.double()
        expected = torch.linalg.lstsq(factor.T @ design, -factor.T @ D[:, row].double()).solution
        torch.testing.assert_close(numbers[:, row].double(), expected, rtol=1e-3, atol=1e-4)
        moved = D[:, row].double() + design @ numbers[:, row].double()
        torch.testing.assert_close(local.gradient[:, row].double(), H.double() @ moved, rtol=1e-3, atol=1e-2)
