"""Reconstruction of solved blocks: what is trained, that nothing gets worse, and that a resumed run is the same run."""

from dataclasses import replace

import pytest
import torch
from test_columns import one_thread  # noqa: F401

import ptq.blockwise
import ptq.pipeline
import ptq.streams
from calibration.capture import run_block
from calibration.errors import InputError, TrainingStopped
from calibration.tokens import hold_back
from ptq import QuantSpec, quantize
from ptq.checkpoint import open_checkpoint
from ptq.clock import Clock
from ptq.export.gptq_tensors import GptqCodec
from ptq.quantizers.reconstruct.block import reconstruct
from ptq.quantizers.reconstruct.parameters import TrainedCodes, TrainedScales
from ptq.quantizers.rtn import rtn
from ptq.streamed import StreamedModel
from ptq.walk import Walk
from ptq.workdir import WorkFolder

TOKENS = torch.arange(4 * 20).reshape(4, 20) * 7 % 290
SAME = TOKENS[:1].expand(4, -1).contiguous()  # what is held back is what is trained on, so that gains are certain
SPEC = QuantSpec(bits=2, group_size=32, fisher_tokens=0, reconstruct_epochs=4, code_lr=0.05)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(StreamedModel, "batch_tokens", 20)


def random_weight(O=6, I=40):
    return torch.randn(O, I, generator=torch.Generator().manual_seed(0))


class OneBlock:
    """The first block of a model with rounded linears, its inputs batch by batch, its own outputs as targets."""

    def __init__(self, folder, spec=SPEC):
        self.model, self.spec = StreamedModel(open_checkpoint(folder)), spec
        with self.model.outside(head=False):
            embedded = [self.model.embed(row) for row in TOKENS.split(1)]
        self.inputs, self.arguments = [hidden for hidden, _ in embedded], [of_batch[0] for _, of_batch in embedded]

    @torch.no_grad()
    def train(self, *, damage=1.0, batches=range(4), **options):
        """(error before, error after, the linears after, why it stopped)."""
        with self.model.block(0) as block:
            weights = {name: self.model.weight(0, name).clone() for name in self.model.family.linears}
            start = {name: rtn(W, self.spec) for name, W in weights.items()}
            targets = [run_block(block, x, a) for x, a in zip(self.inputs, self.arguments, strict=True)]
            targets[0] = targets[0] * damage
            trained, stopped = reconstruct(
                block, start, weights, self.inputs, targets, self.arguments, replace(self.spec, **options),
                batches=batches, generator=torch.Generator().manual_seed(0), transposed=self.model.family.transposed,
            )  # fmt: skip
            return *(self._error(block, each, targets) for each in (start, trained)), trained, stopped

    def _error(self, block, linears, targets):
        for name, qt in linears.items():
            self.model.weight(0, name).copy_(qt.dequantize())
        outs = [run_block(block, x, a) for x, a in zip(self.inputs, self.arguments, strict=True)]
        return sum(float((out - y).square().sum()) for out, y in zip(outs, targets, strict=True))


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", [1, 1.58, 2, 3, 4, 8])
@pytest.mark.parametrize("group", [-1, 16, 40])  # 16 leaves a last group of 8
def test_before_the_first_step_nothing_has_changed(bits, group, sym):
    if bits < 2 and not sym:
        pytest.skip("two and three values are symmetric")
    W = random_weight()
    start = rtn(W, QuantSpec(bits=bits, group_size=group, sym=sym))
    for linear in (
        TrainedScales(start),
        TrainedCodes(start),
        TrainedCodes.near(start, W),
        TrainedCodes.near(start, 3 * W),
    ):
        end = linear.finish()
        assert torch.equal(linear.values(), start.dequantize()) and torch.equal(end.dequantize(), start.dequantize())
        assert torch.equal(end.codes, start.codes) and torch.equal(end.scale, start.scale)


def test_gradients_are_those_of_the_real_grid():
    """Away from rounding the function is a product: position and scale get its derivatives, by fp64 autograd."""
    W = random_weight()
    linear = TrainedCodes.near(rtn(W, QuantSpec(bits=3, group_size=16, sym=False)), W)
    upstream = random_weight()
    grads = torch.autograd.grad(linear.values(), list(linear.leaves().values()), upstream)
    start, g = linear.start, linear.start.g_idx.long()
    factor = torch.zeros(start.scale.shape, dtype=torch.float64, requires_grad=True)
    codes = start.codes.double().requires_grad_()
    values = (start.scale * (1 + factor))[:, g] * (codes - start.zero[:, g])
    expected = torch.autograd.grad(values, (factor, codes), upstream.double())
    # fp32 sums of 16 products, relative to the largest of them
    assert torch.allclose(grads[0].squeeze(-1).double(), expected[0], rtol=1e-5, atol=1e-5)
    assert torch.allclose(linear._joined(grads[1]).double(), expected[1], rtol=1e-6)
    assert not linear._grouped(torch.ones(6, 40))[:, -1, 8:].any() and not grads[1][:, -1, 8:].any()


