"""Searches for real scales and minima with the smallest weighted squared error; what a file can hold comes after.

Candidates only propose codes: each is scored with the scale (and minimum) that is best for its codes, by least squares.
Legend: R rows, c columns that share a scale.
"""

from math import log2

import torch

TINY = torch.finfo(torch.float32).tiny
CHUNK = 1 << 18  # elements searched at once: a dozen temporaries of this size stay in the last-level cache
FINE_STEPS = 2
WIDEST = 1.03  # a ramp a little wider than the weights may round them better


def in_chunks(fit, w, weight):
    """fit(w, weight) of (R, c) rows, some at a time; params are joined along their last dimension."""
    weight, step = weight.expand_as(w), max(1, CHUNK // w.shape[1])
    parts = [fit(w[r : r + step], weight[r : r + step]) for r in range(0, len(w), step)]
    return tuple(torch.cat(p, -1) for p in zip(*parts, strict=True))


def search_scale(levels, x, weight, candidates=20):
    """The scale of either sign that minimises sum_j weight_j (x_j - nearest value)**2.

    Candidates lie between one that is too small for a normal sample of the same power and the one that clips nothing.
    The finer the levels, the less there is to gain from clipping: the range narrows.

    Args:
        levels: Even or Table.
        x: (R, c).
        weight: (R, c).
        candidates: Scales of each sign.

    Returns:
        (R,), 0 where x is 0.
    """
    low, high = levels.ends
    widest = x.abs().amax(1) / min(-low, high)
    normal = x.square().mean(1).sqrt() * ((0.6 + 0.6 * log2(levels.count)) / (high - low))
    narrowest = torch.minimum(normal, widest * (1 - 1.2 / levels.count**0.5))
    wx, best = weight * x, torch.zeros_like(widest)
    scale = torch.zeros_like(widest)
    _keep_scale(levels, x, wx, weight, plain_scale(levels, x), scale, best)
    for share in torch.linspace(0, 1, candidates).tolist():
        candidate = torch.lerp(narrowest, widest, share)
        for signed in (candidate, -candidate) if -low != high else (candidate,):
            _keep_scale(levels, x, wx, weight, signed, scale, best)
    for _ in range(FINE_STEPS):
        _keep_scale(levels, x, wx, weight, scale.clone(), scale, best)
    return scale


def plain_scale(levels, x):
    """(R,) scale that puts the largest of x (R, c) on the largest value."""
    if levels.count == 2:
        return x.abs().mean(1)
    largest = x.gather(1, x.abs().argmax(1, keepdim=True))[:, 0]
    return largest / max(levels.ends, key=abs)


def _keep_scale(levels, x, wx, weight, candidate, scale, best):
    """Overwrites scale and best, in place, in the rows where least squares on the candidate's codes gains more."""
    v = levels.at_one(levels.encode(x, candidate[:, None], levels.offset))
    along, norm = (wx * v).sum(1), (v.square_() * weight).sum(1).clamp_(min=TINY)
    gain = along * along / norm
    better = gain > best
    torch.where(better, along / norm, scale, out=scale)
    torch.where(better, gain, best, out=best)


def search_ramp(levels, x, weight, *, positive, candidates=6):
    """Scale and minimum that minimise sum_j weight_j (x_j - nearest of scale * code - minimum)**2.

    Args:
        levels: A Ramp.
        x: (R, c).
        weight: (R, c).
        positive: Only minima of at least 0, so that the lowest value is at most 0.
        candidates: Places of each end of the ramp.

    Returns:
        scale (R,) > 0 unless all x are equal, and minimum (R,).
    """
    low, high = x.amin(1), x.amax(1)
    if positive:
        low, high = low.clamp(max=0), high.clamp(min=0)
    middle, reach = (low + high) / 2, (high - low) / 2
    smallest = {4: 0.5, 16: 0.8}.get(levels.count, 0.92)
    fit = _RampFit(levels, x, weight, positive)
    for below in torch.linspace(smallest, WIDEST, candidates).tolist():
        for above in torch.linspace(smallest, WIDEST, candidates).tolist():
            fit.keep((below + above) * reach / (levels.count - 1), below * reach - middle)
    for _ in range(FINE_STEPS):
        fit.keep(fit.scale.clone(), fit.minimum.clone())
    return fit.scale, fit.minimum


class _RampFit:
    """The best ramp so far and what does not depend on codes."""

    def __init__(self, levels, x, weight, positive):
        self.levels, self.x, self.weight, self.wx, self.positive = levels, x, weight, weight * x, positive
        self.W, self.X = weight.sum(1).clamp_(min=TINY), self.wx.sum(1)
        self.scale, self.minimum = torch.zeros_like(self.W), torch.zeros_like(self.W)
        self.best = torch.full_like(self.W, torch.inf)

    def keep(self, scale, minimum):
        """Least squares on the codes of a candidate, kept in the rows where it is the best so far."""
        q = self.levels.encode(self.x, scale[:, None], minimum[:, None])
        wq = self.weight * q
        Q, QQ, QX = wq.sum(1), (wq * q).sum(1), (self.wx * q).sum(1)
        scale = (self.W * QX - Q * self.X) / (self.W * QQ - Q * Q).clamp_(min=TINY)
        minimum = (scale * Q - self.X) / self.W
        if self.positive:
            above = minimum < 0
            scale = torch.where(above, QX / QQ.clamp(min=TINY), scale)
            minimum = minimum.clamp_(min=0)
        error = scale * (scale * QQ - 2 * QX) + minimum * (minimum * self.W + 2 * self.X - 2 * scale * Q)
        better = (error < self.best) & (scale >= 0)
        for kept, new in ((self.scale, scale), (self.minimum, minimum), (self.best, error)):
            torch.where(better, new, kept, out=kept)


def weighted_error(levels, x, weight, scale, zero):
    """(R,) weighted squared error of rounding x (R, c) to the nearest value; scale and zero (R,)."""
    scale, zero = scale[:, None], zero[:, None]
    return (levels.decode(levels.encode(x, scale, zero), scale, zero).sub_(x).square_() * weight).sum(1)
