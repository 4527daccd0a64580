"""Tuning end to end: its gradient is that of the whole model, and what it keeps is never worse."""

from dataclasses import replace
from errno import ENOSPC
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_columns import one_thread  # noqa: F401
from torch.func import functional_call
from transformers import AutoModelForCausalLM

import ptq.evaluation.stream
import ptq.tuning.end_to_end
import ptq.tuning.state
import ptq.tuning.student
import ptq.tuning.trained
from calibration.errors import TrainingStopped
from ptq import QuantSpec, quantize_model
from ptq.checkpoint import open_checkpoint
from ptq.clock import Clock
from ptq.evaluation.divergence import measure_divergence
from ptq.evaluation.stream import batches_of
from ptq.export.gptq_tensors import GptqCodec
from ptq.measure import open_streamed
from ptq.quantizers.rtn import rtn
from ptq.streamed import StreamedModel
from ptq.tuning.end_to_end import EndToEndTuning
from ptq.tuning.state import TuningState
from ptq.tuning.student import StreamedStudent
from ptq.tuning.trained import EPSILON, TrainedBlocks
from ptq.walk import Walk
from ptq.workdir import WorkFolder

DIFFERENT = torch.arange(6 * 20).reshape(6, 20) * 7 % 290
TOKENS = DIFFERENT[:1].expand(6, -1).contiguous()  # what is held back is what is trained on, so that gains are certain
SPEC = QuantSpec(bits=2, group_size=32, fisher_tokens=0, tune_epochs=3, tune_lr=0.005)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    for module in (ptq.evaluation.stream, ptq.tuning.end_to_end):
        monkeypatch.setattr(module, "BATCH_TOKENS", 20)
    monkeypatch.setattr(ptq.tuning.student, "LOGIT_ENTRIES", 7 * 300)  # a head that takes 20 tokens in three parts


class Tuned:
    """A walk into a work folder, ready to be tuned."""

    def __init__(self, folder, out, spec=SPEC, *, tokens=TOKENS, resume=False, budget=None):
        self.model, self.spec = StreamedModel(open_checkpoint(folder)), spec
        self.codec = GptqCodec(spec.bits, spec.group_size, spec.checkpoint_format)
        self.work = WorkFolder(out, {"spec": spec.as_dict()}, resume=resume)
        Walk(self.model, spec, self.codec, self.work, Clock(), budget=budget).run(tokens)
        self.tuning = EndToEndTuning(self.model, spec, self.codec, self.work, Clock(), budget=budget)

    def run(self):
        try:
            self.tuning.run(TOKENS)
        finally:
            self.work.close()
        return self

    @property
    def saved(self):
        return [path.read_bytes() for path in sorted(self.work.folder.glob("tuned*.safetensors"))]

    def tensors(self):
        return [self.work.load_block(i) for i in range(len(self.model.blocks))]