def test_positions_stay_in_the_range_of_codes():
    W = random_weight()
    linear = TrainedCodes.near(rtn(W, QuantSpec(bits=2, group_size=16)), W)
    with torch.no_grad():
        linear.position.add_(W.new_tensor([9.0, -9.0] * 3)[:, None, None])
    linear.limit()
    codes = linear.finish().codes
    assert bool((codes[::2] == 3).all()) and bool((codes[1::2] == 0).all())


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])  # gpt2: transposed
@pytest.mark.parametrize("sym", [False, True])
def test_training_lowers_the_error_of_a_block(model_type, sym, tiny):
    one = OneBlock(tiny(model_type), replace(SPEC, sym=sym))
    before, after, trained, stopped = one.train(reconstruct_epochs=20)
    assert after < 0.8 * before and stopped is None
    again = one.train(reconstruct_epochs=20)[2]
    assert all(torch.equal(trained[name].dequantize(), again[name].dequantize()) for name in trained)


def test_each_of_codes_and_scales_is_trained(tiny):
    one = OneBlock(tiny("llama"))
    start = one.train(reconstruct_epochs=0)[2]
    only_scales, only_codes = one.train(code_lr=1e-9)[2], one.train(scale_lr=1e-9)[2]
    for name in start:
        assert torch.equal(start[name].codes, only_scales[name].codes)
        assert not torch.equal(start[name].scale, only_scales[name].scale)
        assert torch.equal(start[name].scale, only_codes[name].scale)
        assert not torch.equal(start[name].codes, only_codes[name].codes)


def test_a_loss_that_is_not_finite_gives_back_the_start(tiny):
    one = OneBlock(tiny("llama"))
    _, _, trained, stopped = one.train(damage=torch.nan)
    assert stopped == "the loss is nan at epoch 1, step 1 of reconstruction"
    assert all(torch.equal(trained[name].codes, qt.codes) for name, qt in one.train(reconstruct_epochs=0)[2].items())


def test_what_is_held_back_is_not_trained_on(tiny):
    trained, held = hold_back(4)
    assert (trained, held) == ([1, 2, 3], [0]) and hold_back(1) == ([0], [0])
    assert sorted(sum(hold_back(20), [])) == list(range(20)) and hold_back(20)[1] == [0, 8, 16]
    one = OneBlock(tiny("llama"))
    first, second = (one.train(damage=damage, batches=trained) for damage in (1.0, torch.nan))
    assert second[3] is None
    assert all(torch.equal(first[2][name].codes, qt.codes) for name, qt in second[2].items())


class Walked:
    """A walk: what it saved."""

    def __init__(self, folder, out, spec=SPEC, *, resume=False, budget=None, stop_after=None):
        work = WorkFolder(out, {"spec": spec.as_dict()}, resume=resume)
        walk = Walk(
            StreamedModel(open_checkpoint(folder)),
            spec,
            GptqCodec(spec.bits, spec.group_size, "gptq"),
            work,
            Clock(),
            budget=budget,
        )
        if stop_after is not None:
            save = work.save_block
            work.save_block = lambda i, *args: (save(i, *args), interrupt() if i == stop_after else None)
        try:
            walk.run(SAME)
        finally:
            self.files = {path.name: path.read_bytes() for path in sorted(work.folder.glob("block-*"))}
            self.reports = [work.report(i) for i in range(len(self.files))]
            self.tensors = [work.load_block(i) for i in range(len(self.files))]
            work.close()


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("model_type", "options"), [("llama", {}), ("gpt2", {"sym": False, "bits": 3, "group_size": 48, "correction": 0.0})]
)
def test_a_resumed_or_spilled_run_gives_the_same_bytes(model_type, options, tiny, tmp_path):
    folder, spec = tiny(model_type), replace(SPEC, code_lr=0.003, scale_lr=0.003, **options)
    whole = Walked(folder, tmp_path / "whole", spec)
    with pytest.raises(KeyboardInterrupt):
        Walked(folder, tmp_path / "out", spec, stop_after=0)
    resumed = Walked(folder, tmp_path / "out", spec, resume=True, budget=1)
    assert len(whole.files) == 2 and resumed.files == whole.files
    for report in whole.reports:
        for entry in report.values():
            assert 0 < entry["block_error"] <= entry["block_error_solved"] and 0 < entry["error"]
    last = next(iter(whole.reports[-1].values()))
    assert last["block_error"] < last["block_error_solved"]


