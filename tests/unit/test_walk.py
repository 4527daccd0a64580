"""The walk on tiny models: what multiplies what, how often, and that nothing depends on memory or interruptions."""

import shutil
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_columns import one_thread  # noqa: F401
from transformers import AutoModelForCausalLM

import ptq.stages
import ptq.streams
from calibration.attention import use_faster_attention
from calibration.capture import SuspendedForwards
from calibration.errors import InputError
from calibration.hessian import Hessian
from calibration.store import ActivationStore
from ptq.checkpoint import open_checkpoint
from ptq.clock import Clock
from ptq.export.gptq_tensors import GptqCodec
from ptq.qtensor import digest
from ptq.quantizers.rtn import rtn
from ptq.spec import QuantSpec
from ptq.stages import StageSolver
from ptq.streamed import StreamedModel
from ptq.walk import Walk
from ptq.workdir import WorkFolder

TOKENS = torch.arange(5 * 20).reshape(5, 20) * 7 % 290
BATCH_TOKENS = 40  # batches of 2, 2 and 1 rows
MODEL_TYPES = ["llama", "gpt2", "opt", "gemma3_text"]  # separate q, k, v; transposed; flattened; two kinds of mask
SPEC = QuantSpec(bits=3, group_size=32, refine_rounds=1, fisher_tokens=0)


