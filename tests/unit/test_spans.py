"""Which columns are fitted together."""

import pytest
import torch

from ptq.grids.affine import AffineGrid
from ptq.quantizers.spans import cut_spans, fit_spans


@pytest.mark.parametrize(("span", "step"), [(4, 4), (4, 2), (6, 2), (10, 5), (16, 16)])
def test_spans_and_their_steps(span, step):
    spans = cut_spans(10, span, step)
    assert len(spans) == -(-10 // span)
    for s, part in enumerate(spans):
        columns = range(10)[part.columns]
        assert list(columns) == list(range(s * span, min((s + 1) * span, 10)))
        assert part.step == [(column - s * span) // step for column in columns]


@pytest.mark.parametrize("span", [3, 4, 10, 12])
def test_every_span_is_fitted_as_if_alone(span):
    generator, grid = torch.Generator().manual_seed(0), AffineGrid(3, False)
    W, weight = torch.randn(5, 10, generator=generator), torch.rand(10, generator=generator) + 0.1
    weighted, plain = fit_spans(W, span, grid.fit, weight), fit_spans(W, span, grid.fit_minmax)
    assert len(weighted) == len(plain) == -(-10 // span)
    for s, start in enumerate(range(0, 10, span)):
        columns = slice(start, start + span)
        for ours, alone in (
            (weighted[s], grid.fit(W[:, columns], weight[None, columns])),
            (plain[s], grid.fit_minmax(W[:, columns])),
        ):
            assert all(torch.equal(a, b) for a, b in zip(ours, alone, strict=True))
