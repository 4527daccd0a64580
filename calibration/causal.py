"""Causal attention of short rows on a CPU: pieces of queries, many heads at once, against the keys up to their end.

Torch's fused kernel splits the queries of a row into pieces of 32 or 64 where the row has fewer than 768 tokens, and
multiplies small matrices one head at a time, which takes half of a narrow block's forward and more of its way back.
In rows of 64 to 512 tokens this takes 0.3 to 0.8 of its time, and 0.2 to 0.7 both ways; towards 768 they are alike
(LOG.md).

Legend: B rows, T tokens in each, H heads of queries, K of keys and values, K dividing H, D and E numbers of a head.
"""

import math
from contextlib import nullcontext
from itertools import product

import torch

from calibration.processor import has_amx, product_precision

LONG = 768  # tokens in a row from which on the fused kernel takes pieces of 256 queries, and is faster than this
PIECE = 64  # queries of a head
ROOM = 1 << 18  # attention weights of a piece, all its heads together: a CPU's second cache holds them
KEPT = 1 << 24  # weights of a batch up to which they wait for the way back; of more they are computed again


def causal_attention(query, key, value, scale: float, *, trained: bool) -> torch.Tensor:
    """softmax(scale Q K^T) V, each query's weights over the keys up to its own; fp32 both ways, whatever is on outside.

    Args:
        query: (B, H, T, D), fp32.
        key: (B, K, T, D).
        value: (B, K, T, E).
        scale: Multiplies the products of queries and keys.
        trained: Whether gradients will be asked for.

    Returns:
        (B, T, H, E), as transformers' attention functions do.
    """
    return _Causal.apply(query, key, value, scale, trained)


class _Causal(torch.autograd.Function):
    """One row of text after the other: its keys and values are copied to lie together, all rows' would need memory."""

    @staticmethod
    def forward(ctx, query, key, value, scale, trained):
        """(B, T, H, E); a piece's weights are kept for the way back, or overwritten by the next one's."""
        (B, H, T, _), K = query.shape, key.shape[1]
        out = query.new_empty(B, T, H, value.shape[-1])
        keeps, kept = trained and B * H * T * T <= KEPT, []
        room = None if keeps else _room(query, K)
        with _fp32():
            for b in range(B):
                q, o = (x.unflatten(0, (K, -1)) for x in (query[b], out[b].transpose(0, 1)))
                k, v = key[b].contiguous(), value[b].contiguous()
                for heads, rows in _pieces(q):
                    weights = _weights(q[heads, :, rows], k[heads, : rows.stop], scale, room)
                    o[heads, :, rows] = (weights @ v[heads, : rows.stop]).unflatten(1, (H // K, -1))
                    kept += [weights] if keeps else []
        ctx.scale = scale
        ctx.save_for_backward(query, key, value, *kept)
        return out

    @staticmethod
    def backward(ctx, gradient):
        """Gradients of queries, keys and values, in their own order of memory."""
        query, key, value, *kept = ctx.saved_tensors
        slopes, K = (torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)), key.shape[1]
        room, other, kept = _room(query, K), None if kept else _room(query, K), iter(kept)
        with _fp32():
            for b in range(len(query)):
                q, g, of_q = (x.unflatten(0, (K, -1)) for x in (query[b], gradient[b].transpose(0, 1), slopes[0][b]))
                k, v, of_k, of_v = key[b].contiguous(), value[b].contiguous(), slopes[1][b], slopes[2][b]
                for heads, rows in _pieces(q):
                    to, queries, some = slice(rows.stop), q[heads, :, rows], g[heads, :, rows].flatten(1, 2)
                    weights = next(kept) if other is None else _weights(queries, k[heads, to], ctx.scale, other)
                    scores = torch.bmm(some, v[heads, to].mT, out=_part(room, weights.shape))
                    _through_softmax(scores, weights)
                    of_q[heads, :, rows] = (scores @ k[heads, to]).mul_(ctx.scale).view_as(queries)
                    of_k[heads, to].baddbmm_(scores.mT, queries.flatten(1, 2), alpha=ctx.scale)
                    of_v[heads, to].baddbmm_(weights.mT, some)
        return *slopes, None, None


def _pieces(q):
    """(heads of keys, queries of each) that are multiplied at once, of queries (K, H / K, T, D)."""
    heads, per_key, T, _ = q.shape
    return product(_parts(heads, max(1, ROOM // (per_key * PIECE * T))), _parts(T, PIECE))


def _parts(size, step):
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _room(query, K):
    """Memory for the weights of any piece."""
    _, H, T, _ = query.shape
    return query.new_empty(max(ROOM, H // K * PIECE * T))


def _part(room, shape):
    return room[: math.prod(shape)].view(shape)


def _weights(q, k, scale, room):
    """(heads, H / K * queries, keys) weights of a piece, in `room` if there is one."""
    (heads, per_key, rows, _), to = q.shape, k.shape[1]
    shape = heads, per_key * rows, to
    scores = torch.bmm((q * scale).flatten(1, 2), k.mT, out=q.new_empty(shape) if room is None else _part(room, shape))
    later = scores.new_full((rows, rows), -math.inf).triu_(1)
    scores.view(heads, per_key, rows, to)[..., to - rows :].add_(later)
    return torch.softmax(scores, -1, out=scores)


def _through_softmax(slopes, weights):
    """Makes gradients of a softmax's outputs those of its inputs, in place."""
    torch.ops.aten._softmax_backward_data.out(slopes, weights, -1, slopes.dtype, grad_input=slopes)


def _fp32():
    """Without AMX products are fp32 anyway; the switch then leads to the library that is faster on an AMD processor."""
    return product_precision("ieee") if has_amx() else nullcontext()
