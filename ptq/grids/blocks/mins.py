"""Super-blocks of steps with whole-number scales and minima under two fp16 numbers: Q2_K, Q4_K, Q5_K.

Both fp16 numbers may be negative: then the ramps run down from a largest value instead of up from a smallest one.

Legend: R rows (super-blocks), k steps, c columns of a super-block.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ptq.grids.blocks.levels import Levelled, Ramp, half_nonzero, half_or_nan
from ptq.grids.blocks.scaled import columns_of_steps
from ptq.grids.blocks.search import TINY, in_chunks, search_ramp
from ptq.grids.grid import Knob

FEWEST_SHARE = 0.7  # of the range of the whole numbers, used by the largest step
CANDIDATES = 16
POLISH = 2
NEIGHBOURS = [(a, b) for a in (0, -1, 1) for b in (0, -1, 1) if a or b]


@dataclass(frozen=True)
class MinsGrid(Levelled):
    """Params (sub, low, d, dmin): value = d * sub * code - dmin * low.

    sub and low are (k, R) whole numbers in 0..top, d and dmin (R,) in fp16.

    Attributes:
        name: llama.cpp's name of the type.
        width: Columns of a step.
        top: Largest sub-scale and sub-minimum.
        levels: A Ramp.
    """

    name: str
    width: int
    top: int
    levels: Ramp
    span = 256

    def fit(self, w, weight):
        """Ramps by search, then d, dmin and whole numbers near them, each step judged by its error; both directions."""
        return in_chunks(self._fit_rows, w, weight)

    def fit_minmax(self, w):
        """Each step from its smallest weight (or 0) to its largest, the largest step on the largest whole numbers."""
        x = w.reshape(len(w), -1, self.width)
        minimum = -x.amin(2).clamp(max=0)
        scales = (x.amax(2).clamp(min=0) + minimum) / (self.levels.count - 1)
        d, dmin = (half_nonzero(real.amax(1) / self.top) for real in (scales, minimum))
        sub, low = self._sub(scales / d[:, None]), self._low(minimum / dmin[:, None])
        return sub.T.contiguous(), low.T.contiguous(), d, dmin

    def _fit_rows(self, x, weight):
        x, weight = (t.reshape(len(t), -1, self.width) for t in (x, weight))  # (R, k, width)
        up, down = self._fit_up(x, weight), self._fit_up(-x, weight)
        better = up[-1] <= down[-1]
        sub, low = (torch.where(better[:, None], u, v).T.contiguous() for u, v in zip(up[:2], down[:2], strict=True))
        d, dmin = (torch.where(better, u, -v) for u, v in zip(up[2:4], down[2:4], strict=True))
        return sub, low, d, dmin

    def _fit_up(self, x, weight):
        """sub, low (R, k), d, dmin (R,) > 0 and the error (R,)."""
        scale, minimum = search_ramp(self.levels, x.flatten(0, 1), weight.flatten(0, 1), positive=True)
        scale, minimum = scale.view(x.shape[:2]), minimum.view(x.shape[:2])
        q = self.levels.encode(x, scale[..., None], minimum[..., None])
        W, Q, QQ = weight.sum(2), (weight * q).sum(2), (weight * q * q).sum(2)
        d = self._spread(scale, QQ - Q * Q / W.clamp(min=TINY))
        sub = self._sub(scale / d[:, None])
        minimum = ((d[:, None] * sub * Q - (weight * x).sum(2)) / W.clamp(min=TINY)).clamp_(min=0)
        dmin = self._spread(minimum, W)
        fit = sub, self._low(minimum / dmin[:, None]), d, dmin
        for _ in range(POLISH):
            *fit, error = self._polish(x, weight, *fit)
        return *fit, error

    def _sub(self, real):
        """A sub-scale of 0 would have no value that others have not."""
        return real.round().clamp_(1, self.top)

    def _low(self, real):
        return real.round().clamp_(0, self.top)

    def _spread(self, reals, norm):
        """(R,) the fp16 number whose whole multiples come nearest to reals (R, k), weighted by norm."""
        most = reals.amax(1) / self.top
        best, best_error = torch.zeros_like(most), torch.full_like(most, torch.inf)
        for share in torch.linspace(FEWEST_SHARE, 1.05, CANDIDATES).tolist():
            number = half_nonzero(most / share)
            wholes = (reals / number[:, None]).round_().clamp_(0, self.top)
            error = ((reals - number[:, None] * wholes).square_() * norm).sum(1)
            better = error < best_error
            torch.where(better, number, best, out=best)
            torch.where(better, error, best_error, out=best_error)
        return best

    def _polish(self, x, weight, sub, low, d, dmin):
        """Each step to its best neighbouring pair of whole numbers, codes rounded again; least squares for the rest."""
        error = self._errors(x, weight, sub, low, d, dmin)
        best_sub, best_low = sub, low
        for change, shift in NEIGHBOURS:
            trial_sub, trial_low = self._sub(sub + change), self._low(low + shift)
            trial_error = self._errors(x, weight, trial_sub, trial_low, d, dmin)
            better = trial_error < error
            best_sub, best_low = torch.where(better, trial_sub, best_sub), torch.where(better, trial_low, best_low)
            error = torch.where(better, trial_error, error)
        new_d, new_dmin = self._refit(x, weight, best_sub, best_low, d, dmin)
        new_error, error = self._errors(x, weight, best_sub, best_low, new_d, new_dmin).sum(1), error.sum(1)
        better = new_error < error
        d, dmin = torch.where(better, new_d, d), torch.where(better, new_dmin, dmin)
        return best_sub, best_low, d, dmin, torch.where(better, new_error, error)

    def _refit(self, x, weight, sub, low, d, dmin):
        """Least squares for d and dmin, codes and whole numbers fixed."""
        scale, minimum = (d[:, None] * sub)[..., None], (dmin[:, None] * low)[..., None]
        u, v = self.levels.encode(x, scale, minimum) * sub[..., None], -low[..., None].expand_as(x)
        uu, uv, vv, ux, vx = ((weight * a * b).sum((1, 2)) for a, b in ((u, u), (u, v), (v, v), (u, x), (v, x)))
        determinant = uu * vv - uv * uv
        flat = determinant <= 1e-6 * uu * vv
        determinant = torch.where(flat, torch.ones_like(uu), determinant)
        new_d = torch.where(flat, d, (ux * vv - vx * uv) / determinant)
        new_dmin = torch.where(flat, dmin, (vx * uu - ux * uv) / determinant)
        return half_nonzero(new_d), half_nonzero(new_dmin)

    def _errors(self, x, weight, sub, low, d, dmin):
        """(R, k) weighted squared errors of the steps."""
        scale, minimum = (d[:, None] * sub)[..., None], (dmin[:, None] * low)[..., None]
        values = self.levels.decode(self.levels.encode(x, scale, minimum), scale, minimum)
        return (values.sub_(x).square_() * weight).sum(2)

    def steps(self, params):
        """Scales d * sub and minima dmin * low, each (k, R)."""
        sub, low, d, dmin = params
        return d * sub, dmin * low

    def columns_per_step(self, span: int) -> int:
        """The format's."""
        return self.width

    def knobs(self, params, codes, step) -> Iterator[Knob]:
        """Each step's sub-scale and sub-minimum as a pair, then d and dmin as a pair."""
        sub, low, d, dmin = params
        for i, columns in enumerate(columns_of_steps(step, len(sub))):
            minimum = Knob(low[i], columns, -dmin.expand(len(columns), -1), self._low)
            yield Knob(sub[i], columns, d * codes[columns], self._sub, minimum)
        yield Knob(d, slice(None), sub[step] * codes, half_or_nan, Knob(dmin, slice(None), -low[step], half_or_nan))
