"""Streamed second moments against the whole matrix in fp64."""

import pytest
import torch
from test_columns import correlated, one_thread  # noqa: F401

import calibration.hessian
from calibration.hessian import Hessian, few_rows

TOKENS = 400
SPLITS = [[400], [1] * 400, [399, 1], [1, 399], [7] * 57 + [1], [128, 128, 128, 16]]


def close(ours, exact, X, X_full):
    """Within 1e-5 of the size of the terms, sqrt(H_ii H_jj): fp32 sums of n terms err by 2**-24 n at most = 2.4e-5,
    and by 2**-24 sqrt(n) = 1.2e-6 in practice."""
    size = (2 / TOKENS) * X_full.norm(dim=0)[:, None] * X.norm(dim=0)
    return bool(((ours.double() - exact).abs() <= 1e-5 * size).all())


@pytest.mark.parametrize("tile", [7, 64, 512])
@pytest.mark.parametrize("split", SPLITS, ids=len)
def test_any_split_gives_the_whole(split, tile, monkeypatch):
    monkeypatch.setattr(calibration.hessian, "TILE", tile)
    _, X, exact = correlated(0, tokens=TOKENS)
    X_full = correlated(1, tokens=TOKENS)[1]
    hessian, plain = Hessian(X.shape[1], cross=True), Hessian(X.shape[1])
    for x, x_full in zip(X.float().split(split), X_full.float().split(split), strict=True):
        hessian.add(x, x_full)
        plain.add(x)
    assert hessian.tokens == TOKENS
    H, G = hessian.finalise()
    assert H.dtype == G.dtype == torch.float32
    assert close(H, exact, X, X)
    assert close(G, 2 / TOKENS * X_full.T @ X, X, X_full)
    H_plain, G_plain = plain.finalise()
    assert G_plain is None and torch.equal(H_plain, H)
    # G is not symmetric: rows belong to the full-precision stream.
    assert not close(G.T, 2 / TOKENS * X_full.T @ X, X, X_full)