class Recorded:
    """One walk, watched: rows multiplied by each linear, what Hessians were fed, and the streams at the end."""

    def __init__(self, monkeypatch, folder, out, spec=SPEC, *, budget=None, resume=False, stop_after=None, bf16=False):
        self.rows, self.fed, self.stores = Counter(), [], []
        recorded = self

        class WatchedHessian(Hessian):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                recorded.fed.append([])

            def add(self, x, x_full=None):
                recorded.fed[-1].append((x.clone(), None if x_full is None else x_full.clone()))
                super().add(x, x_full)

        class WatchedStore(ActivationStore):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                recorded.stores.append(self)

        monkeypatch.setattr(ptq.stages, "Hessian", WatchedHessian)
        monkeypatch.setattr(ptq.streams, "ActivationStore", WatchedStore)
        monkeypatch.setattr(StreamedModel, "batch_tokens", BATCH_TOKENS)
        self.model, self.spec = StreamedModel(open_checkpoint(folder)), spec
        use_faster_attention(self.model.model)
        for i in range(len(self.model.blocks)):
            for name in self.model.family.linears:
                self.model.linear(i, name).register_forward_hook(
                    lambda _, args, out, key=(i, name): self.rows.update({key: args[0].numel() // args[0].shape[-1]})
                )
        self.work = WorkFolder(out, {"spec": spec.as_dict()}, resume=resume)
        self.codec = GptqCodec(spec.bits, spec.group_size, spec.checkpoint_format)
        if stop_after is not None:
            save = self.work.save_block

            def save_and_die(i, *args):
                save(i, *args)
                if i == stop_after:
                    raise KeyboardInterrupt

            self.work.save_block = save_and_die
        try:
            tokens = None if spec.method == "rtn" else TOKENS
            Walk(self.model, spec, self.codec, self.work, Clock(), budget=budget, bf16=bf16).run(tokens)
        finally:
            self.streams = [[x.clone() for x in store] for store in self.stores]
            self.spilled = sum(store.spilled for store in self.stores)
            self.files = {path.name: path.read_bytes() for path in sorted(self.work.folder.glob("block-*"))}
            self.unpacked, self.reports = {}, {}
            for i in range(len(self.files)):
                parts, self.reports[i] = self.work.load_block(i), self.work.report(i)
                for name in self.model.family.linears:
                    prefix = self.model.stored_name(i, name) + "."
                    own = {key.removeprefix(prefix): part for key, part in parts.items() if key.startswith(prefix)}
                    self.unpacked[prefix[:-1]] = self.codec.unpack(own)
            self.work.close()


@pytest.fixture
def walk(monkeypatch):
    return lambda *args, **kwargs: Recorded(monkeypatch, *args, **kwargs)


@torch.no_grad()
def whole_forward(folder, family, weights):
    """The Hugging Face model with some weights replaced: inputs by (block, linear), outputs of the last block."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    use_faster_attention(model)
    modules = dict(model.named_modules())
    for name, values in weights.items():
        modules[name].weight.copy_(values.T if family.transposed else values)
    inputs, outputs = {}, []
    blocks = model.get_submodule(family.blocks)
    for i, block in enumerate(blocks):
        for name in family.linears:
            block.get_submodule(name).register_forward_pre_hook(
                lambda _, args, key=(i, name): inputs.setdefault(key, []).append(args[0].clone())
            )
    blocks[-1].register_forward_hook(lambda _, args, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    for batch in TOKENS.split(BATCH_TOKENS // TOKENS.shape[1]):
        model(batch, use_cache=False)
    return inputs, outputs


def equal_streams(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def loaded_linears(model):
    """(block, linear) of all weights that are in memory."""
    every = ((i, name) for i in range(len(model.blocks)) for name in model.family.linears)
    return {(i, name) for i, name in every if not model.weight(i, name).is_meta}


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_no_more_weights_are_in_memory_than_those_of_two_stages(model_type, walk, tiny, tmp_path, monkeypatch):
    seen = {"hessian": [], "solve": []}

    def watch(name, real):
        def watched(self, *args, **kwargs):
            seen[name].append(loaded_linears(self.model))
            return real(self, *args, **kwargs)

        monkeypatch.setattr(StageSolver, name, watched)

    for name in seen:
        watch(name, getattr(StageSolver, name))
    model = walk(tiny(model_type), tmp_path / "out").model
    stages = [{(i, name) for name in stage} for i in range(2) for stage in model.family.stages]
    before = [set() if s % len(model.family.stages) == 0 else stages[s - 1] for s in range(len(stages))]
    assert seen["hessian"] == [a | b for a, b in zip(before, stages, strict=True)]
    assert seen["solve"] == stages and loaded_linears(model) == set()


def test_an_error_on_the_way_to_the_first_halt_leaves_no_hook(walk, tiny, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no room")

    entered = []
    monkeypatch.setattr(ptq.streams.BlockForwards, "_run_ahead", lambda self, *_: entered.append(self.model) or fail())
    with pytest.raises(OSError, match="no room"):
        walk(tiny("llama"), tmp_path / "out")
    linears = [entered[0].linear(0, name) for name in entered[0].family.linears]
    assert not any(linear._forward_pre_hooks for linear in linears)


@pytest.mark.parametrize("correction", [0.0, 1.0])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_linear_multiplies_every_token_once_a_stream(model_type, correction, walk, tiny, tmp_path):
    spec = replace(SPEC, refine_rounds=0, correction=correction)
    done = walk(tiny(model_type), tmp_path / "out", spec)
    family = done.model.family
    expected = TOKENS.numel() * (2 if correction else 1)
    assert done.rows == {(i, name): expected for i in range(2) for name in family.linears}
    assert len(done.fed) == 2 * len(family.stages), "one Hessian a stage: linears that read one tensor share it"
    assert all(sum(x.numel() // x.shape[-1] for x, _ in batches) == TOKENS.numel() for batches in done.fed)
    assert len(done.stores) == (2 if correction else 1)


@pytest.mark.parametrize("correction", [0.0, 1.0])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_streams_are_those_of_the_written_model(model_type, correction, walk, tiny, tmp_path):
    """Every input that was summed, and the end of either stream, against whole forwards, bit by bit."""
    folder = tiny(model_type)
    done = walk(
        folder,
        tmp_path / "out",
        replace(SPEC, correction=correction),
    )
    family = done.model.family
    values = {name: qt.dequantize() for name, qt in done.unpacked.items()}
    assert len(values) == 2 * len(family.linears)
    quantized_inputs, quantized_outputs = whole_forward(folder, family, values)
    full_inputs, full_outputs = whole_forward(folder, family, {})
    fed = iter(done.fed)
    for i in range(2):
        for stage in family.stages:
            xs, x_fulls = zip(*next(fed), strict=True)
            assert equal_streams(xs, quantized_inputs[i, stage[0]])
            assert equal_streams(x_fulls, full_inputs[i, stage[0]]) if correction else set(x_fulls) == {None}
    ends = [quantized_outputs, full_outputs] if correction else [quantized_outputs]
    assert len(done.streams) == len(ends)
    for stream, end in zip(done.streams, ends, strict=True):
        assert equal_streams(stream, end)
    assert not equal_streams(quantized_outputs, full_outputs)


def test_reports_say_what_was_written(walk, tiny, tmp_path):
    done = walk(tiny("llama"), tmp_path / "out")
    names = [done.model.stored_name(i, name) for i in range(2) for name in done.model.family.linears]
    entries = done.reports[0] | done.reports[1]
    assert list(entries) == names
    for name, entry in entries.items():
        values = done.unpacked[name].dequantize()
        assert entry["sha256"] == digest(values) and entry["shape"] == list(values.shape)
        assert 0 < entry["error"] <= entry["error_gptq"] < entry["error_rtn"] < 1
        assert entry["dead_inputs"] == 0 and entry["damp_percent"] == SPEC.damp_percent


def test_plain_rounding_needs_no_tokens(walk, tiny, tmp_path):
    spec = QuantSpec(bits=4, group_size=32, method="rtn")
    done = walk(tiny("gpt2"), tmp_path / "out", spec)
    assert not done.rows and not done.fed and not done.stores
    checkpoint = open_checkpoint(tiny("gpt2"))
    for name, qt in done.unpacked.items():
        W = checkpoint.read([name + ".weight"])[name + ".weight"].T
        assert torch.equal(qt.dequantize(), rtn(W, spec).dequantize())


@pytest.mark.parametrize("model_type", ["llama", "opt", "gemma3_text"])
@pytest.mark.parametrize("correction", [0.0, 1.0])
def test_spilled_activations_change_nothing(model_type, correction, walk, tiny, tmp_path):
    spec = replace(SPEC, refine_rounds=0, correction=correction)
    held = walk(tiny(model_type), tmp_path / "held", spec)
    one_batch = 2 * 20 * 64 * 4
    for budget in (1, 4 * one_batch * 2):  # everything to disk; about one batch of each stream in memory
        spilled = walk(tiny(model_type), tmp_path / f"spilled-{budget}", spec, budget=budget)
        assert spilled.spilled > 0 and spilled.files == held.files
        assert all(equal_streams(a, b) for a, b in zip(spilled.streams, held.streams, strict=True))
    assert held.spilled == 0


def test_forwards_are_watched_for_parking_until_there_is_room_for_twice_as_much(walk, tiny, tmp_path, monkeypatch):
    made = []

    class Noted(SuspendedForwards):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(ptq.streams, "SuspendedForwards", Noted)

    def watched(name, budget):
        made.clear()
        files = walk(tiny("llama"), tmp_path / name, budget=budget).files
        return [forwards.parking is not None for forwards in made], files

    first_alone, files = watched("room", 1 << 30)
    assert first_alone == [True, True, False, False]  # two streams, two blocks
    most = max(forwards.most_held for forwards in made)
    assert most > 0 and watched("enough", 4 * 2 * most) == (first_alone, files)
    assert watched("too little", 4 * (2 * most - 1)) == ([True] * 4, files)
    assert watched("no limit", None) == ([False] * 4, files)


@pytest.mark.parametrize("bf16", [False, True])
def test_what_is_wide_is_kept_rounded_where_linears_round(bf16, walk, tiny, tmp_path, monkeypatch):
    """In the quantized stream alone, since G reads what the other one delivers after that."""
    kept = []

    class Noted(SuspendedForwards):
        def round(self, i):
            super().round(i)
            run = self._runs[i]
            kept.append((self.inputs.store.name, run.rounded.shape[-1], run.reads.untyped_storage().nbytes()))

    monkeypatch.setattr(ptq.streams, "SuspendedForwards", Noted)
    walk(tiny("llama"), tmp_path / "out", bf16=bf16)
    batches = -(-len(TOKENS) // (BATCH_TOKENS // TOKENS.shape[1]))
    assert kept == bf16 * 2 * batches * [("quantized", 128, 0)]  # two blocks


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("correction", [0.0, 1.0])
def test_resuming_repeats_the_run_bit_by_bit(correction, bf16, walk, tiny, tmp_path):
    walk = partial(walk, bf16=bf16)  # where the processor has no instructions for it, the run is the same or slower
    spec = replace(SPEC, correction=correction)
    folder = tiny("llama", blocks=3)
    whole = walk(folder, tmp_path / "whole", spec)
    assert len(whole.files) == 3
    for stop in (0, 1):
        out = tmp_path / f"stopped-{stop}"
        with pytest.raises(KeyboardInterrupt):
            walk(folder, out, spec, stop_after=stop)
        resumed = walk(folder, out, spec, resume=True, budget=1 if stop else None)
        assert resumed.files == whole.files
        assert all(equal_streams(a, b) for a, b in zip(resumed.streams, whole.streams, strict=True))
        assert resumed.reports == whole.reports
        streams = 2 if correction else 1
        # Finished blocks are only run, unfinished ones are solved; either way once a stream.
        assert set(resumed.rows.values()) == {TOKENS.numel() * streams} and len(resumed.rows) == 3 * 7
        assert len(resumed.fed) == 4 * (3 - stop - 1)


def test_a_missing_block_in_the_middle_is_made_again(walk, tiny, tmp_path):
    folder, out = tiny("llama", blocks=3), tmp_path / "out"
    whole = walk(folder, out)
    for lost in (0, 1):
        path = whole.work.folder / f"block-{lost:05d}.safetensors"
        path.unlink()
        again = walk(folder, out, resume=True)
        assert again.files == whole.files
        assert max(i for i, _ in again.rows) == lost, "blocks after the last missing one are not run"
    nothing = walk(folder, out, resume=True)
    assert not nothing.rows and not nothing.stores and nothing.files == whole.files


def test_activations_that_overflow_are_named(walk, tiny, tmp_path, monkeypatch):
    model = StreamedModel(open_checkpoint(tiny("llama")))
    embed = StreamedModel.embed

    def overflowing(self, tokens):
        hidden, arguments = embed(self, tokens)
        hidden[0, 3] = torch.nan
        return hidden, arguments

    monkeypatch.setattr(StreamedModel, "embed", overflowing)
    with pytest.raises(InputError, match="inputs of model.layers.0.self_attn.q_proj are not finite"):
        walk(tiny("llama"), tmp_path / "out")
    assert model.blocks[0].self_attn.q_proj.weight.is_meta


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_weights_that_no_fp16_scale_reaches_are_named(method, walk, tiny, tmp_path):
    folder = shutil.copytree(tiny("llama"), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = -1e6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="model.layers.1.mlp.up_proj holds a weight of 1e.06; .* fp16"):
        walk(folder, tmp_path / "out", replace(SPEC, bits=4, method=method, refine_rounds=0))


def test_blocks_are_freed(walk, tiny, tmp_path):
    done = walk(tiny("llama"), tmp_path / "out")
    assert all(p.is_meta for p in done.model.model.parameters())


def test_digest_of_a_mirrored_grid():
    values = torch.tensor([[0.0, 1.5], [-0.0, -2.0]])
    assert digest(values) == digest(values.abs() * values.sign()) == digest(values + 0.0)
    assert digest(values) != digest(-values) and digest(values) != digest(values[[1, 0]])
    wide = torch.randn(3, (1 << 20) + 5, generator=torch.Generator().manual_seed(0))  # rows in several steps
    assert digest(wide) == digest(wide.T.contiguous().T) != digest(wide[:2])


@pytest.mark.parametrize(("width", "tokens"), [(64, 2048), (768, 1365), (1024, 1024), (8192, 1024)])
def test_narrow_blocks_take_more_tokens_at_once(tiny, monkeypatch, width, tokens):
    model = StreamedModel(open_checkpoint(tiny("llama")))
    monkeypatch.setattr(model.config, "hidden_size", width)
    assert model.batch_tokens == tokens
