"""Spans: which columns of a matrix are fitted together, and their first fit.

Legend: O outputs, I inputs, c columns of a span, R rows.
"""

from dataclasses import dataclass

from ptq.grids.grid import Params


@dataclass(frozen=True)
class Span:
    """Columns that share params.

    Attributes:
        columns: Where they lie, side by side.
        step: (c,) which of the span's (scale, zero) pairs each column uses.
    """

    columns: slice
    step: list[int]


def cut_spans(in_features, span, columns_per_step) -> list[Span]:
    """The spans of a row.

    Args:
        in_features: I.
        span: Columns of a whole span; the last may be shorter.
        columns_per_step: Columns that share a (scale, zero) pair.
    """
    cuts = (slice(start, min(start + span, in_features)) for start in range(0, in_features, span))
    return [Span(cut, [j // columns_per_step for j in range(cut.stop - cut.start)]) for cut in cuts]


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
