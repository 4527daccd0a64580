"""What each phase of the walk has to do at least, counted: the floors that docs/speed.md derives.

An operation is one addition or multiplication. A product (m, k) (k, n) has 2 m k n of them, a sum of squares of k
columns that is symmetric half as many. What is counted is the method as it stands (two streams, so many rounds of
refinement), each product once; not counted is what a better order of the same sums would avoid.

Legend: O outputs of all linears of a stage, I its inputs, T tokens, t tokens in a row, A width of all query heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from calibration.hessian import few_rows

FIT_OPERATIONS = 11  # a weight and a candidate scale: / + round max min - * - and weight e e, summed


@dataclass(frozen=True)
class Work:
    """What is asked of one block.

    Attributes:
        stages: (O, I) of each stage.
        tokens: T.
        seqlen: t.
        attention: A.
        bits: Of a code.
        trials: Grids tried for each group.
        rounds: Of refinement.
        corrected: A second stream, and targets corrected by it.
    """

    stages: Sequence[tuple[int, int]]
    tokens: int
    seqlen: int
    attention: int
    bits: int
    trials: int
    rounds: int
    corrected: bool

    @property
    def weights(self) -> int:
        """In all linears."""
        return sum(O * I for O, I in self.stages)


def operations(work: Work) -> dict[str, int]:
    """Operations of each phase in one block."""
    T, streams = work.tokens, 1 + work.corrected
    squares, cross, to_form = 0, 0, 0
    for O, I in work.stages:
        few = few_rows(O, I)  # W (G - H) summed, not G
        squares += O * I * I
        cross += 4 * T * O * I if few else 2 * T * I * I
        to_form += 0 if few else 2 * O * I * I
    return {
        "forward": streams * (2 * T * work.weights + 2 * T * work.seqlen * work.attention),
        "hessian": sum(T * I * (I + 1) for _, I in work.stages) + work.corrected * cross,
        "factor": sum(I**3 // 3 for _, I in work.stages),
        "target": work.corrected * (2 * squares + to_form),
        "baseline": 2 * squares,
        "scales": FIT_OPERATIONS * work.trials * work.weights,
        "columns": squares - work.weights,
        "refine": 2 * work.rounds * squares,
    }


def memory_bytes(work: Work) -> dict[str, int]:
    """Bytes moved in memory by phases that only move: a code is read as a byte and written as its bits."""
    return {"pack": work.weights + work.weights * work.bits // 8}


def disk_bytes(work: Work, block_bytes: int, outside_bytes: int) -> dict[str, dict[str, int]]:
    """Bytes read and written of one block, and once: {"block": {phase: bytes}, "once": {phase: bytes}}.

    A finished block is kept in the work folder and then written into the artefact; what lies outside blocks is copied.

    Args:
        work: The work on a block.
        block_bytes: Of a block in the source.
        outside_bytes: Of the rest in the source.
    """
    packed = work.weights * work.bits // 8
    return {"block": {"load": block_bytes, "write": 2 * packed}, "once": {"write": outside_bytes}}
