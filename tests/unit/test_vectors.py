"""Codebooks in the solver: the nearest vector against all vectors, GPTQ by vectors against the textbook in fp64."""

import itertools

import pytest
import torch
from test_columns import correlated, damped, one_thread  # noqa: F401

from ptq.grids.blocks import BLOCK_GRIDS
from ptq.grids.blocks.codebook import CODEBOOKS
from ptq.quantizers import nearest, vectors
from ptq.quantizers.gptq import gptq
from ptq.quantizers.nearest import nearest_vectors
from ptq.spec import QuantSpec

ROWS, INPUTS = 12, 256
ALL = 1 << 8  # signs of a vector at most
ONE_ENTRY = [name for name, book in CODEBOOKS.items() if book.parts == 1]


def every_vector(book):
    """(n, m) fp64 values at scale 1, written out from what a codebook says."""
    signs = torch.tensor(list(itertools.product([1.0, -1.0], repeat=book.columns)), dtype=torch.float64)
    if book.even:
        signs = signs[signs.prod(1) > 0]
    return (signs[:, None] * book.entries.double()).flatten(0, 1)


def metric(book, seed=0):
    """A (m, m), x (m, ROWS) and scales (ROWS,) of both signs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(2 * book.columns, book.columns, generator=generator)
    x = torch.randn(book.columns, ROWS, generator=generator)
    scale = (1 / book.magnitudes[-2]) * (0.5 + torch.rand(ROWS, generator=generator))
    scale[::3] *= -1
    return mix.T @ mix / book.columns, x, scale


def values(book, codes, scale):
    return scale * book.levels.at_one(codes.double())


def losses(A, x, q):
    d = (q - x).double()
    return ((A.double() @ d) * d).sum(0)


def exhaustive(book, A, x, scale):
    """(ROWS,) smallest losses over all vectors."""
    candidates = every_vector(book)
    return torch.stack([losses(A, x[:, r : r + 1], scale[r] * candidates.T).min() for r in range(x.shape[1])])


@pytest.mark.parametrize("name", ONE_ENTRY)
def test_all_signs_are_the_exact_search(name):
    book = CODEBOOKS[name]
    A, x, scale = metric(book)
    expected = exhaustive(book, A, x, scale)
    for dtype in (torch.float32, torch.float64):
        found = nearest_vectors(book, A.to(dtype), x.to(dtype), scale.to(dtype), tries=ALL)
        torch.testing.assert_close(losses(A, x, values(book, found, scale)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CODEBOOKS)
def test_few_signs_lose_little_and_never_what_was_there(name):
    book, excess = CODEBOOKS[name], []
    for seed in range(4):
        A, x, scale = metric(book, seed)
        A = A + torch.eye(book.columns)  # about as far from diagonal as blocks of Hessians are
        most = losses(A, x, values(book, nearest_vectors(book, A, x, scale, tries=ALL), scale))
        for dtype in (torch.float32, torch.float64):
            few = nearest_vectors(book, A.to(dtype), x.to(dtype), scale.to(dtype))
            found = losses(A, x, values(book, few, scale))
            excess.append(found.sum() / most.sum() - 1)
            signs, _ = torch.where(few < len(book.magnitudes), -1, 1).prod(0).unique(return_counts=True)
            assert not book.even or signs.tolist() == [1]
            kept = nearest_vectors(book, A.to(dtype), x.to(dtype), scale.to(dtype), few, tries=1)
            assert bool((losses(A, x, values(book, kept, scale)) <= found * (1 + 1e-5)).all())
    assert sum(excess) / len(excess) < 0.05  # rounding along the diagonal alone loses 0.1 to 0.2


@pytest.mark.parametrize("name", CODEBOOKS)
def test_compiled_loops_are_the_loops_of_operators(name):
    book = CODEBOOKS[name]
    A, x, scale = metric(book, 1)
    given = nearest_vectors(book, A, x + 0.3, scale, tries=1)
    for codes in (None, given):
        ours = nearest_vectors(book, A, x, scale, codes)
        theirs = nearest_vectors(
            book, A.double(), x.double(), scale.double(), None if codes is None else codes.double()
        )
        assert float((ours == theirs).all(0).double().mean()) >= 0.9  # near ties apart
    weight = torch.rand(ROWS, book.columns) + 0.1
    ours = book.nearest(x.T, weight, scale)
    assert torch.equal(ours.double(), book.nearest(x.T.double(), weight.double(), scale.double()))


@pytest.mark.parametrize("name", CODEBOOKS)
def test_nearest_by_weights(name):
    """Exact where signs are free; where they are even, close to the exact search."""
    book = CODEBOOKS[name]
    _, x, scale = metric(book, 2)
    weight = torch.exp(torch.randn(ROWS, book.columns, generator=torch.Generator().manual_seed(0)))
    found = values(book, book.nearest(x.T, weight, scale).T, scale)
    excess = []
    for r in range(ROWS):
        A = weight[r].diag()
        best = nearest_vectors(book, A, x[:, r : r + 1], scale[r : r + 1], tries=ALL)
        least = losses(A, x[:, r : r + 1], values(book, best, scale[r : r + 1]))
        excess.append(float(losses(A, x[:, r : r + 1], found[:, r : r + 1]) / least) - 1)
    assert min(excess) > -1e-5 and max(excess) < (0.3 if book.even else 1e-5)


@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ3_S"])
def test_codes_are_the_surgeons_by_vectors(name, order, monkeypatch):
    """The remaining Hessian inverted after each vector, all vectors of the codebook tried, in fp64."""
    monkeypatch.setitem(nearest.nearest_vectors.__kwdefaults__, "tries", ALL)
    W, _, H = correlated(0, 3, INPUTS, tokens=2 * INPUTS)
    W, H = (0.05 * W).float().double(), H.float().double()
    grid = BLOCK_GRIDS[name]
    book, m = grid.book, grid.vector
    spec = QuantSpec(damp_percent=0.01, correction=0.0, refine_rounds=0, column_order=order)
    solution = gptq(W.float(), H.float(), spec, grid=grid)
    scales = torch.cat([grid.steps(tuple(p[s] for p in solution.quantized.params))[0] for s in range(1)]).double()
    by_column = scales.repeat_interleave(grid.width, 0).T  # (O, I)
    first = torch.arange(0, INPUTS, m)
    if order == "activation":
        first = first[H.diagonal().float().view(-1, m).amax(1).argsort(descending=True, stable=True)]
    candidates, H, left, loss = every_vector(book), damped(H, 0.01), W.clone(), torch.zeros(3).double()
    expected, remaining = torch.empty_like(W), torch.cat([first[:, None] + torch.arange(m)], 1).flatten()
    for k in range(0, INPUTS, m):
        rest = remaining[k:]
        inverse = torch.linalg.inv(H[rest][:, rest])
        A, v = torch.linalg.inv(inverse[:m, :m]), rest[:m]
        for r in range(3):
            q = by_column[r, v[0]] * candidates
            distance = ((q - left[r, v]) @ A * (q - left[r, v])).sum(1)
            expected[r, v] = q[distance.argmin()]
            loss[r] += distance.min()
        error = left[:, v] - expected[:, v]
        left[:, rest] -= error @ A @ inverse[:m]
    torch.testing.assert_close(solution.quantized.dequantize().double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(solution.loss.double(), loss, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", CODEBOOKS)
def test_a_sweep_lowers_every_row_and_keeps_the_gradient(name):
    W, _, H = correlated(1, ROWS, INPUTS, tokens=2 * INPUTS)
    H, target, grid = damped(H).float(), (0.05 * W).float().T.contiguous(), BLOCK_GRIDS[name]
    params = grid.fit(target.T, H.diagonal().expand(ROWS, -1))
    scale, zero = grid.steps(params)
    step = [column // grid.width for column in range(INPUTS)]
    codes = grid.encode(target, scale[step], zero[step])
    D = grid.decode(codes, scale[step], zero[step]) - target
    gradient, before = H @ D, (D * (H @ D)).sum(0)
    order = torch.randperm(INPUTS // grid.vector, generator=torch.Generator().manual_seed(0))
    vectors.sweep_vectors(grid, scale, zero, H, target, codes, D, gradient, step, order)
    torch.testing.assert_close(D, grid.decode(codes, scale[step], zero[step]) - target, rtol=0, atol=1e-6)
    torch.testing.assert_close(gradient, H @ D, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()) + 1e-5)
    after = (D * (H @ D)).sum(0)
    assert bool((after <= before * (1 + 1e-5)).all()) and float(after.sum()) < 0.9 * float(before.sum())
