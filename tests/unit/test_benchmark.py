"""Counts of operations against counting loops; extrapolation and floors by hand; models that are cut off."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from ptq.benchmark.models import blocks_of, shape_blocks, write_first_blocks
from ptq.benchmark.operations import FIT_OPERATIONS, Work, disk_bytes, memory_bytes, operations
from ptq.benchmark.run import Phase, Run, _growth, work_of
from ptq.benchmark.shapes import SHAPES
from ptq.checkpoint import open_checkpoint
from ptq.spec import QuantSpec
from ptq.streamed import StreamedModel

WORK = Work([(6, 4), (4, 8)], tokens=10, seqlen=5, attention=4, bits=2, trials=83, rounds=8, corrected=True)
PLAIN = replace(WORK, corrected=False, rounds=0)


def product(m, k, n):
    """Additions and multiplications of a product by the textbook loop."""
    return sum(2 for _ in range(m) for _ in range(n) for _ in range(k))


def triangle(I):
    """Pairs i <= j."""
    return [(i, j) for i in range(I) for j in range(i, I)]


def test_forward():
    linears = sum(product(10, I, O) for O, I in WORK.stages)
    # Two rows of five tokens; a token looks at half its row on average: scores and values, A wide.
    attention = 2 * (product(5, 4, 5) + product(5, 5, 4)) // 2
    assert operations(PLAIN)["forward"] == linears + attention
    assert operations(WORK)["forward"] == 2 * (linears + attention)


def test_hessian():
    half = sum(2 * 10 for _, I in WORK.stages for _ in triangle(I))
    assert operations(PLAIN)["hessian"] == half
    assert operations(WORK)["hessian"] == half + sum(product(I, 10, I) for _, I in WORK.stages)
    few = replace(WORK, stages=[(3, 8)])  # W (G - H): differences through W, and the result with the inputs
    half = sum(2 * 10 for _ in triangle(8))
    assert operations(few)["hessian"] == half + product(10, 8, 3) + product(3, 10, 8)
    assert operations(few)["target"] == 2 * 3 * 8 * 8  # two triangular solves


def test_factor():
    """Cholesky: a product and a subtraction for each k < i <= j, and squares of I besides."""
    for I in (8, 64):
        loops = sum(2 * i for i, _ in triangle(I))
        assert abs(operations(replace(WORK, stages=[(1, I)]))["factor"] - loops) <= I * I


def test_solve():
    counts = operations(WORK)
    pairs = {I: 2 * sum(1 for i, j in triangle(I) if i < j) for _, I in WORK.stages}  # a triangle without its diagonal
    assert counts["columns"] == sum(O * pairs[I] for O, I in WORK.stages)
    assert counts["refine"] == 8 * sum(product(I, I, O) for O, I in WORK.stages)
    solves = sum(2 * O * (pairs[I] + I) for O, I in WORK.stages)  # two triangles, a division a number
    assert counts["target"] == sum(product(O, I, I) for O, I in WORK.stages) + solves
    halves = sum(O * (pairs[I] + I) for O, I in WORK.stages)
    assert counts["baseline"] == 2 * halves
    assert counts["scales"] == FIT_OPERATIONS * 83 * (24 + 32)
    assert operations(PLAIN)["target"] == operations(PLAIN)["refine"] == 0


def test_bytes():
    assert memory_bytes(WORK) == {"pack": 56 + 14}
    assert disk_bytes(WORK, 112, 1000) == {"block": {"load": 112, "write": 28}, "once": {"write": 1000}}


def test_phases_add_up():
    a, b = Phase("forward", 3.0, 4.0, 4.0, 2.0, 40.0), Phase("solve", 1.0, 1.0, 1.0, None, 10.0)
    total = Run([a, b], 0).sum(["forward", "solve", "hessian"])
    assert (total.seconds, total.processor, total.spent, total.floor, total.whole) == (4, 5, 5, 2, 50)
    assert a.ratio == 2 and b.ratio is None and total.ratio == 2.5


def test_growth(tiny):
    model = StreamedModel(open_checkpoint(tiny("llama")))
    blocks, whole = len(model.blocks), 10 * len(model.blocks)
    growth = _growth(model, work_of(model, QuantSpec(), 2, 8), whole)
    assert growth("embed") == growth("start") == 1 and growth("forward") == growth("refine") == 10
    assert 1 < growth("write") < 10 and blocks < whole


def test_work_of_a_model(tiny):
    model = StreamedModel(open_checkpoint(tiny("llama")))
    work = work_of(model, QuantSpec(bits=2), 3, 8)
    expected = {name: model.weight(0, name).shape for name in model.family.linears}
    assert work.weights == sum(shape.numel() for shape in expected.values())
    assert work.stages[0][1] == expected["self_attn.q_proj"][1] and len(work.stages) == 4
    assert (work.tokens, work.seqlen, work.attention) == (24, 8, expected["self_attn.o_proj"][1])
    assert work.trials == 1 + 2 * 40 + 2 and work.rounds == 8 and work.corrected


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3"])
def test_a_model_is_cut_off_after_its_first_blocks(model_type, tiny, tmp_path):
    source = open_checkpoint(tiny(model_type))
    assert blocks_of(source) > 1
    cut = write_first_blocks(source, tmp_path / "cut", 1)
    assert blocks_of(cut) == 1 and len(StreamedModel(cut).blocks) == 1
    before = {name: tensor for file in source.shards for name, tensor in load_file(file).items()}
    assert len(cut.names()) < len(before)
    for name, tensor in cut.read(cut.names()).items():
        assert torch.equal(tensor, before[name])


def test_every_shape_says_how_deep_it_is():
    assert {shape: shape_blocks(shape) for shape in SHAPES} == {
        "tinyllama-1.1b": 22, "llama-2-7b": 32, "llama-3.2-3b": 28, "starcoderbase-3b": 36,
    }  # fmt: skip