def test_training_that_makes_a_block_worse_is_not_kept(tiny, tmp_path):
    wild = Walked(tiny("llama"), tmp_path / "wild", replace(SPEC, code_lr=50.0, scale_lr=5.0))
    fast = Walked(tiny("llama"), tmp_path / "fast", replace(SPEC, reconstruct_epochs=0))
    for ours, theirs in zip(wild.tensors, fast.tensors, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert all(e["block_error"] == e["block_error_solved"] for report in wild.reports for e in report.values())


def test_a_run_that_diverges_keeps_the_block_and_goes_on(tiny, tmp_path, monkeypatch):
    real = ptq.blockwise.reconstruct

    def diverging(block, start, weights, inputs, targets, *rest, **options):
        return real(block, start, weights, inputs, [targets[i] * torch.nan for i in range(4)], *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ptq.blockwise, "reconstruct", diverging)
        with pytest.raises(TrainingStopped, match="model.layers.0: the loss is nan at epoch 1, step 1 of"):
            Walked(tiny("llama"), tmp_path / "out")
    resumed = Walked(tiny("llama"), tmp_path / "out", resume=True)
    stopped = [["stopped" in entry for entry in report.values()] for report in resumed.reports]
    assert all(stopped[0]) and not any(stopped[1])


def test_effort_on_the_command_line(monkeypatch, capsys):
    specs = []
    monkeypatch.setattr(
        ptq.pipeline, "quantize_model", lambda model, spec, **options: specs.append(spec) or interrupt()
    )
    plain = [], ["--effort", "fast"], ["--effort", "balanced"], ["--effort", "best", "--bits", "3", "--asym"]
    for flags in (*plain, ["--effort", "best", "--format", "gguf"]):
        with pytest.raises(SystemExit):
            quantize.main(flags)
    assert [spec.refined for spec in specs] == [False, False, True, True, True] and specs[0] == specs[1] == QuantSpec()
    balanced, best, gguf = specs[2:]
    assert best.own_tokens > balanced.own_tokens > 0
    assert (gguf.own_tokens, gguf.fisher_tokens) == (best.own_tokens, best.fisher_tokens)
    assert gguf.tune_epochs == best.tune_epochs
    assert best.fisher_tokens > balanced.fisher_tokens > 0 and best.tune_epochs > balanced.tune_epochs > 0
    assert best.weighs_outputs and QuantSpec().weighs_outputs and not QuantSpec(method="omniquant").weighs_outputs
    with pytest.raises(SystemExit):
        quantize.main(["--effort", "balanced", "--fisher-tokens", "0"])
    assert specs[-1] == replace(balanced, fisher_tokens=0) and not specs[-1].weighs_outputs
    with pytest.raises(SystemExit):
        quantize.main(["--effort", "draft"])
    draft, fast = specs[-1], QuantSpec()
    assert not draft.weighs_outputs and draft.correction == 0 and 0 < draft.refine_rounds < fast.refine_rounds
    for effort in ("draft", "best"):
        with pytest.raises(SystemExit) as left:
            quantize.main(["--effort", effort, "--method", "rtn"])
        assert left.value.code == 2 and f"--effort {effort} is for --method gptq, not rtn" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"desc_act": True}, "desc_act shuffles groups"),
        ({"method": "rtn"}, "method gptq, not rtn"),
        ({"method": "omniquant"}, "method gptq, not omniquant"),
        ({"reconstruct_epochs": -1}, "reconstruct_epochs -1"),
        ({"tune_epochs": -1}, "tune_epochs -1"),
        ({"own_tokens": -1}, "own_tokens -1"),
        ({"fisher_tokens": -1}, "fisher_tokens -1"),
        ({"code_lr": 0.0}, "code_lr 0.0"),
        ({"scale_lr": 0.0}, "scale_lr 0.0"),
        ({"tune_lr": 0.0}, "tune_lr 0.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, rule):
    with pytest.raises(InputError, match=rule):
        replace(SPEC, **options)
