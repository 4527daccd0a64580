"""The vector of a codebook that is nearest in the metric of a few columns' Hessian, their scale given.

The loss of m adjacent columns is (q - x)^T A (q - x), with q = scale * c, c a vector of the codebook. Magnitudes c that
share their signs are compared by one table of c^T A c, the same for all rows, and one product with A x; signs that
share their magnitudes by the m (m - 1) / 2 products of two columns. So the signs of x choose magnitudes, these rank the
signs, and the best few signs choose magnitudes once more. Trying all signs is the exact search (where a vector is two
entries, these are chosen in turn); LOG.md has what few of them lose.

Legend: N entries, w columns of an entry, m columns of a vector, n signs (half of the allowed ones), O outputs.
"""

from functools import lru_cache

import numpy as np
import torch
from numba import njit

from calibration.threads import over_rows
from ptq.grids.blocks.codebook import lowest
from ptq.grids.compiled import arrays, compiled

TRIES = 2


def nearest_vectors(book, A, x, scale, codes=None, *, tries=TRIES):
    """Codes that nearly minimise (q - x)^T A (q - x) of every row.

    Args:
        book: A Codebook.
        A: (m, m) symmetric, positive definite.
        x: (m, O).
        scale: (O,) not 0.
        codes: (m, O) that stay where nothing better is found, or None.
        tries: Signs that choose magnitudes for good.

    Returns:
        (m, O) codes, as floats.
    """
    forms, pull = entry_forms(book, A), (A @ x).mul_(scale)
    if not compiled(x):
        return _by_operators(book, A, forms, pull, x / scale, scale.square(), codes, tries)
    found = torch.empty_like(x) if codes is None else codes.clone(memory_format=torch.contiguous_format)
    given = arrays(A.contiguous(), forms, pull, x / scale, scale.square(), found)
    over_rows(_by_loops, x.shape[1], *given, codes is not None, tries, *_constants(book))
    return found


def entry_forms(book, A):
    """c^T A c of every entry under every sign of its columns, (parts, 2**(w-1), N): opposite signs give the same.

    Bit i of a sign's number is set where column i is negative; the last column is positive.
    """
    w, (signs, mixed, squares) = book.width, _products(book, A.dtype, A.device)
    first, second = torch.triu_indices(w, w, 1)
    forms = []
    for start in range(0, book.columns, w):
        block = A[start : start + w, start : start + w]
        forms.append(torch.addmm(block.diagonal() @ squares, signs * (2 * block[first, second]), mixed))
    return torch.stack(forms)


@lru_cache
def _products(book, dtype, device):
    """Of every two columns: signs (2**(w-1), pairs) and entries (pairs, N); squares of the entries (w, N)."""
    w, entries = book.width, book.entries.to(device, dtype)
    first, second = torch.triu_indices(w, w, 1)
    signs = 1 - 2 * (torch.arange(1 << (w - 1))[:, None] >> torch.arange(w) & 1).to(device, dtype)
    mixed = (entries[:, first] * entries[:, second]).T.contiguous()
    return signs[:, first] * signs[:, second], mixed, entries.T.square().contiguous()


@lru_cache
def _constants(book):
    """What the compiled loop reads of a codebook."""
    signs = book.signs.numpy()
    first, second = np.triu_indices(book.columns, 1)
    return (
        np.ascontiguousarray(book.entries.numpy().T), np.float32(book.magnitudes), book.places.astype(np.int64),
        np.ascontiguousarray(signs.T), np.ascontiguousarray((signs[:, first] * signs[:, second]).T),
    )  # fmt: skip


def _by_operators(book, A, forms, pull, x, square, codes, tries):
    """The same steps as the compiled loop, in torch; x is in units of the scale, all of (m, O)."""
    search = _Search(book, A, forms, pull.T, square)
    levels = torch.tensor(book.levels.table, dtype=x.dtype, device=x.device)
    values = search.magnitudes(torch.where(x.T < 0, -1.0, 1.0).to(x), x.T)
    best, loss = values, torch.full_like(square, torch.inf)
    if codes is not None:
        best = levels[codes.long().T]
        loss = search.loss(best)
    for trial in search.signs(values.abs(), tries):
        found = search.magnitudes(trial, trial * values.abs())
        found_loss = search.loss(found)
        better = found_loss < loss
        best, loss = torch.where(better[:, None], found, best), torch.where(better, found_loss, loss)
    return torch.searchsorted(levels, best.contiguous()).to(x.dtype).T.contiguous()


class _Search:
    """The parts of the search; rows first."""

    def __init__(self, book, A, forms, pull, square):
        self.book, self.A, self.forms, self.pull, self.square = book, A, forms, pull, square
        self.entries = book.entries.to(A)

    def magnitudes(self, sign, values):
        """The best entries under these signs, part after part, the other parts as they are in values (O, m)."""
        w, m, values = self.book.width, self.book.columns, values.clone()
        for _ in range(self.book.parts):
            for part, start in enumerate(range(0, m, w)):
                own = slice(start, start + w)
                others = values.clone()
                others[:, own] = 0
                pull = self.pull[:, own] - self.square[:, None] * (others @ self.A[:, own])
                minus = ((sign[:, own] < 0) * (1 << torch.arange(w, device=sign.device))).sum(1)
                minus = torch.where(minus >= 1 << (w - 1), (1 << w) - 1 - minus, minus)
                scores = self.square[:, None] * self.forms[part][minus] - 2 * (sign[:, own] * pull) @ self.entries.T
                values[:, own] = sign[:, own] * self.entries[scores.argmin(1)]
        return values

    def loss(self, values):
        """(O,) less what does not depend on the vector."""
        return self.square * ((values @ self.A) * values).sum(1) - 2 * (self.pull * values).sum(1)

    def signs(self, magnitudes, tries):
        """The best signs with these magnitudes (O, m), the best ones first."""
        signs = self.book.signs.to(self.A)
        first, second = torch.triu_indices(self.book.columns, self.book.columns, 1, device=self.A.device)
        mixed = magnitudes[:, first] * magnitudes[:, second] * (2 * self.A[first, second])
        form = self.square[:, None] * (mixed @ (signs[:, first] * signs[:, second]).T)
        along = 2 * (magnitudes * self.pull) @ signs.T
        order = torch.cat([form - along, form + along], 1).argsort(dim=1, stable=True)[:, :tries]
        return [torch.cat([signs, -signs])[order[:, t]] for t in range(order.shape[1])]


