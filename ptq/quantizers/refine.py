"""Refinement of a rounded matrix under tr(D H D^T), D = Q - W: scales by least squares, codes by coordinate descent.

The two steps alternate. Neither can raise the loss beyond fp16 rounding of the scales, which is checked per row.
Scales: one row's scales are the solution of (V_g^T H V_h) s = V_g^T H w with V_g = code - zero on group g's columns
(all groups jointly; "two-stage" grids, arXiv 2602.02126, take them one by one). Codes: column j's best real value is
q_j - (D H)_j / H_jj; round it on the grid and update D H (QuantEase, arXiv 2309.01885).

Legend: O outputs, I inputs, G groups; matrices are transposed, (I, O) and (G, O). Columns of a group are adjacent.
"""

import torch

from ptq.grids.affine import half_exact

CHUNK = 1 << 22  # entries of the per-row normal matrices that are held at once, in fp64


def refit_scales(Wt, H, codes, scale, zero, group_size, *, HW=None):
    """Joint least-squares scales with codes fixed.

    Args:
        Wt: (I, O) target.
        H: (I, I) damped.
        codes: (I, O).
        scale: (G, O), overwritten in the rows that gain.
        zero: (G, O).
        group_size: Columns per group; the last group may be shorter.
        HW: (I, O) H @ Wt, if it is known.
    """
    I, O = Wt.shape
    G = scale.shape[0]
    V = codes - spread(zero, group_size, I)
    b = _group_sums(V * (H @ Wt if HW is None else HW), group_size)
    A = torch.empty(G, G, O, device=Wt.device)
    for g in range(G):
        columns = slice(g * group_size, min((g + 1) * group_size, I))
        A[g] = _group_sums(V * (H[:, columns] @ V[columns]), group_size)
    step = max(1, CHUNK // (G * G))
    for r in range(0, O, step):
        rows = slice(r, r + step)
        scale[:, rows] = _solve(A[:, :, rows].permute(2, 0, 1).double(), b[:, rows].T.double(), scale[:, rows].T).T


def _solve(A, b, old):
    """Rows of scales (R, G): the least-squares ones where they beat the old ones after rounding to fp16."""
    diagonal = A.diagonal(dim1=1, dim2=2)
    used = diagonal > 0
    diagonal.copy_(torch.where(used, diagonal * (1 + 1e-9), torch.ones_like(diagonal)))
    old = old.double()
    target = torch.where(used, b, old)  # a group whose codes all sit on the zero point keeps its scale
    new, _ = torch.linalg.solve_ex(A, target)
    new = half_exact(torch.where(used, new, old).float()).double()

    def loss(s):
        return (torch.einsum("rgh,rg,rh->r", A, s, s)) - 2 * (b * s).sum(1)

    usable = torch.isfinite(new).all(1) & (new != 0).all(1)
    return torch.where((usable & (loss(new) < loss(old)))[:, None], new, old).float()


def sweep_codes(Wt, H, codes, scale, zero, grid, group_size, *, order, column_block=128):
    """One pass of coordinate descent over all codes, in place.

    Args:
        Wt: (I, O) target.
        H: (I, I) damped.
        codes: (I, O), overwritten.
        scale: (G, O).
        zero: (G, O).
        grid: Gives encode and decode.
        group_size: Columns per group.
        order: (I,) the order in which columns are visited.
        column_block: Columns handled between two large matrix products.

    Returns:
        D H (I, O) after the pass, and the values Q (I, O).
    """
    I = Wt.shape[0]
    Q = grid.decode(codes, spread(scale, group_size, I), spread(zero, group_size, I))
    R = H @ (Q - Wt)
    for columns in order.split(column_block):
        rows = H.index_select(0, columns)
        inner = rows.index_select(1, columns)
        gradient, change = R.index_select(0, columns), torch.empty(len(columns), Wt.shape[1], device=Wt.device)
        diagonal = inner.diagonal().tolist()
        for i, j in enumerate(columns.tolist()):
            g = j // group_size
            best = Q[j].add(gradient[i], alpha=-1 / diagonal[i])
            codes[j] = grid.encode(best, scale[g], zero[g])
            value = grid.decode(codes[j], scale[g], zero[g])
            torch.sub(value, Q[j], out=change[i])
            Q[j] = value
            gradient[i + 1 :].addr_(inner[i + 1 :, i], change[i])
        R.addmm_(rows.T, change)
    return R, Q


def refine(Wt, H, codes, scale, zero, grid, group_size, *, rounds, generator, column_block=128):
    """Alternates refit_scales and sweep_codes, in place, ending with a refit.

    Args:
        Wt: (I, O) target.
        H: (I, I) damped.
        codes: (I, O), overwritten.
        scale: (G, O), overwritten.
        zero: (G, O).
        grid: Gives encode and decode.
        group_size: Columns per group.
        rounds: How many times.
        generator: Draws the column orders.
        column_block: Columns handled between two large matrix products.
    """
    HW = H @ Wt if rounds else None
    for _ in range(rounds):
        refit_scales(Wt, H, codes, scale, zero, group_size, HW=HW)
        order = torch.randperm(Wt.shape[0], generator=generator).to(Wt.device)
        sweep_codes(Wt, H, codes, scale, zero, grid, group_size, order=order, column_block=column_block)
    if rounds:
        refit_scales(Wt, H, codes, scale, zero, group_size, HW=HW)


def spread(per_group, group_size, columns):
    """(G, O) to (I, O): each column's own value."""
    return per_group.repeat_interleave(group_size, 0)[:columns]


def _group_sums(x, group_size):
    """(I, O) to (G, O), in a fixed order of summation (index_add_ on a GPU has none)."""
    I, O = x.shape
    whole = I // group_size
    sums = x[: whole * group_size].view(whole, group_size, O).sum(1)
    return sums if whole * group_size == I else torch.cat([sums, x[whole * group_size :].sum(0, keepdim=True)])