@pytest.mark.parametrize("tile", [4, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_outputs_are_summed_as_such(dtype, tile, monkeypatch, tmp_path):
    """W (G - H) of stacked weights, in memory and in files, over batches of any size."""
    monkeypatch.setattr(calibration.hessian, "TILE", tile)
    X, X_full = (correlated(seed, tokens=TOKENS)[1].to(dtype) for seed in (0, 1))
    weights = [correlated(seed)[0][:rows].to(dtype) for seed, rows in ((2, 3), (3, 9))]
    W, exact_H = torch.cat(weights).double(), 2 / TOKENS * X.double().T @ X.double()
    outputs = (X_full.double() - X.double()) @ W.T
    for folder in (None, tmp_path / "sums"):
        hessian = Hessian(X.shape[1], cross=True, weights=weights, folder=folder)
        for x, x_full in zip(X.split(90), X_full.split(90), strict=True):
            hessian.add(x, x_full)
        H, WG = hessian.finalise()
        assert WG.shape == W.shape and WG.dtype == torch.float32
        assert close(H, exact_H, X.double(), X.double())
        # outputs err by 2**-24 sqrt(I) of what their terms amount to, which outputs themselves are half of or more
        assert close(WG, 2 / TOKENS * outputs.T @ X.double(), X.double(), outputs)
    G = 2 / TOKENS * X_full.double().T @ X.double()
    torch.testing.assert_close(WG.double(), W @ (G - exact_H), rtol=0, atol=1e-5 * float((W @ G).abs().max()))


def test_what_is_summed_takes_fewer_products():
    """2 O I a token for W (G - H), I I for G."""
    assert few_rows(2048, 5632) and not few_rows(2048, 4096) and not few_rows(2816, 5632) and not few_rows(4096, 4096)


@pytest.mark.parametrize("tile", [512, 1, 10])
def test_tiles_and_files_change_no_bit(tile, monkeypatch, tmp_path):
    """However many rows a tile has, and with sums in files; a file of an earlier sum does not count."""
    _, X, _ = correlated(0, tokens=TOKENS)
    X, X_full = X.float(), correlated(1, tokens=TOKENS)[1].float()
    monkeypatch.setattr(calibration.hessian, "TILE", tile)
    sums = {}
    for folder in (None, tmp_path / "sums", tmp_path / "sums"):
        hessian = Hessian(X.shape[1], cross=True, folder=folder)
        for x, x_full in zip(X.split(90), X_full.split(90), strict=True):
            hessian.add(x, x_full)
        found = hessian.finalise()
        assert all(torch.equal(*pair) for pair in zip(found, sums.setdefault("first", found), strict=True))
    assert len(list((tmp_path / "sums").iterdir())) == 2 * len(hessian.tiles)
    assert close(found[0], 2 / TOKENS * X.double().T @ X.double(), X.double(), X.double())


def test_the_order_of_batches_changes_no_bit():
    """What makes ranks equal: sums of fp32 products of like size are exact in fp64."""
    batches = correlated(0, tokens=TOKENS)[1].float().split(20)
    found = []
    for order in (batches, batches[::-1], batches[1::2] + batches[::2]):
        hessian = Hessian(batches[0].shape[1], cross=True)
        for x in order:
            hessian.add(x, 2 * x)
        found.append(hessian.finalise())
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_samples_and_tokens_are_all_rows():
    X = correlated(0, tokens=TOKENS)[1].float()
    flat, shaped = Hessian(X.shape[1], cross=True), Hessian(X.shape[1], cross=True)
    flat.add(X, 2 * X)
    shaped.add(X.view(4, 100, -1), 2 * X.view(4, 100, -1))
    assert shaped.tokens == flat.tokens == TOKENS
    for a, b in zip(flat.finalise(), shaped.finalise(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_half_inputs_are_summed_in_single_precision(dtype):
    X = correlated(0, tokens=TOKENS)[1].to(dtype)
    hessian = Hessian(X.shape[1], cross=True)
    before = X.clone()
    for x in X.split(50):
        hessian.add(x, x)
    H, G = hessian.finalise()
    assert torch.equal(X, before)
    X = X.double()
    assert close(H, 2 / TOKENS * X.T @ X, X, X) and close(G, 2 / TOKENS * X.T @ X, X, X)


@pytest.mark.parametrize("tile", [7, 512])
def test_is_symmetric_and_dead_inputs_are_exact_zeros(tile, monkeypatch):
    monkeypatch.setattr(calibration.hessian, "TILE", tile)
    X = correlated(0, tokens=TOKENS)[1].float()
    X[:, 7] = 0
    hessian = Hessian(X.shape[1])
    for x in X.split(33):
        hessian.add(x)
    H, _ = hessian.finalise()
    assert torch.equal(H, H.T) and bool((H[7] == 0).all()) and bool((H[:, 7] == 0).all())
    assert int((H.diagonal() == 0).sum()) == 1


def test_no_tokens():
    H, G = Hessian(4, cross=True).finalise()
    assert torch.equal(H, torch.zeros(4, 4)) and torch.equal(G, torch.zeros(4, 4))


def test_tokens_count_as_often_as_they_are_said_to():
    """Weighted sums over any split; tokens past those that were counted count once."""
    X, X_full = (correlated(seed, tokens=TOKENS)[1] for seed in (0, 1))
    counts = torch.rand(150, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    every = torch.cat([counts, torch.ones(TOKENS - 150)])[:, None]
    W = correlated(2)[0][:5]
    for weights, wanted in ((None, (every * X_full).T @ X), ([W.float()], W @ (every * (X_full - X)).T @ X)):
        hessian = Hessian(X.shape[1], cross=True, weights=weights, counts=counts.float())
        for x, x_full in zip(X.float().split(90), X_full.float().split(90), strict=True):
            hessian.add(x, x_full)
        H, G = hessian.finalise()
        assert close(H, 2 / TOKENS * (every * X).T @ X, X, X)
        torch.testing.assert_close(G.double(), 2 / TOKENS * wanted, rtol=0, atol=1e-4 * float(G.abs().max()))
