"""A weight rounded onto the grids of its groups, and the gradient that reaches their scales.

On a CPU, where the weight itself takes no gradient, both are one compiled loop over it: a dozen operators would read
and write it that often. The operators give the same values, and gradients but for the order of their sums.

Legend: R groups, g columns of a group.
"""

import numpy as np
import torch
from numba import njit

from calibration.threads import over_rows
from ptq.grids.compiled import arrays, compiled, even_value, rint

LEAST = 1 << 20  # weights that are worth a thread


class Rounded(torch.autograd.Function):
    """scale * (clamp(round(w / scale + zero)) - zero), its rounding passed straight through.

    d value / d w is 1 inside the code range and 0 outside; d value / d scale is code - zero - w / scale inside, and
    code - zero outside (the gradient of LSQ, arXiv 1902.08153, equation 3).
    """

    @staticmethod
    def forward(ctx, w, scale, zero, top):
        """Values (O, G, g) of w (O, G, g) on grids with scale and zero (O, G, 1) and codes up to `top`."""
        trained = ctx.needs_input_grad[0]
        if compiled(w) and not trained:
            values, slope, inside = w.new_empty(w.shape), w.new_empty(w.shape), None
            cut = w.contiguous().flatten(0, 1)
            given = arrays(cut, scale.flatten(), zero.flatten(), values.view_as(cut), slope.view_as(cut))
            over_rows(_round, len(cut), *given, np.float32(top), least=LEAST // w.shape[-1])
        else:
            codes = (w / scale).add_(zero).round_()
            clamped = codes.clamp(0, top)
            inside = codes.eq_(clamped)
            values = clamped.sub_(zero).mul_(scale)
            slope = torch.addcmul(values, inside, w, value=-1)
        ctx.save_for_backward(scale, slope, inside if trained else None)  # slope: d value / d scale, times scale
        return values

    @staticmethod
    def backward(ctx, grad):
        """Gradients of w, where it is trained, and of scale."""
        scale, slope, inside = ctx.saved_tensors
        if compiled(grad) and inside is None:
            sums, cut = scale.new_empty(scale.shape), slope.flatten(0, 1)
            given = arrays(cut, grad.contiguous().view_as(cut), scale.flatten(), sums.flatten())
            over_rows(_summed, len(cut), *given, least=LEAST // grad.shape[-1])
            return None, sums, None, None
        grad_scale = (slope * grad).sum(-1, keepdim=True).div_(scale)
        return None if inside is None else grad * inside, grad_scale, None, None


@njit(nogil=True, cache=True, error_model="numpy")
def _round(first, last, w, scale, zero, values, slope, top):
    for r in range(first, last):
        row, rounded, off = w[r], values[r], slope[r]  # views: an index that may be negative is not vectorised
        s, z = scale[r], zero[r]
        for j in range(w.shape[1]):
            code = rint(row[j] / s + z)
            clamped = min(max(code, np.float32(0)), top)
            rounded[j] = even_value(clamped, s, z)
            off[j] = rounded[j] - (row[j] if code == clamped else np.float32(0))


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"})
def _summed(first, last, slope, grad, scale, sums):
    for r in range(first, last):
        row, slopes, total = slope[r], grad[r], np.float32(0)
        for j in range(slope.shape[1]):
            total += row[j] * slopes[j]
        sums[r] = total / scale[r]