@njit(nogil=True, cache=True, fastmath=True)
def _by_loops(first, last, A, forms, pull, x, square, codes, given, tries, entries, magnitudes, places, signs, pairs):
    m, n, count = len(A), signs.shape[1], len(magnitudes)
    sign, values, y = np.empty(m, np.float32), np.empty(m, np.float32), np.empty(m, np.float32)
    trial, trial_values, best = np.empty(m, np.float32), np.empty(m, np.float32), np.empty(m, np.int64)
    place, scores = np.empty(m, np.int64), np.empty(entries.shape[1], np.float32)
    rank = np.empty(2 * n, np.float32)
    for o in range(first, last):
        s2 = square[o]
        for i in range(m):
            y[i] = pull[i, o]
            if given:
                best[i] = int(codes[i, o])
                values[i] = -magnitudes[count - 1 - best[i]] if best[i] < count else magnitudes[best[i] - count]
        loss = _loss(A, y, s2, values) if given else np.float32(np.finfo(np.float32).max)
        for i in range(m):
            values[i] = x[i, o]
            sign[i] = np.float32(-1) if values[i] < 0 else np.float32(1)
        _magnitudes(A, forms, y, s2, sign, values, entries, places, place, scores)
        _rank(A, y, s2, values, signs, pairs, rank)
        for _ in range(tries):
            chosen = 0
            for j in range(1, 2 * n):
                if rank[j] < rank[chosen]:
                    chosen = j
            rank[chosen] = np.finfo(np.float32).max
            turned = np.float32(1) if chosen < n else np.float32(-1)
            for i in range(m):
                trial[i] = turned * signs[i, chosen % n]
                trial_values[i] = trial[i] * abs(values[i])
            _magnitudes(A, forms, y, s2, trial, trial_values, entries, places, place, scores)
            found = _loss(A, y, s2, trial_values)
            if found < loss:
                loss = found
                for i in range(m):
                    best[i] = count - 1 - place[i] if trial[i] < 0 else count + place[i]
        for i in range(m):
            codes[i, o] = best[i]


@njit(nogil=True, cache=True, fastmath=True)
def _magnitudes(A, forms, y, s2, sign, values, entries, places, place, scores):
    """The best entries under these signs, into values and place."""
    m, w, parts = len(A), len(entries), len(forms)
    slope = np.empty(w, np.float32)
    for _ in range(parts):
        for part in range(parts):
            start, minus = part * w, 0
            for i in range(w):
                total = y[start + i]
                for j in range(m):
                    if j < start or j >= start + w:
                        total -= s2 * A[start + i, j] * values[j]
                slope[i] = np.float32(-2) * sign[start + i] * total
                minus |= int(sign[start + i] < 0) << i
            if minus >= 1 << (w - 1):
                minus = (1 << w) - 1 - minus
            entry = _best_entry(forms[part, minus], s2, entries, slope, scores)
            for i in range(w):
                place[start + i] = places[entry, i]
                values[start + i] = sign[start + i] * entries[i, entry]


@njit(nogil=True, cache=True, fastmath=True)
def _best_entry(form, s2, entries, slope, scores):
    """The entry with the lowest s2 * form + slope . entry."""
    for e in range(len(scores)):
        scores[e] = s2 * form[e]
    for i in range(0, len(entries), 4):
        a, b, c, d = slope[i], slope[i + 1], slope[i + 2], slope[i + 3]
        for e in range(len(scores)):
            scores[e] += a * entries[i, e] + b * entries[i + 1, e] + c * entries[i + 2, e] + d * entries[i + 3, e]
    return lowest(scores)


@njit(nogil=True, cache=True, fastmath=True)
def _loss(A, y, s2, values):
    total = np.float32(0)
    for i in range(len(A)):
        row = np.float32(0)
        for j in range(len(A)):
            row += A[i, j] * values[j]
        total += values[i] * (s2 * row - np.float32(2) * y[i])
    return total


@njit(nogil=True, cache=True, fastmath=True)
def _rank(A, y, s2, values, signs, pairs, rank):
    """Losses, less what all have in common, of the magnitudes of values under every allowed sign."""
    m, n = signs.shape
    rank[:] = 0
    pair = 0
    for i in range(m):
        for j in range(i + 1, m):
            mixed = np.float32(2) * s2 * A[i, j] * abs(values[i] * values[j])
            for k in range(n):
                rank[k] += mixed * pairs[pair, k]
            pair += 1
    for k in range(n):
        rank[n + k] = rank[k]
    for i in range(m):
        along = np.float32(2) * abs(values[i]) * y[i]
        for k in range(n):
            rank[k] -= along * signs[i, k]
            rank[n + k] += along * signs[i, k]
