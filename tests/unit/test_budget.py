"""The memory plan against sums done by hand, and what it refuses."""

from dataclasses import replace

import pytest
import torch
from tiny_models import make_tiny

from calibration.errors import InputError
from ptq import budget
from ptq.budget import MemoryPlan, plan_memory
from ptq.checkpoint import open_checkpoint
from ptq.quantizers import gptq
from ptq.quantizers.chunks import CHUNK
from ptq.spec import QuantSpec
from ptq.streamed import StreamedModel

DRAWN = object()  # some text; the plan asks no more of it
GPTQ = QuantSpec(bits=4, group_size=32, fisher_tokens=0)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setattr(budget, "threads_of", lambda device: 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return StreamedModel(open_checkpoint(make_tiny("llama", tmp_path_factory.mktemp("tiny") / "model")))


@pytest.fixture(autouse=True)
def any_matrix_is_large(monkeypatch):
    monkeypatch.setattr(gptq, "LARGE", 0)


def plan(model, limit, spec=GPTQ, drawn=DRAWN, resident=10**8, measures=False):
    return plan_memory(limit, resident, model, spec, drawn, measures=measures)


def needed(model, *, on_disk):
    """For the tiny Llama, D = 64 and 128 in the middle: the widest stage is the last, 128 inputs and 64 outputs."""
    some_rows = 12 * 4 * CHUNK // (2 if on_disk else 1)
    solve = 4 * 64 * 128 + 4 * (2 if on_disk else 3) * 128**2 + 6 * 64 * 128 + some_rows
    return 10**8 + budget.LATER + solve


def test_sums_in_memory_sums_on_disk_refused(model):
    assert plan(model, 10**9) == MemoryPlan(10**9 - needed(model, on_disk=False), False)
    assert plan(model, needed(model, on_disk=False)) == MemoryPlan(0, False)
    saved = needed(model, on_disk=False) - needed(model, on_disk=True)
    assert plan(model, needed(model, on_disk=False) - 1) == MemoryPlan(saved - 1, True)
    assert plan(model, needed(model, on_disk=True)) == MemoryPlan(0, True)
    with pytest.raises(InputError, match=r"^max_memory 0.00 GB is too little for this model: it takes 0.35 GB$"):
        plan(model, 10**6)


def test_perplexity_and_rounding_have_phases_of_their_own(model, monkeypatch):
    monkeypatch.setattr(budget, "LOGIT_ENTRIES", 1 << 24)  # more than the tiny model's solves take
    logits = 3 * 4 * budget.LOGIT_ENTRIES
    outside = 10**8 + budget.LATER + 4 * 300 * 64
    assert plan(model, 10**9, measures=True).activations == 10**9 - outside - logits
    assert plan(model, 10**9, QuantSpec(method="rtn", bits=4, group_size=32), None).activations == 10**9 - outside


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(),
        QuantSpec(method="omniquant", bits=4),
        *(replace(GPTQ, **{epochs: 1}) for epochs in ("tune_epochs", "reconstruct_epochs")),
    ],
)
def test_training_is_not_planned(model, spec):
    with pytest.raises(InputError, match="--fisher-tokens 0 .* --activation-memory bounds activations"):
        plan(model, 10**12, spec)


def test_a_gpu_is_not_planned(tmp_path, model, monkeypatch):
    monkeypatch.setattr(model, "device", torch.device("cuda"))
    with pytest.raises(InputError, match="on a CPU"):
        plan(model, 10**12)
