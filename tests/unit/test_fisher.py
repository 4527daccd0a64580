"""Second moments of output gradients against autograd of the whole model in one piece."""

from dataclasses import replace

import pytest
import torch
from test_columns import one_thread  # noqa: F401
from transformers import AutoModelForCausalLM

import calibration.hessian
import ptq.tuning.fisher
from calibration.errors import InputError
from calibration.processor import has_bf16_units
from ptq.checkpoint import open_checkpoint
from ptq.clock import Clock
from ptq.export.gptq_tensors import GptqCodec
from ptq.quantizers import chunks
from ptq.spec import QuantSpec
from ptq.streamed import StreamedModel
from ptq.tuning.fisher import FisherPass, flip_signs, token_weights
from ptq.walk import Walk
from ptq.workdir import WorkFolder

TOKENS = torch.arange(4 * 20).reshape(4, 20) * 7 % 290
SPEC = QuantSpec(bits=2, group_size=32, fisher_tokens=60, refine_rounds=2)  # the first three rows
HEAD_TOKENS = 8  # of a row's twenty


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(StreamedModel, "batch_tokens", 40)  # one row of 20 tokens on the way back
    monkeypatch.setattr(ptq.tuning.fisher, "HEAD_TOKENS", HEAD_TOKENS)
    monkeypatch.setattr(chunks, "COUPLED_ROWS", 96)
    monkeypatch.setattr(calibration.hessian, "TILE", 40)  # three of a run's rows
    monkeypatch.setattr(ptq.tuning.fisher, "TILE", 24)


class Measured:
    """A pass into a work folder."""

    def __init__(self, folder, out, spec=SPEC, *, resume=False, budget=None):
        self.model, self.spec = StreamedModel(open_checkpoint(folder)), spec
        self.work = WorkFolder(out, {"spec": spec.as_dict()}, resume=resume)
        self.fisher = FisherPass(self.model, spec, self.work, Clock(), budget=budget, bf16=False)

    def walk(self):
        codec = GptqCodec(self.spec.bits, self.spec.group_size, self.spec.checkpoint_format)
        Walk(self.model, self.spec, codec, self.work, Clock()).run(TOKENS)
        return [self.work.load_block(i) for i in range(len(self.model.blocks))]


