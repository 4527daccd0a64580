"""The memory plan against sums done by hand, and what it refuses."""

from dataclasses import replace

import pytest
import torch
from tiny_models import make_tiny

from calibration.errors import InputError
from ptq import budget
from ptq.budget import MemoryPlan, plan_memory
from ptq.checkpoint import open_checkpoint
from ptq.evaluation import stream
from ptq.quantizers import chunks, gptq
from ptq.quantizers.chunks import CHUNK
from ptq.spec import QuantSpec
from ptq.streamed import StreamedModel

TOKENS = torch.zeros(4, 20, dtype=torch.long)
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


def plan(model, limit, spec=GPTQ, tokens=TOKENS, resident=10**8, windows=None):
    return plan_memory(limit, resident, model, spec, tokens, windows)


def needed(model, *, on_disk):
    """For the tiny Llama, D = 64 and 128 in the middle: the widest stage is the last, 128 inputs and 64 outputs."""
    some_rows = 12 * 4 * CHUNK // (2 if on_disk else 1)
    solve = 4 * 64 * 128 + 4 * (2 if on_disk else 3) * 128**2 + 6 * 64 * 128 + some_rows
    return 10**8 + budget.LATER + solve


def test_sums_in_memory_sums_on_disk_refused(model):
    in_memory, on_disk = needed(model, on_disk=False), needed(model, on_disk=True)
    whole = 10**9 - (700 << 20)
    assert plan(model, 10**9) == MemoryPlan(10**9 - in_memory, False, limited=True, whole=whole)
    assert plan(model, in_memory) == MemoryPlan(0, False, limited=True, whole=0)
    assert plan(model, in_memory - 1) == MemoryPlan(in_memory - on_disk - 1, True, limited=True, whole=0)
    assert plan(model, on_disk) == MemoryPlan(0, True, limited=True, whole=0)
    with pytest.raises(InputError, match=r"^max_memory 0.00 GB is too little for this model: it takes 0.30 GB$"):
        plan(model, 10**6)


def test_perplexity_and_rounding_have_phases_of_their_own(model, monkeypatch):
    monkeypatch.setattr(stream, "LOGIT_ENTRIES", 1 << 24)  # more than the tiny model's solves take
    logits = 3 * 4 * stream.LOGIT_ENTRIES
    outside = 10**8 + budget.LATER + 4 * 300 * 64
    assert plan(model, 10**9, windows=TOKENS).activations == 10**9 - outside - logits
    assert plan(model, 10**9, QuantSpec(method="rtn", bits=4, group_size=32), None).activations == 10**9 - outside


WEIGHTS = (64 + 32 + 32) * 64 + 64 * 64 + 2 * 128 * 64 + 64 * 128  # of a block of the tiny Llama


def test_perplexity_holds_a_block_and_a_batch_of_long_windows(model):
    rtn, windows = QuantSpec(method="rtn", bits=4, group_size=32), torch.zeros(1, 1 << 17)
    block = 4 * WEIGHTS + 5 * 4 * (1 << 17) * 128
    assert plan(model, 10**9, rtn, None, windows=windows).activations == 10**9 - 10**8 - budget.LATER - block


def test_attention_that_is_not_fused_holds_its_scores(model, monkeypatch):
    monkeypatch.setattr(model.config, "_attn_implementation", "eager")
    rtn, windows = QuantSpec(method="rtn", bits=4, group_size=32), torch.zeros(1, 2048)
    block = 4 * WEIGHTS + 4 * 2048 * (5 * 128 + 3 * 4 * 2048)  # of four heads
    assert plan(model, 10**9, rtn, None, windows=windows).activations == 10**9 - 10**8 - budget.LATER - block


def test_gradients_have_a_phase_of_their_own(model):
    spec, long = replace(GPTQ, fisher_tokens=8), torch.zeros(1, 1 << 16)
    kept = 12 * 64 + 3 * (128 + 64 + 256 + 64)
    outputs = 8 * (128**2 + 64**2 + 256 * (256 + 128) // 2 + 64**2)
    gradients = 10**8 + budget.EARLY + 4 * WEIGHTS + 4 * (1 << 16) * kept + outputs
    assert plan(model, gradients, spec, long).activations == 0
    with pytest.raises(InputError, match=rf"takes {gradients / 1e9:.2f} GB, with --fisher-tokens 0 0.4\d GB$"):
        plan(model, gradients - 1, spec, long)


def test_the_head_has_logits_in_several_forms(model, monkeypatch):
    monkeypatch.setattr(model.config, "vocab_size", 1 << 18)  # 16 tokens at once
    head = 4 * (1 << 18) * 64 + 4 * 4 * (1 << 22) + 2 * 4 * 1024 * 64
    assert plan(model, 10**9, QuantSpec(bits=4, group_size=32)).activations == 10**9 - 10**8 - budget.EARLY - head


def test_outputs_solved_together_hold_their_weights(model, monkeypatch):
    """The widest stage, gate and up: 64 inputs, 256 outputs, in runs of 128."""
    monkeypatch.setattr(chunks, "COUPLED_ROWS", 128)
    monkeypatch.setattr(StreamedModel, "batch_tokens", 1)
    monkeypatch.setattr(budget, "EARLY", 0)
    monkeypatch.setattr(stream, "LOGIT_ENTRIES", 1)
    together = 2 * 128**2 + 5 * 128**2
    solve = 4 * 64 * 256 + 4 * (3 * 64**2 + 256 * 64 // 2 + together) + 8 * 4 * 128 * 64
    assert plan(model, 10**9, replace(GPTQ, fisher_tokens=8)).activations == 10**9 - 10**8 - budget.LATER - solve


def test_a_block_that_is_tuned_holds_gradients_beside_the_head(model):
    """Of the largest linear, 64 x 128 weights, there are leaf, gradients before and after, two moments, values."""
    spec, long = replace(GPTQ, tune_epochs=1), torch.zeros(1, 1 << 16)
    kept = 4 * (1 << 16) * (12 * 64 + 3 * (128 + 64 + 256 + 64))
    tuning = 10**8 + budget.LATER + 4 * 300 * 64 + 9 * WEIGHTS + 6 * 4 * 64 * 128 + kept
    assert plan(model, tuning, spec, long).activations == 0
    with pytest.raises(InputError, match=rf"takes {tuning / 1e9:.2f} GB, with --effort fast 0.4\d GB$"):
        plan(model, tuning - 1, spec, long)


def test_a_head_that_tunes_has_logits_of_two_models(model, monkeypatch):
    monkeypatch.setattr(model.config, "vocab_size", 1 << 18)
    head = 4 * (1 << 18) * 64 + 8 * 4 * stream.LOGIT_ENTRIES
    assert plan(model, 10**9, replace(GPTQ, tune_epochs=1)).activations == 10**9 - 10**8 - budget.LATER - head


@pytest.mark.parametrize("spec", [QuantSpec(method="omniquant", bits=4), replace(GPTQ, reconstruct_epochs=1)])
def test_training_of_blocks_is_not_planned(model, spec):
    with pytest.raises(InputError, match="blocks is not planned for; --activation-memory bounds activations"):
        plan(model, 10**12, spec)


def test_a_gpu_is_not_planned(tmp_path, model, monkeypatch):
    monkeypatch.setattr(model, "device", torch.device("cuda"))
    with pytest.raises(InputError, match="on a CPU"):
        plan(model, 10**12)
