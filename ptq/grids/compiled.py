"""Loops over weights compiled for a CPU: what they share, and the search of a group's scale.

An operator on a few thousand numbers spends its time on being called and on fetching them; a compiled loop does all
that is to be done with a row while it lies in the first cache. Loops of operators remain: for GPUs, for fp64, and as
what these are tested against.

Legend: R rows (one group each), g columns of a group, n candidates.
"""

import numpy as np
import torch
from numba import njit
from numba.extending import intrinsic

from calibration.threads import STEP, over_rows

TILE = STEP  # rows at once: the cache holds (c, TILE) numbers
EVEN, RAMP, TABLE = range(3)
KINDS = {"even": EVEN, "ramp": RAMP, "table": TABLE}


def compiled(tensor: torch.Tensor) -> bool:
    """Whether the compiled loops take a tensor."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32


def keep_best(w, weight, candidate_scale, candidate_zero, top, scale, zero, best):
    """Overwrites scale, zero and best, in place, in rows where a candidate has a smaller weighted error.

    Args:
        w: (R, g) weights.
        weight: (R, g) importance.
        candidate_scale: (n, R).
        candidate_zero: (n, R).
        top: Largest code of an evenly spaced grid.
        scale: (R,).
        zero: (R,).
        best: (R,) the present error.
    """
    given = arrays(w, weight, candidate_scale, candidate_zero, scale, zero, best)
    over_rows(_keep_best, len(w), *given, np.float32(top))


def arrays(*tensors):
    """Contiguous tensors as numpy arrays of the same memory."""
    assert all(tensor.is_contiguous() for tensor in tensors)
    return [tensor.numpy() for tensor in tensors]


def levels(arithmetic):
    """Kind, largest code, the table, and the nearest code of every half from its first to its last entry."""
    table = np.asarray(arithmetic.table or (0,), np.float32)
    halves = np.arange(2 * table[0], 2 * table[-1] + 1) / 2
    nearest = np.searchsorted((table[1:] + table[:-1]) / 2, halves).astype(np.float32)
    return KINDS[arithmetic.kind], np.float32(arithmetic.top), table, nearest


def _instruction(name):
    """A rounding of floats as an instruction: NumPy's is a call, and a loop with a call in it is not vectorised."""

    def typed(_, x):
        def generate(context, builder, signature, arguments):
            return builder.call(builder.module.declare_intrinsic(name, [arguments[0].type]), arguments)

        return x(x), generate

    return intrinsic(typed)


rint, ceil = _instruction("llvm.rint"), _instruction("llvm.ceil")


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def even_code(w, scale, zero, top):
    """One weight's code on an evenly spaced grid."""
    safe = scale if scale != 0 else np.float32(1)
    return min(max(rint(w / safe + zero), np.float32(0)), top)


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def even_value(code, scale, zero):
    """And back."""
    return scale * (code - zero)


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def nearest_code(w, scale, zero, kind, top, table, nearest):
    """One weight's code on a grid of any kind."""
    if kind == EVEN:
        return even_code(w, scale, zero, top)
    safe = scale if scale != 0 else np.float32(1)
    if kind == RAMP:
        return min(max(rint((w + zero) / safe), np.float32(0)), top)
    half = min(max(ceil(np.float32(2) * (w / safe)), np.float32(2) * table[0]), np.float32(2) * table[-1])
    return nearest[int(half - np.float32(2) * table[0])]


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def value_of(code, scale, zero, kind, table):
    """And back."""
    if kind == EVEN:
        return even_value(code, scale, zero)
    if kind == RAMP:
        return scale * code - zero
    return scale * table[int(code)]


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"})
def _keep_best(first, last, w, weight, scales, zeros, scale, zero, best, top):
    for r in range(first, last):
        for n in range(len(scales)):
            s, z, error = scales[n, r], zeros[n, r], np.float32(0)
            for j in range(w.shape[1]):
                off = even_value(even_code(w[r, j], s, z, top), s, z) - w[r, j]
                error += weight[r, j] * off * off
            if error < best[r]:
                scale[r], zero[r], best[r] = s, z, error