def whole_model(folder, measured, draws=1):
    """Gradients (T, O) by linear, draw after draw: autograd of the dense model, the same draws in its logits."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator, found = torch.Generator().manual_seed(SPEC.seed), {}
    for row in TOKENS[:3] if draws == 1 else TOKENS.repeat(draws, 1):
        outputs = {}
        hooks = [
            module.register_forward_hook(lambda m, a, out, name=name: outputs.update({name: out}))  # noqa: B023
            for name, module in model.named_modules()
        ]
        logits = model(row[None], use_cache=False).logits[0]
        p = logits.detach().softmax(-1)
        root = torch.cat([signs(some.shape, generator) for some in p.split(HEAD_TOKENS)]) * p.sqrt()
        names = [
            f"{measured.model.block_name(i)}.{name}"
            for i in range(len(measured.model.blocks))
            for name in measured.model.family.linears
        ]
        drawn = root - p * root.sum(-1, keepdim=True)
        for name, g in zip(names, torch.autograd.grad(logits, [outputs[n] for n in names], drawn), strict=True):
            found.setdefault(name, []).append(g.flatten(0, -2))
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def signs(shape, generator):
    """A bit for each: a row's words give their highest bits to its first columns, then the next ones."""
    words = torch.empty(shape[0], -(-shape[1] // 32), dtype=torch.int32).random_(-(2**31), 2**31, generator=generator)
    column = torch.arange(shape[1])
    return 1 - 2.0 * ((words[:, column % words.shape[1]] >> (31 - column // words.shape[1])) & 1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "phi3"])
@pytest.mark.parametrize("budget", [None, 0])
def test_gradients_are_the_whole_models(tiny, tmp_path, family, budget):
    folder = tiny(family)
    measured = Measured(folder, tmp_path / "out", budget=budget)
    measured.fisher.run(TOKENS)
    expected = whole_model(folder, measured)
    for i in range(len(measured.model.blocks)):
        for s, stage in enumerate(measured.model.family.stages):
            g = torch.cat([expected[f"{measured.model.block_name(i)}.{name}"] for name in stage], 1).double()
            runs, weight = measured.work.fisher(i, s), measured.work.token_weights(i, s)
            assert sum(map(len, runs)) == g.shape[1] and (len(runs) > 1) == (g.shape[1] > 96)
            start = 0
            for HO in runs:
                own = g[:, start : (start := start + len(HO))]
                wanted = own.T @ own
                # gradients agree to fp32 sums along the model, 1e-5 of the largest; products of two to twice that
                torch.testing.assert_close(HO.double(), wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
            torch.testing.assert_close(weight, token_weights(g.square().sum(1).float()), rtol=1e-3, atol=1e-4)
    measured.work.close()


@pytest.mark.skipif(not has_bf16_units(), reason="this processor has no instructions for bf16")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_in_bf16_it_is_nearly_the_same(tiny, tmp_path, family):
    """Some thirty roundings of 2^-9 lie between token and gradient, 1 % where they add up at random; squared, 2 %."""
    found = []
    for bf16 in (False, True):
        measured = Measured(tiny(family), tmp_path / str(bf16))
        measured.fisher.bf16 = bf16
        measured.fisher.run(TOKENS)
        found.append(measured.work.fisher(0, 0)[0])
        measured.work.close()
    off = float((found[1] - found[0]).norm() / found[0].norm())
    assert 0 < off < 0.04  # twice that


def test_fewer_tokens_are_drawn_several_times(tiny, tmp_path):
    spec = replace(SPEC, fisher_tokens=2 * TOKENS.numel() + 1)
    measured = Measured(tiny("llama"), tmp_path / "out", spec)
    measured.fisher.run(TOKENS)
    g = whole_model(tiny("llama"), measured, draws=2)["model.layers.0.self_attn.o_proj"].double()
    (HO,), weight = measured.work.fisher(0, 1), measured.work.token_weights(0, 1)
    torch.testing.assert_close(HO.double(), g.T @ g, rtol=0, atol=1e-4 * float((g.T @ g).abs().max()))
    squares = g.square().sum(1).float().view(2, -1).sum(0)
    torch.testing.assert_close(weight, token_weights(squares), rtol=1e-3, atol=1e-4)


def test_the_covariance_of_a_draw():
    """sqrt(p) z - p (sqrt(p) . z) has the covariance diag(p) - p p^T: exactly, by its linear map."""
    p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    A = torch.diag(p.sqrt()) - torch.outer(p, p.sqrt())
    torch.testing.assert_close(A @ A.T, torch.diag(p) - torch.outer(p, p))


def test_signs_are_even_and_independent():
    """Sums of n products of two signs have the deviation sqrt(n): none of 100 x 100 is six of them away."""
    z = torch.ones(4096, 100)
    flip_signs(z, torch.Generator().manual_seed(0))
    assert torch.equal(z.abs(), torch.ones_like(z)) and float(z.sum(0).abs().max()) < 6 * 64
    assert float((z.T @ z - 4096 * torch.eye(100)).abs().max()) < 6 * 64


def test_token_weights():
    squares = torch.tensor([1.0, 4.0] * 100 + [1e9])
    weights = token_weights(squares)
    assert float(weights.mean()) == pytest.approx(1) and weights[1] == pytest.approx(2 * float(weights[0]))
    assert weights[-1] == weights[1], "an outlier counts as the 99th percentile"
    assert torch.equal(token_weights(torch.zeros(3)), torch.ones(3))


def test_an_earlier_pass_counts_and_a_walk_goes_on_to_the_same_bytes(tiny, tmp_path, monkeypatch):
    whole = Measured(tiny("llama"), tmp_path / "whole")
    whole.fisher.run(TOKENS)
    expected = whole.walk()
    plain = Measured(tiny("llama"), tmp_path / "plain", replace(SPEC, fisher_tokens=0)).walk()
    assert any(not torch.equal(plain[0][name], tensor) for name, tensor in expected[0].items())

    killed = Measured(tiny("llama"), tmp_path / "killed")
    saved = killed.work.save_fisher

    def save_one(i, *parts):
        saved(i, *parts)
        raise KeyboardInterrupt

    monkeypatch.setattr(killed.work, "save_fisher", save_one)
    with pytest.raises(KeyboardInterrupt):
        killed.fisher.run(TOKENS)
    killed.work.close()
    resumed = Measured(tiny("llama"), tmp_path / "killed", resume=True)
    resumed.fisher.run(TOKENS)
    monkeypatch.setattr(FisherPass, "_measure", lambda *_, **__: pytest.fail("measured twice"))
    resumed.fisher.run(TOKENS)
    for ours, theirs in zip(resumed.walk(), expected, strict=True):
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_gradients_that_are_not_finite_are_refused(tiny, tmp_path, monkeypatch):
    measured = Measured(tiny("llama"), tmp_path / "out")
    monkeypatch.setattr(measured.fisher, "_head", lambda hidden, generator: torch.full_like(hidden, torch.inf))
    with pytest.raises(InputError, match="the gradients in model.layers.1 are not finite .* --fisher-tokens 0"):
        measured.fisher.run(TOKENS)
    assert not measured.work.has_fisher(1)


def test_no_tokens_no_pass(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(FisherPass, "_measure", lambda *_, **__: pytest.fail("measured"))
    Measured(tiny("llama"), tmp_path / "out", replace(SPEC, fisher_tokens=0)).fisher.run(TOKENS)
