"""Sums over tokens in bf16 with fp32 sums: how numbers are rounded, which products are added, and to what."""

import pytest
import torch

from calibration.bf16_sums import PANEL, TokenSums, in_panels, sums_in_bf16
from calibration.hessian import TILE, Hessian
from calibration.processor import has_bf16_units
from calibration.products import bf16_products

AVX512_BF16 = pytest.mark.skipif(not has_bf16_units(), reason="this processor has no instructions for bf16")


def matrix(T, columns, seed=0):
    """Numbers of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(T, columns, generator=generator)
    return numbers * 10 ** torch.randint(-3, 3, (columns,), generator=generator)


def unpacked(panels, T, columns):
    """(T, columns) bf16."""
    pairs = panels.view(torch.bfloat16).unflatten(-1, (PANEL, 2))  # panel, pair of tokens, column, token
    return pairs.permute(1, 3, 0, 2).flatten(2).flatten(0, 1)[:T, :columns]


@pytest.mark.parametrize("T, columns", [(1, 1), (6, 32), (7, 70), (64, 33)])
@pytest.mark.parametrize("counted", [False, True])
def test_packed_numbers_are_torch_s_bf16(T, columns, counted):
    x = matrix(T, columns)
    x[0, 0], x[-1, -1] = 1 + 2**-8, 1 + 3 * 2**-8  # in the middle between two
    counts = torch.linspace(0.3, 1.7, T) if counted else None
    panels = TokenSums().packed("x", x, counts)
    expected = (x * counts[:, None] if counted else x).bfloat16()
    assert torch.equal(unpacked(panels, T, columns), expected)
    assert x.untyped_storage().resizable(), "or halted forwards could not let go of what a stage has read"
    assert panels.count_nonzero() <= -(-T // 2) * columns, "what fills up is zero"


def test_what_is_not_finite_stays_so():
    special = [torch.inf, -torch.inf, torch.nan, 3.4e38, -0.0, 1e-40]
    x = torch.cat([torch.tensor(special), torch.tensor([0x7F800001, -1], dtype=torch.int32).view(torch.float32)])[None]
    found = unpacked(TokenSums().packed("x", x), 1, 8)[0]
    assert torch.equal(found.isnan(), x[0].isnan()) and torch.equal(
        found[~found.isnan()], x[0].bfloat16()[~x[0].isnan()]
    )


@AVX512_BF16
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("T, rows, columns", [(5, 3, 40), (300, 100, 65), (1000, 64, 96)])
def test_products_are_those_of_rounded_factors(T, rows, columns, threads, monkeypatch):
    monkeypatch.setattr("calibration.bf16_sums.LEAST", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    A, B, total = matrix(T, rows), matrix(T, columns, 1), torch.ones(rows, columns, dtype=torch.float64)
    sums = TokenSums()
    for _ in range(2):
        sums.add(total, sums.packed("A", A), sums.packed("B", B))
    a, b = A.bfloat16().double(), B.bfloat16().double()
    # products are exact; sums of T of them are off by T * 2^-24 of their terms, the instruction's own two sums counted
    bound = 2 * T * 2**-24 * (a.abs().T @ b.abs())
    assert bool(((total - 1 - 2 * a.T @ b).abs() <= bound + 1e-15).all())


@AVX512_BF16
def test_the_upper_half_alone():
    x, size = matrix(50, 100), 100
    whole, half = (torch.zeros(size, size, dtype=torch.float64) for _ in range(2))
    sums = TokenSums()
    panels = sums.packed("x", x)
    sums.add(whole, panels, panels)
    sums.add(half, panels, panels, upper=True)
    panel = torch.arange(size) // PANEL
    kept = panel[:, None] <= panel
    assert torch.equal(half[kept], whole[kept]) and not half[~kept].any()
    assert in_panels(slice(64, 100)) == slice(2, 4)


@AVX512_BF16
@pytest.mark.parametrize("weights", [None, (40, 24)])
@pytest.mark.parametrize("counted", [False, True])
def test_moments_under_bf16_products(weights, counted, monkeypatch):
    """Two tiles, the second shorter, and a stage's moments, of two batches of other lengths."""
    monkeypatch.setattr("calibration.bf16_sums.has_amx", lambda: False)
    size = TILE + 40
    weights = weights and [matrix(O, size, seed=O) for O in weights]
    x, x_full, counts = (
        matrix(70, size),
        matrix(70, size, 1),
        torch.linspace(0.5, 1.5, 70) if counted else torch.ones(70),
    )
    hessian = Hessian(size, cross=True, weights=weights, counts=counts if counted else None)
    with bf16_products(True):
        assert sums_in_bf16(x)
        rows = []
        for some in (slice(0, 33), slice(33, 70)):
            hessian.add(x[some], x_full[some])
            rows.append(hessian._cross_rows(x[some], x_full[some]))
        H, G = hessian.finalise()
    plain, by_count = x.bfloat16().double(), (x * counts[:, None]).bfloat16().double()
    wanted = x_full if weights is None else torch.cat([(x_full - x) @ W.T for W in weights], 1)
    reach = wanted.abs() if weights is None else torch.cat([(x_full - x).abs() @ W.abs().T for W in weights], 1)
    rows = torch.cat(rows)
    assert bool(((rows - wanted).abs() <= 2 * 2**-9 * reach + 1e-6 * reach).all())  # with AMX, of factors in bf16
    rows, size_of_terms = rows.bfloat16().double(), lambda a: 2 / 70 * a.abs().T @ by_count.abs()
    upper = torch.triu(2 / 70 * plain.T @ by_count)
    bound = 70 * 2**-24 * size_of_terms(plain)
    assert bool(((H.double() - (upper + upper.triu(1).T)).abs() <= torch.triu(bound) + torch.triu(bound, 1).T).all())
    assert bool(((G.double() - 2 / 70 * rows.T @ by_count).abs() <= 70 * 2**-24 * size_of_terms(rows)).all())


def test_fp32_where_nothing_is_rounded():
    assert not sums_in_bf16(torch.ones(1))
