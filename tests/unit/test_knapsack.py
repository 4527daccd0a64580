"""The multiple-choice knapsack against trying everything."""

import itertools

import numpy as np
import pytest

from ptq.mixture.knapsack import choose


def brute_force(sizes, costs, limit):
    """The least cost of any choice that fits."""
    choices = itertools.product(*(range(len(s)) for s in sizes))
    fitting = (c for c in choices if sum(s[k] for s, k in zip(sizes, c, strict=True)) <= limit)
    return min((sum(x[k] for x, k in zip(costs, c, strict=True)) for c in fitting), default=None)


def problem(seed):
    """Random classes; in half of the problems cost falls with size, as it does for types."""
    random = np.random.default_rng(seed)
    counts = random.integers(1, 5, random.integers(1, 7))
    sizes = [random.integers(1, 10 if seed % 3 else 1000, n).tolist() for n in counts]
    costs = [(random.exponential(1, n) * 10.0 ** random.integers(-6, 1)).tolist() for n in counts]
    if seed % 2:
        sizes, costs = [sorted(s) for s in sizes], [sorted(c, reverse=True) for c in costs]
    low, high = (sum(extreme(s) for s in sizes) for extreme in (min, max))
    return sizes, costs, int(random.integers(low - 1, high + 2))


@pytest.mark.parametrize("seed", range(300))
def test_as_good_as_trying_everything(seed):
    sizes, costs, limit = problem(seed)
    best, picks = brute_force(sizes, costs, limit), choose(sizes, costs, limit)
    if best is None:
        assert picks is None
        return
    assert sum(s[k] for s, k in zip(sizes, picks, strict=True)) <= limit
    # The same costs, summed in the same order.
    assert sum(c[k] for c, k in zip(costs, picks, strict=True)) == pytest.approx(best, rel=1e-12)


def test_a_large_model_takes_a_moment():
    """300 tensors of three shapes, ten types: states stay few, and the answer lies within the dual bound's gap."""
    random = np.random.default_rng(0)
    bits = np.array([1.6875, 2.0625, 2.25, 2.625, 3.4375, 4.25, 4.5, 5.5, 6.5625, 8.5])
    weights = random.choice([4096 * 4096, 4096 * 11008, 4096 * 1024], 300)
    sizes = [(n * bits / 8).astype(np.int64).tolist() for n in weights]
    costs = [(scale * 4.0**-bits).tolist() for scale in random.lognormal(0, 1.5, 300)]
    limit = int(weights.sum() * 2.6 / 8)
    picks = choose(sizes, costs, limit)
    assert 0.999 * limit < sum(s[k] for s, k in zip(sizes, picks, strict=True)) <= limit