def whole_model_gradients(folder, student, tokens):
    """Divergence on some tokens and its gradients, linear by linear to factors and codes, by autograd of the dense
    model in one piece."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    parameters, leaves = {}, []
    for i in range(len(student.model.blocks)):
        for name, qt in student._quantized(i).items():
            factor = torch.zeros_like(qt.scale, requires_grad=True)
            g = qt.g_idx.long()
            codes = qt.codes.float().requires_grad_()
            W = (qt.scale * (1 + factor))[:, g] * (codes - qt.zero[:, g])
            full = f"{student.model.block_name(i)}.{name}.weight"
            parameters[full] = W.T if student.model.family.transposed else W
            leaves += [factor, codes]
    p = model(tokens, use_cache=False).logits.detach().log_softmax(-1)
    q = functional_call(model, parameters, (tokens,), {"use_cache": False}).logits.log_softmax(-1)
    loss = (p.exp() * (p - q)).sum(-1).mean()
    return loss.item(), torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])  # gpt2: transposed; gemma2: capped logits
@pytest.mark.parametrize("budget", [None, 1])
@torch.no_grad()
def test_the_streamed_gradient_is_that_of_the_whole_model(model_type, budget, tiny, tmp_path):
    tuned = Tuned(tiny(model_type), tmp_path / "out", replace(SPEC, sym=False, bits=3), tokens=DIFFERENT, budget=budget)
    student = StreamedStudent(tuned.model, tuned.codec, tuned.work, budget, codes=True)
    with torch.enable_grad():
        loss, expected = whole_model_gradients(tiny(model_type), student, DIFFERENT[[4, 1]])
    text, taken = student.open(batches_of(DIFFERENT)), {}
    with tuned.model.outside(head=True):
        divergence = student.backward(text, [4, 1], lambda i, name, gradients: taken.update({(i, name): gradients}))
        assert divergence == pytest.approx(loss, rel=1e-4)
        assert student.divergence(text, [4, 1]) == pytest.approx(loss, rel=1e-4)
    blocks, linears = range(len(tuned.model.blocks)), tuned.model.family.linears
    assert list(taken) == [(i, name) for i in reversed(blocks) for name in linears]
    found = [gradient.flatten(1) for i in blocks for name in linears for gradient in taken[i, name]]
    for ours, theirs in zip(found, expected, strict=True):
        # fp32 sums of a few thousand terms in another order; groups are filled up with columns that are not there
        ours, padding = ours[:, : theirs.shape[1]], ours[:, theirs.shape[1] :]
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max())) and not padding.any()
    tuned.work.close()


@pytest.mark.parametrize("budget", [None, 1])
@torch.no_grad()
def test_a_step_is_adam(budget, tmp_path):
    """Three steps by the textbook (arXiv 1412.6980, algorithm 1) in fp64."""
    start = rtn(torch.randn(4, 32, generator=torch.Generator().manual_seed(0)), replace(SPEC, group_size=16))
    trained = TrainedBlocks(tmp_path / "trained", budget, codes=True)
    trained.add({"q": start}, {"q": start.dequantize()})
    leaves = [leaf.detach().double() for leaf in trained.linears(0, {"q": start})["q"].leaves().values()]
    m, v, rates = [0.0, 0.0], [0.0, 0.0], {"factor": 0.01, "position": 0.02}
    for t in range(1, 4):
        gradients = [torch.randn(leaf.shape, generator=torch.Generator().manual_seed(t)) for leaf in leaves]
        trained.step(0, "q", gradients, rates)
        for k, rate in enumerate(rates.values()):
            m[k] = 0.9 * m[k] + 0.1 * gradients[k].double()
            v[k] = 0.95 * v[k] + 0.05 * gradients[k].double() ** 2
            leaves[k] -= rate * (m[k] / (1 - 0.9**t)) / ((v[k] / (1 - 0.95**t)).sqrt() + EPSILON)
    for ours, expected in zip(trained.linears(0, {"q": start})["q"].leaves().values(), leaves, strict=True):
        assert torch.allclose(ours.double(), expected, atol=1e-5)
    assert len(list(tmp_path.glob("trained/*.bin"))) == (0 if budget is None else 6)


@torch.no_grad()
def test_a_step_leaves_positions_in_the_range_of_codes(tmp_path):
    start = rtn(torch.randn(4, 32, generator=torch.Generator().manual_seed(0)), SPEC)
    trained = TrainedBlocks(tmp_path, None, codes=True)
    trained.add({"q": start}, {"q": start.dequantize()})
    factor, position = trained.linears(0, {"q": start})["q"].leaves().values()
    trained.step(0, "q", [torch.zeros_like(factor), torch.ones_like(position)], {"factor": 0.01, "position": 9.0})
    assert not trained.linears(0, {"q": start})["q"].finish().codes.any()


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"bits": 1, "group_size": 48}, {"bits": 1.58}, {"sym": False, "bits": 3, "tune_lr": 3e-3}]
)
def test_tuning_lowers_the_divergence_and_touches_codes_if_it_may(options, codes, tiny, tmp_path):
    options = options | ({"tune_epochs": 12} if codes else {"tune_drift": 0.0})
    tuned = Tuned(tiny("llama"), tmp_path / "out", replace(SPEC, **options))
    before = tuned.tensors()
    tuned.run()
    report = tuned.work.tuned_report()
    assert report["kl_after"] == min(report["kl_epochs"]) < report["kl_before"]
    for old, new in zip(before, tuned.tensors(), strict=True):
        changed = {name for name in old if not torch.equal(old[name], new[name])}
        scales, words = ({name for name in old if name.endswith(end)} for end in (".scales", ".qweight"))
        assert scales <= changed <= scales | (words if codes else set())
    assert codes or report["codes_turned"] == 0


def test_codes_turn_where_gradients_agree(tiny, tmp_path):
    """With a drift that takes positions over the edge of their cells, some codes turn, and the report says how many."""
    spec = replace(SPEC, tune_epochs=12, tune_drift=0.04)
    tuned = Tuned(tiny("llama"), tmp_path / "out", spec)
    before, codes = tuned.tensors(), []
    report = tuned.run().work.tuned_report()
    for old, new in zip(before, tuned.tensors(), strict=True):
        for name in (name.removesuffix(".qweight") for name in old if name.endswith(".qweight")):
            parts = ({k.rpartition(".")[2]: v for k, v in block.items() if k.startswith(name)} for block in (old, new))
            codes.append([tuned.codec.unpack(packed).codes for packed in parts])
    turned = sum(int((old != new).sum()) for old, new in codes) / sum(old.numel() for old, _ in codes)
    assert turned == report["codes_turned"] > 0


@pytest.mark.parametrize("steps", [1, 8, 1000])
def test_noise_carries_a_position_as_far_as_the_spec_says(steps):
    """Steps of random sign and the length of the rate end that far away in the mean square, however many there are."""
    rates = EndToEndTuning(None, SPEC, None, None, None)._rates(steps)
    assert sum(rate["position"] ** 2 for rate in rates) == pytest.approx(SPEC.tune_drift**2) and len(rates) == steps
    assert max(rate["factor"] for rate in rates) <= SPEC.tune_lr


def test_without_epochs_nothing_happens(tiny, tmp_path):
    tuned = Tuned(tiny("llama"), tmp_path / "out", replace(SPEC, tune_epochs=0)).run()
    assert not tuned.work.has_tuned and tuned.work.tuned_report() is None


def test_epochs_that_make_it_worse_are_not_kept(tiny, tmp_path):
    tuned = Tuned(tiny("llama"), tmp_path / "out", replace(SPEC, tune_lr=3.0, tune_epochs=2))
    before = tuned.tensors()
    tuned.run()
    report = tuned.work.tuned_report()
    assert report["kl_after"] == report["kl_before"] < min(report["kl_epochs"]) and len(report["kl_epochs"]) == 2
    assert all(torch.equal(old[n], new[n]) for old, new in zip(before, tuned.tensors(), strict=True) for n in old)


def test_a_killed_or_spilled_run_gives_the_same_bytes(tiny, tmp_path, monkeypatch):
    folder = tiny("llama")
    whole = Tuned(folder, tmp_path / "whole").run()
    killed = Tuned(folder, tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ptq.tuning.end_to_end, "_cosine", lambda *_: interrupt())
        killed.run()
    assert not killed.work.has_tuned
    resumed = Tuned(folder, tmp_path / "out", resume=True, budget=1).run()
    assert resumed.saved == whole.saved
    monkeypatch.setattr(EndToEndTuning, "_train", None)  # a finished run is not tuned again
    assert Tuned(folder, tmp_path / "out", resume=True).run().saved == whole.saved


def interrupt():
    raise KeyboardInterrupt


def state_of(tuned):
    return TuningState(tuned.work, len(tuned.model.blocks)).report()


class Kept:
    """A tuning that writes its state down after every epoch, interrupted in one of them."""

    def __init__(self, folder, out, monkeypatch, steps):
        monkeypatch.setattr(ptq.tuning.end_to_end, "KEEP_AFTER", -1)
        real, taken = StreamedStudent.backward, []

        def counted(self, *args):
            taken.append(args[1])
            return interrupt() if len(taken) > steps else real(self, *args)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(StreamedStudent, "backward", counted)
            Tuned(folder, out).run()


def test_what_was_killed_goes_on_after_its_last_epoch(tiny, tmp_path, monkeypatch):
    """Five batches are trained on: twelve steps are two epochs and two of the third."""
    folder = tiny("llama")
    whole = Tuned(folder, tmp_path / "whole").run()
    Kept(folder, tmp_path / "out", monkeypatch, 12)
    resumed, real, taken = Tuned(folder, tmp_path / "out", resume=True, budget=1), StreamedStudent.backward, []
    assert len(state_of(resumed)["kl_epochs"]) == 2
    monkeypatch.setattr(StreamedStudent, "backward", lambda *args: taken.append(args) or real(*args))
    assert resumed.run().saved == whole.saved and len(taken) == 5
    assert not list(resumed.work.folder.glob("tuning*"))


@pytest.mark.parametrize("name", ["tuning.safetensors", "tuning-00002-00001.safetensors", "tuned-00000.safetensors"])
def test_a_tuning_whose_state_is_damaged_starts_again(name, tiny, tmp_path, monkeypatch):
    folder = tiny("llama")
    whole = Tuned(folder, tmp_path / "whole").run()
    Kept(folder, tmp_path / "out", monkeypatch, 12)
    path = tmp_path / "out.ptq-work" / name
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    resumed = Tuned(folder, tmp_path / "out", resume=True)
    assert state_of(resumed) is None
    assert resumed.run().saved == whole.saved


def test_a_state_that_was_not_written_to_its_end_does_not_count(tiny, tmp_path, monkeypatch):
    folder, save = tiny("llama"), WorkFolder.save_part
    whole = Tuned(folder, tmp_path / "whole").run()
    monkeypatch.setattr(ptq.tuning.end_to_end, "KEEP_AFTER", -1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop = lambda self, name, *args: interrupt() if name == "tuning-00002-00001" else save(self, name, *args)  # noqa: E731
        patch.setattr(WorkFolder, "save_part", stop)
        Tuned(folder, tmp_path / "out").run()
    left = {path.name for path in (tmp_path / "out.ptq-work").glob("tuning-*")}
    assert {"tuning-00001-00000.safetensors", "tuning-00002-00000.safetensors"} <= left
    resumed = Tuned(folder, tmp_path / "out", resume=True)
    assert len(state_of(resumed)["kl_epochs"]) == 1
    assert resumed.run().saved == whole.saved


def test_without_room_for_the_state_tuning_goes_on(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(ptq.tuning.state, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    folder = tiny("llama")
    Kept(folder, tmp_path / "out", monkeypatch, 12)
    assert not list((tmp_path / "out.ptq-work").glob("tuning*"))


def test_a_full_disk_is_an_error_before_the_first_step(tiny, tmp_path, monkeypatch):
    """What is trained has its room on the disk at once: mapped later, a full disk would kill the process."""

    def full(x, path):
        raise OSError(ENOSPC, "No space left on device", str(path))

    whole = Tuned(tiny("llama"), tmp_path / "whole").run()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(ptq.tuning.trained, "write", full)
        Tuned(tiny("llama"), tmp_path / "out", budget=1).run()
    assert Tuned(tiny("llama"), tmp_path / "out", resume=True, budget=1).run().saved == whole.saved


def test_what_is_damaged_is_done_again(tiny, tmp_path):
    folder = tiny("llama")
    whole = Tuned(folder, tmp_path / "out").run()
    expected = whole.saved
    for name in ("tuned.safetensors", "tuned-00000.safetensors", "block-00001.safetensors"):
        path = whole.work.folder / name
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        again = Tuned(folder, tmp_path / "out", resume=True)
        assert not again.work.has_tuned
        assert again.run().saved == expected


def test_a_divergence_that_is_not_finite_keeps_the_best(tiny, tmp_path, monkeypatch):
    real, calls = StreamedStudent.backward, []

    def diverging(self, text, batches, take):
        calls.append(batches)
        return torch.nan if len(calls) == 7 else real(self, text, batches, take)

    folder = tiny("llama")
    with monkeypatch.context() as patch:
        patch.setattr(StreamedStudent, "backward", diverging)
        with pytest.raises(TrainingStopped, match="divergence is nan at epoch 2, step 2; .* kept and --resume"):
            Tuned(folder, tmp_path / "out").run()
    resumed = Tuned(folder, tmp_path / "out", resume=True).run()
    report = resumed.work.tuned_report()
    assert report["kl_after"] == report["kl_epochs"][0] < report["kl_before"] and len(report["kl_epochs"]) == 1


def test_the_written_file_is_the_tuned_one(tiny, tmp_path):
    np.save(tmp_path / "tokens.npy", TOKENS.numpy())
    folder, options = tiny("llama"), {"calibration": str(tmp_path / "tokens.npy"), "heldout": "none"}
    solved, tuned = (
        quantize_model(folder, spec, out=tmp_path / f"out{spec.tune_epochs}", **options)
        for spec in (replace(SPEC, tune_epochs=0), SPEC)
    )
    reported = tuned.report["tuning"]
    assert solved.report["tuning"] is None and reported["kl_after"] < reported["kl_before"]
    before, after = (
        measure_divergence(open_streamed(written.folder), open_streamed(folder), TOKENS).kl
        for written in (solved, tuned)
    )
    assert after < before
