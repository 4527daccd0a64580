"""OmniQuant in the walk: training, its streams, what is saved, and what happens when it diverges."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_columns import one_thread  # noqa: F401
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import ptq.blockwise
import ptq.pipeline
import ptq.quantizers.omniquant.block
from calibration.attention import use_faster_attention
from calibration.capture import run_block
from calibration.errors import InputError, TrainingStopped
from calibration.processor import has_bf16_units
from ptq import QuantSpec, quantize, quantize_model
from ptq.checkpoint import open_checkpoint
from ptq.clock import Clock
from ptq.export.gptq_tensors import GptqCodec
from ptq.quantizers.omniquant.block import omniquant
from ptq.quantizers.omniquant.transform import Transformation
from ptq.reload import open_weights
from ptq.spec import omniquant_recipe
from ptq.streamed import StreamedModel
from ptq.walk import Walk
from ptq.workdir import WorkFolder

TOKENS = torch.arange(4 * 20).reshape(4, 20) * 7 % 290
SPEC = QuantSpec(bits=2, group_size=32, method="omniquant", sym=False, epochs=4, lwc_lr=0.1)


class OneBlock:
    """The first block of a model, its inputs batch by batch, and its own outputs as targets."""

    def __init__(self, folder, dtype=torch.float32):
        self.model = StreamedModel(open_checkpoint(folder), dtype=dtype)
        with self.model.outside(head=False):
            embedded = [self.model.embed(row) for row in TOKENS.split(1)]
        self.inputs = [hidden for hidden, _ in embedded]
        self.arguments = [arguments[0] for _, arguments in embedded]

    def train(self, spec=SPEC, targets=None, inputs=None):
        with self.model.block(0) as block, torch.no_grad():
            weights = {name: self.model.weight(0, name) for name in self.model.family.linears}
            if targets is None:
                targets = [run_block(block, x, a) for x, a in zip(self.inputs, self.arguments, strict=True)]
            transposed = self.model.family.transposed
            return omniquant(
                block, weights, inputs or self.inputs, targets, self.arguments, spec, transposed=transposed
            )


class Diverging(list):
    """Targets of which the n-th that is asked for is not finite."""

    def __init__(self, targets, n):
        super().__init__(targets)
        self.left = n

    def __getitem__(self, i):
        self.left -= 1
        return super().__getitem__(i) * (torch.nan if self.left == 0 else 1.0)


def same(a, b):
    return all(torch.equal(a.quantized[n].dequantize(), b.quantized[n].dequantize()) for n in a.quantized)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])  # gpt2: transposed
def test_the_loss_falls(model_type, tiny):
    trained = OneBlock(tiny(model_type)).train()
    assert len(trained.losses) == 4 and trained.losses[-1] < 0.95 * trained.losses[0] and trained.stopped is None
    assert not trained.changed


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_half_precision_trains_under_autocast(model_type, tiny):
    """Blocks that compute in bf16, as on a GPU: what is learned and the loss stay fp32."""
    one = OneBlock(tiny(model_type, dtype="bfloat16"), dtype=torch.bfloat16)
    trained = one.train()
    assert one.inputs[0].dtype == torch.bfloat16 and trained.stopped is None
    assert trained.losses[-1] < 0.95 * trained.losses[0]


def test_a_divergence_goes_back_to_the_best_epoch(tiny):
    one = OneBlock(tiny("llama"))
    with one.model.block(0) as block, torch.no_grad():
        targets = [run_block(block, x, a) for x, a in zip(one.inputs, one.arguments, strict=True)]
    broken = one.train(targets=Diverging(targets, 4 + 4 + 3))
    assert broken.stopped == "the loss is nan at epoch 3, step 3" and len(broken.losses) == 2
    assert same(broken, one.train(replace(SPEC, epochs=2))) and not same(broken, one.train())
    at_once = one.train(targets=Diverging(targets, 1))
    assert at_once.stopped == "the loss is nan at epoch 1, step 1" and same(at_once, one.train(replace(SPEC, epochs=0)))


def test_the_mean_target_has_the_gradient_of_both_losses():
    generator = torch.Generator().manual_seed(0)
    q, a, b = (torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    q.requires_grad_()
    both = torch.autograd.grad(F.mse_loss(q, a) + F.mse_loss(q, b), q)[0]
    ours = torch.autograd.grad(2 * F.mse_loss(q, (a + b) / 2), q)[0]
    assert torch.allclose(both, ours, rtol=1e-12)


class Walked:
    """A walk with a method that trains: what it saved, and the streams at its end."""

    def __init__(self, folder, out, spec=SPEC, *, resume=False, budget=None, stop_after=None, bf16=False):
        self.model = StreamedModel(open_checkpoint(folder))
        use_faster_attention(self.model.model)
        work = WorkFolder(out, {"spec": spec.as_dict()}, resume=resume)
        walk = Walk(self.model, spec, GptqCodec(2, 32, "gptq"), work, Clock(), budget=budget, bf16=bf16)
        opened = walk._open_streams
        walk._open_streams = lambda tokens: setattr(self, "streams", opened(tokens)) or self.streams
        if stop_after is not None:
            save = work.save_block
            work.save_block = lambda i, *args: (save(i, *args), interrupt() if i == stop_after else None)
        try:
            walk.run(TOKENS)
        finally:
            self.files = {path.name: path.read_bytes() for path in sorted(work.folder.glob("block-*"))}
            self.reports = [work.report(i) for i in range(len(self.files))]
            self.names = [name for i in range(len(self.files)) for name, _, _ in work.layout(i)]
            self.ends = [[x.clone() for x in store] for store in self.streams]
            work.close()


@pytest.mark.skipif(not has_bf16_units(), reason="this processor has no instructions for bf16")
def test_blocks_run_in_bf16_and_folds_do_not(tiny, tmp_path, monkeypatch):
    """A fold's sums are what the file holds, and its proof is of fp32; a block's passes are what takes the time."""
    switch, seen = torch.backends.mkldnn.matmul, {}

    def note(owner, name):
        function = getattr(owner, name)

        def noting(*args, **options):
            seen.setdefault(name, set()).add(switch.fp32_precision)
            return function(*args, **options)

        monkeypatch.setattr(owner, name, noting)

    note(Transformation, "fold")
    note(Transformation, "prove")
    note(ptq.quantizers.omniquant.block, "run_block")
    note(torch.Tensor, "backward")
    before, spec = switch.fp32_precision, replace(SPEC, let=True, let_shift=True)
    Walked(tiny("llama"), tmp_path / "out", spec, bf16=True)
    assert seen == {"fold": {before}, "prove": {before}, "run_block": {"bf16"}, "backward": {"bf16"}}
    assert before != "bf16" and switch.fp32_precision == before


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("let", [False, True])
@pytest.mark.parametrize("aug_loss", [False, True])
def test_a_resumed_or_spilled_run_gives_the_same_bytes(let, aug_loss, tiny, tmp_path):
    spec = replace(SPEC, epochs=2, let=let, aug_loss=aug_loss, train_rows=3 if let else 1)
    folder = tiny("qwen2", dtype="bfloat16")
    whole = Walked(folder, tmp_path / "whole", spec)
    with pytest.raises(KeyboardInterrupt):
        Walked(folder, tmp_path / "out", spec, stop_after=0)
    resumed = Walked(folder, tmp_path / "out", spec, resume=True, budget=1)
    assert len(whole.files) == 2 and resumed.files == whole.files and resumed.reports == whole.reports
    assert all(
        torch.equal(x, y) for a, b in zip(resumed.ends, whole.ends, strict=True) for x, y in zip(a, b, strict=True)
    )
    changed = {name for name in whole.names if not name.endswith(("qweight", "qzeros", "scales", "g_idx"))}
    biases = {f"self_attn.{name}_proj.bias" for name in ("q", "k", "v")}
    expected = {"input_layernorm.weight", "post_attention_layernorm.weight", *biases} if let else set()
    assert changed == {f"model.layers.{i}.{name}" for i in range(2) for name in expected}
    for report in whole.reports:
        for entry in report.values():
            assert 0 < entry["error"] and (let or entry["error"] < entry["error_rtn"])  # a few steps settle no scales


@pytest.mark.parametrize("model_type", ["llama", "opt", "gemma2"])
def test_the_streams_are_those_of_the_written_file(model_type, tiny, tmp_path):
    """LET and LWC end to end: the file, dequantized by the reader, in the Hugging Face model."""
    folder, tokens = tiny(model_type, dtype="bfloat16"), tmp_path / "tokens.npy"
    np.save(tokens, TOKENS.numpy())
    spec = replace(SPEC, epochs=2, let=True, let_shift=True)
    text = {"calibration": str(tokens), "heldout": str(tokens)}
    artefact = quantize_model(folder, spec, out=tmp_path / "out", dtype="float32", **text)
    walked = Walked(folder, tmp_path / "again", spec)
    weights, plain = open_weights(tmp_path / "out"), open_checkpoint(folder)
    family = walked.model.family
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    use_faster_attention(model)
    parameters = dict(model.named_parameters())
    for name in weights.names():
        if name in parameters:
            parameters[name].data.copy_(weights.read([name])[name])
    outputs = []
    hook = model.get_submodule(family.blocks)[-1].register_forward_hook(
        lambda _, args, out: outputs.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        for row in TOKENS.split(1):
            model(row, use_cache=False)
    hook.remove()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(walked.ends[0], outputs, strict=True))
    norms = {f"{fold.source}.weight" for fold in family.folds if "norm" in fold.source}
    key = walked.model.stored_key(0, sorted(norms)[0])
    assert weights.dtype(key) == plain.dtype(key) == "BF16"
    assert not torch.equal(weights.read([key])[key], plain.read([key])[key])
    assert artefact.report["perplexity"]["after"]["perplexity"] > 1


def test_divergence_in_a_run_keeps_what_is_finished(tiny, tmp_path, monkeypatch):
    folder, real = tiny("llama"), ptq.blockwise.omniquant

    def diverging_in_block_1(block, weights, inputs, targets, arguments, spec, **options):
        if block is diverging_in_block_1.block:
            targets = Diverging([targets[i] for i in range(len(targets))], 4 + 2)
        return real(block, weights, inputs, targets, arguments, spec, **options)

    built = StreamedModel.__init__

    def remember(self, *args, **options):
        built(self, *args, **options)
        diverging_in_block_1.block = self.blocks[1]

    monkeypatch.setattr(StreamedModel, "__init__", remember)
    monkeypatch.setattr(ptq.blockwise, "omniquant", diverging_in_block_1)
    np.save(tmp_path / "tokens.npy", TOKENS.numpy())
    options = {"out": tmp_path / "out", "calibration": str(tmp_path / "tokens.npy"), "heldout": "none"}
    with pytest.raises(TrainingStopped, match="model.layers.1: the loss is nan at epoch 2, step 2; .*--resume"):
        quantize_model(folder, SPEC, **options)
    assert len(list((tmp_path / "out.ptq-work").glob("block-*"))) == 2
    report = quantize_model(folder, SPEC, resume=True, **options).report
    stopped = [name for name, entry in report["linears"].items() if "stopped" in entry]
    assert report["resumed"] and len(stopped) == 7 and all(".1." in name for name in stopped)


def test_activations_that_overflow_are_named(tiny, tmp_path, monkeypatch):
    embed = StreamedModel.embed

    def overflowing(self, tokens):
        hidden, arguments = embed(self, tokens)
        return hidden * torch.inf, arguments

    monkeypatch.setattr(StreamedModel, "embed", overflowing)
    with pytest.raises(InputError, match="outputs of model.layers.0 are not finite"):
        Walked(tiny("llama"), tmp_path / "out")


def test_the_command_line_takes_the_papers_settings(monkeypatch):
    specs = []
    monkeypatch.setattr(
        ptq.pipeline, "quantize_model", lambda model, spec, **options: specs.append(spec) or interrupt()
    )
    for flags in (
        ["--bits", "2"],
        ["--bits", "3"],
        ["--bits", "2", "--sym", "--epochs", "3", "--no-aug-loss", "--let"],
    ):
        with pytest.raises(SystemExit):
            quantize.main(["--method", "omniquant", *flags])
    settings = [(s.sym, s.epochs, s.aug_loss, s.let, s.lwc_lr, s.let_lr, s.train_rows) for s in specs]
    assert settings == [
        (False, 40, True, False, 1e-2, 5e-3, 1),
        (False, 20, False, False, 1e-2, 5e-3, 1),
        (True, 3, False, True, 1e-2, 5e-3, 1),
    ]
    assert omniquant_recipe(4) == {"sym": False, "epochs": 20, "aug_loss": False}


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"bits": 1, "sym": True}, "2 bits or more"),
        ({"desc_act": True}, "does not know"),
        ({"epochs": -1}, "epochs -1"),
        ({"train_rows": 0}, "train_rows 0"),
        ({"lwc_lr": 0.0}, "lwc_lr 0.0"),
        ({"let_lr": -1.0}, "let_lr -1.0"),
        ({"let_shift": True}, "needs let"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, rule):
    with pytest.raises(InputError, match=rule):
        replace(SPEC, **options)
