"""Which columns are fitted together, after columns have been put into another order."""

import pytest
import torch

from ptq.grids.affine import AffineGrid
from ptq.quantizers.spans import cut_spans, fit_spans


@pytest.mark.parametrize(("span", "step"), [(4, 4), (4, 2), (6, 2), (10, 5), (16, 16)])
def test_spans_of_shuffled_columns(span, step):
    order = torch.randperm(10, generator=torch.Generator().manual_seed(span))
    spans = cut_spans(order, span, step)
    assert len(spans) == -(-10 // span)
    for s, part in enumerate(spans):
        visited = order[part.columns].tolist()
        assert sorted(visited) == list(range(s * span, min((s + 1) * span, 10)))
        assert part.step == [(column - s * span) // step for column in visited]


def test_neighbours_are_a_slice():
    natural = cut_spans(torch.arange(10), 4, 2)
    assert [span.columns for span in natural] == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert cut_spans(torch.randperm(10), 10, 10)[0].columns == slice(0, 10), "a whole row is not gathered"
    backwards = cut_spans(torch.arange(9, -1, -1), 5, 1)
    assert [span.columns for span in backwards] == [slice(5, 10), slice(0, 5)]
    assert backwards[0].step == [4, 3, 2, 1, 0]


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
