"""The multiple-choice knapsack, solved exactly: one option of each class, least total cost within a total size.

With a price p on size, every class takes the option of smallest cost + p * size on its own, and

    sum_i min_t (cost + p * size) - p * limit

is a lower bound for any p >= 0 (weak duality). The states of a dynamic programme over the classes are the pairs (size,
cost) that no other pair beats in both (Nemhauser and Ullmann 1969); a state is also dropped when its cost and the bound
of the classes that are left exceed what a feasible choice is known to cost. The price that makes the bound best
leaves few states: sizes of a model's tensors come in a handful of values.
"""

from collections.abc import Sequence

import numpy as np

HALVINGS = 100
SLACK = 1e-9  # of the known cost, by which bounds may be wrong through rounding


def choose(sizes: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], limit: int) -> list[int] | None:
    """The option of each class with the least total cost whose total size is at most `limit`; None if there is none.

    Args:
        sizes: Of each class, of each of its options.
        costs: Of the same, finite.
        limit: What the chosen sizes may sum to.
    """
    sizes = [np.asarray(s, np.int64) for s in sizes]
    costs = [np.asarray(c, np.float64) for c in costs]
    if sum(int(s.min()) for s in sizes) > limit:
        return None
    price, known = _price(sizes, costs, limit)
    return _search(sizes, costs, limit, price, known)


def _at_price(sizes, costs, price):
    """Each class's best option on its own; the smaller one where two are as good."""
    return [int(np.lexsort((s, c + price * s))[0]) for s, c in zip(sizes, costs, strict=True)]


def _total(values, picks):
    return sum(v[k].item() for v, k in zip(values, picks, strict=True))


def _price(sizes, costs, limit):
    """The smallest price found at which the best options fit, and the least cost of a choice seen to fit."""
    if _total(sizes, _at_price(sizes, costs, 0.0)) <= limit:
        return 0.0, _total(costs, _at_price(sizes, costs, 0.0))
    smallest = [int(np.lexsort((c, s))[0]) for s, c in zip(sizes, costs, strict=True)]
    known, low, high = _total(costs, smallest), 0.0, sum(float(np.ptp(c)) for c in costs) + 1e-300
    for _ in range(HALVINGS):
        price = (low + high) / 2
        picks = _at_price(sizes, costs, price)
        if _total(sizes, picks) <= limit:
            high, known = price, min(known, _total(costs, picks))
        else:
            low = price
    return high, known


def _search(sizes, costs, limit, price, known):
    """The dynamic programme; every state remembers its option and the state before it."""
    bounds = [float((c + price * s).min()) for s, c in zip(sizes, costs, strict=True)]
    left_bound, left_size = sum(bounds), sum(int(s.min()) for s in sizes)
    state_size, state_cost, steps = np.zeros(1, np.int64), np.zeros(1), []
    for s, c, bound in zip(sizes, costs, bounds, strict=True):
        left_bound, left_size = left_bound - bound, left_size - int(s.min())
        size, cost = (np.add.outer(*pair).ravel() for pair in ((state_size, s), (state_cost, c)))
        reachable = cost + price * (size - limit) + left_bound <= known + SLACK * abs(known)
        kept = np.flatnonzero(reachable & (size + left_size <= limit))
        kept = kept[np.lexsort((cost[kept], size[kept]))]
        best_before = np.minimum.accumulate(np.concatenate(([np.inf], cost[kept][:-1])))
        kept = kept[cost[kept] < best_before]
        state_size, state_cost = size[kept], cost[kept]
        steps.append(np.divmod(kept, len(s)))
    picks, at = [], int(state_cost.argmin())
    for before, option in reversed(steps):
        picks.append(int(option[at]))
        at = int(before[at])
    return picks[::-1]
