"""What a stage's linears get of the sums made for the whole stage."""

from types import SimpleNamespace

import pytest
import torch

from ptq.clock import Clock
from ptq.stages import StageSolver

INPUTS = 8
ROWS = {"a": 2, "b": 1}  # 3 outputs of 8 inputs: W (G - H) is summed


def solver(rows):
    weights = {name: torch.zeros(count, INPUTS) for name, count in rows.items()}
    return StageSolver(SimpleNamespace(weight=lambda i, name: weights[name], device="cpu"), None, None, Clock())


@pytest.mark.parametrize(("names", "expected"), [(["a"], [0, 1]), (["b"], [2]), (["a", "b"], [0, 1, 2])])
def test_few_outputs_have_rows_of_their_own(names, expected):
    sums = torch.arange(3.0)[:, None].expand(3, INPUTS)
    (found,) = solver(ROWS)._cross_moment(0, list(ROWS), names, sums, last=False).items()
    assert found[0] == "WG" and found[1][:, 0].tolist() == expected


@pytest.mark.parametrize("last", [True, False])
def test_many_outputs_share_one_sum_and_the_last_consumes_it(last):
    sums = torch.eye(INPUTS)
    (found,) = solver({"a": 4, "b": 1})._cross_moment(0, ["a", "b"], ["b"], sums, last).items()
    assert found[0] == "G" and torch.equal(found[1], sums) and (found[1] is sums) == last


def test_without_a_second_stream_there_is_none():
    assert solver(ROWS)._cross_moment(0, list(ROWS), ["a"], None, last=True) == {}


@pytest.mark.parametrize(("rows", "shape"), [(ROWS, (3, INPUTS)), ({"a": 4, "b": 1}, (INPUTS, INPUTS))])
def test_what_is_summed_is_what_is_solved_with(rows, shape):
    hessian = solver(rows).hessian(0, list(rows), cross=True)
    hessian.add(torch.ones(5, INPUTS), torch.ones(5, INPUTS))
    H, G = hessian.finalise()
    assert H.shape == (INPUTS, INPUTS) and G.shape == shape
