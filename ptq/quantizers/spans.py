"""Spans: which columns of a matrix are fitted together, where they lie, and their first fit.

Legend: O outputs, I inputs, c columns of a span, R rows.
"""

from dataclasses import dataclass

import torch

from ptq.grids.grid import Params


@dataclass(frozen=True)
class Span:
    """Columns that share params.

    Attributes:
        columns: Their places, ascending: a slice or a tensor of indices.
        step: (c,) which of the span's (scale, zero) pairs each column uses.
    """

    columns: slice | torch.Tensor
    step: list[int]


def cut_spans(order, span, columns_per_step) -> list[Span]:
    """Spans of matrices whose columns have been put into another order.

    Args:
        order: (I,) columns in their new order; runs of `span` of the old one are fitted together.
        span: Columns of a whole span; the last may be shorter.
        columns_per_step: Columns that share a (scale, zero) pair.
    """
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    spans = []
    for part in places.split(span):
        columns, natural = part.sort()
        first, last = int(columns[0]), int(columns[-1])
        together = last - first + 1 == len(columns)
        spans.append(Span(slice(first, last + 1) if together else columns, (natural // columns_per_step).tolist()))
    return spans


def fit_spans(W, span, fit, weight=None) -> list[Params]:
    """A fit of every span of every row.

    Args:
        W: (O, I), spans side by side.
        span: Columns of a whole span; the last may be shorter.
        fit: (R, c) rows, and weights of the same shape if there are any, to params.
        weight: (I,) or None.

    Returns:
        Each span's params, O rows each.
    """
    O, I = W.shape
    whole = I // span * span
    params = []
    for start, end in ((0, whole), (whole, I)):
        if start == end:
            continue
        width = min(span, end - start)
        given = [W[:, start:end].reshape(-1, width)]
        if weight is not None:
            given.append(weight[start:end].view(1, -1, width).expand(O, -1, -1).reshape(-1, width))
        fitted = [p.unflatten(-1, (O, -1)) for p in fit(*given)]
        params += [tuple(p[..., s].contiguous() for p in fitted) for s in range((end - start) // width)]
    return params
