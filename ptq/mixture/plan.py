"""A type for each tensor within a number of bytes: the least sum of measured divergences, found exactly."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from calibration.errors import InputError
from ptq.mixture.knapsack import choose

STEPS = (0.8, 0.9, 1.0, 1.1, 1.25, 1.5)  # of the target, the budgets of the table


@dataclass(frozen=True)
class Sizes:
    """What a file's bytes are made of.

    Attributes:
        of: Bytes of each tensor that a type is chosen for, type by type.
        fixed: Bytes of the tensors that have theirs, and where the whole file counts, of all that is no tensor.
        weights: Weights of the model.
    """

    of: Mapping[str, Mapping[str, int]]
    fixed: int
    weights: int

    @property
    def reach(self) -> tuple[int, int]:
        """The least and the most bytes that a choice can have."""
        return tuple(self.fixed + sum(end(of.values()) for of in self.of.values()) for end in (min, max))

    def total(self, types: Mapping[str, str]) -> int:
        """Bytes of a choice."""
        return self.fixed + sum(of[types[name]] for name, of in self.of.items())

    def bits(self, total: int) -> float:
        """Bytes as bits a weight."""
        return 8 * total / self.weights


@dataclass(frozen=True)
class Row:
    """A line of the table: the best choice within a budget.

    Attributes:
        budget: Bytes allowed.
        size: Bytes taken.
        bits: The same as bits a weight.
        kl: Predicted divergence in nats a token.
    """

    budget: int
    size: int
    bits: float
    kl: float

    def as_dict(self) -> dict:
        """Plain values, for JSON."""
        return asdict(self)


def best_types(sizes: Sizes, costs: Mapping[str, Mapping[str, float]], budget: int) -> dict[str, str]:
    """The type of each tensor with the least total cost whose bytes are at most the budget.

    Args:
        sizes: Of the file.
        costs: Divergence of each type of each tensor.
        budget: Bytes, at least the least reach.
    """
    kinds = [list(of) for of in sizes.of.values()]
    of_sizes = [list(of.values()) for of in sizes.of.values()]
    of_costs = [[costs[name][kind] for kind in of] for name, of in sizes.of.items()]
    picks = choose(of_sizes, of_costs, budget - sizes.fixed)
    assert picks is not None, "budgets below the least reach are refused before anything is measured"
    return {name: kinds[k][pick] for k, (name, pick) in enumerate(zip(sizes.of, picks, strict=True))}


def pareto_table(sizes: Sizes, costs: Mapping[str, Mapping[str, float]], budget: int) -> list[Row]:
    """The best choices at budgets around one, and at both ends."""
    least, most = sizes.reach
    rows = []
    for limit in sorted({least, most, *(int(step * budget) for step in STEPS if least < step * budget < most)}):
        types = best_types(sizes, costs, limit)
        size = sizes.total(types)
        rows.append(Row(limit, size, sizes.bits(size), sum(costs[name][kind] for name, kind in types.items())))
    return rows


def check_reach(sizes: Sizes, budget: int, asked: str, describe):
    """Refuses a budget that no choice fits, or that all choices fall short of.

    Args:
        sizes: Of the file.
        budget: Bytes.
        asked: The flag and what the user wrote.
        describe: Bytes in the user's words.

    Raises:
        InputError: Naming what can be reached.
    """
    least, most = sizes.reach
    if not least <= budget <= 1.01 * most:
        raise InputError(f"{asked} cannot be met: this model can have {describe(least)} to {describe(most)}")
