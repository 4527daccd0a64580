"""Blocks called from outside their model, halted at every stage, against plain forwards of the same model."""

import gc
import weakref

import pytest
import torch
from greenlet import getcurrent
from test_columns import one_thread  # noqa: F401
from torch import nn
from transformers import AutoModelForCausalLM

from calibration.capture import SuspendedForwards, record_block_inputs, replaced_blocks, run_block
from calibration.products import bf16_products, rounding_once
from ptq.checkpoint import open_checkpoint
from ptq.families import FAMILIES
from ptq.streamed import StreamedModel

MODEL_TYPES = sorted(FAMILIES)
TOKENS = torch.arange(3 * 20).reshape(3, 20) % 290  # longer than Gemma's window of 16
BATCHES = TOKENS.split(2)  # a whole batch and a ragged one


@pytest.fixture
def streamed(tiny):
    return lambda model_type: StreamedModel(open_checkpoint(tiny(model_type)))


def embedded(model):
    """Hidden states entering block 0, and every block's arguments, batch by batch."""
    with model.outside(head=False):
        hidden, arguments = zip(*(model.embed(batch) for batch in BATCHES), strict=True)
    return list(hidden), arguments


def stage_modules(model, i):
    return [[model.linear(i, name) for name in stage] for stage in model.family.stages]


@torch.no_grad()
def plain(model, i, hidden, arguments):
    """Outputs of block i, and what the first linear of each stage reads, batch by batch."""
    reads, outputs = [], []
    for x, of_batch in zip(hidden, arguments, strict=True):
        seen = []
        hooks = [
            stage[0].register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].clone()))
            for stage in stage_modules(model, i)
        ]
        outputs.append(run_block(model.blocks[i], x, of_batch[i]))
        reads.append(seen)
        for hook in hooks:
            hook.remove()
    return outputs, reads


def close_hooks(model):
    return sum(len(module._forward_pre_hooks) for module in model.model.modules())


@pytest.mark.parametrize("parked", [False, True])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
@torch.no_grad()
def test_halting_changes_no_bit(model_type, parked, streamed, tiny, tmp_path):
    """Block by block through the streamed model, the same as the whole model's own forward."""
    model = streamed(model_type)
    hidden, arguments = embedded(model)
    for i in range(len(model.blocks)):
        with model.block(i):
            expected, expected_reads = plain(model, i, hidden, arguments)
            of_block = [a[i] for a in arguments]
            options = {"parking": tmp_path / "parked", "budget": 0} if parked else {}
            with SuspendedForwards(model.blocks[i], hidden, of_block, stage_modules(model, i), **options) as forwards:
                assert len(forwards) == len(BATCHES)
                for s in range(len(model.family.stages)):
                    for b in range(len(BATCHES)):
                        x = forwards.advance(b)
                        assert torch.equal(x, expected_reads[b][s]) and not forwards.done(b)
                        forwards.settle(b)
                    for b in range(len(BATCHES)):
                        assert torch.equal(forwards.reads(b), expected_reads[b][s])
                        forwards.settle(b)
                    made = not torch.equal(expected_reads[0][s], hidden[0])  # OLMo 2 begins with linears
                    assert (parked and made) == any((tmp_path / "parked").glob("*"))
                hidden = [forwards.advance(b) for b in range(len(BATCHES))]
                assert all(forwards.done(b) for b in range(len(BATCHES)))
            assert not (tmp_path / "parked").exists()
            assert close_hooks(model) == 0
            assert all(torch.equal(a, b) for a, b in zip(hidden, expected, strict=True))
    whole, last = AutoModelForCausalLM.from_pretrained(tiny(model_type)).eval(), []
    whole.get_submodule(model.family.blocks)[-1].register_forward_hook(lambda _, args, out: last.append(out))
    for batch in BATCHES:
        whole(batch, use_cache=False)
    for ours, theirs in zip(hidden, last, strict=True):
        assert torch.equal(ours, theirs[0] if isinstance(theirs, tuple) else theirs)


@pytest.mark.parametrize("parked", [False, True])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
@torch.no_grad()
def test_what_linears_round_anyway_may_be_kept_rounded(model_type, parked, streamed, tmp_path):
    """In every family nothing but linears reads what is wider than the hidden states."""
    model = streamed(model_type)
    hidden, arguments = embedded(model)
    of_block, stages = [a[0] for a in arguments], stage_modules(model, 0)
    with model.block(0), bf16_products(True), rounding_once([linear for stage in stages for linear in stage]):
        expected, expected_reads = plain(model, 0, hidden, arguments)
        options = {"parking": tmp_path / "parked", "budget": 0} if parked else {}
        with SuspendedForwards(model.blocks[0], hidden, of_block, stages, **options) as forwards:
            kept = False
            for s in range(len(stages)):
                for b in range(len(BATCHES)):
                    x = forwards.advance(b)
                    if x.shape[-1] > hidden[b].shape[-1]:
                        forwards.round(b)
                        assert x.untyped_storage().nbytes() == 0
                        kept = True
                    forwards.settle(b)
                for b in range(len(BATCHES)):
                    assert torch.equal(forwards.reads(b).bfloat16(), expected_reads[b][s].bfloat16())
                    forwards.settle(b)
            assert kept
            found = [forwards.advance(b) for b in range(len(BATCHES))]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("parked", [False, True])
@torch.no_grad()
def test_each_stage_sees_weights_written_before_it_goes_on(streamed, parked, tmp_path):
    """What the walk does: weights of a stage change while its forwards are halted."""
    model = streamed("llama")
    hidden, arguments = embedded(model)
    with model.block(0):
        options = {"parking": tmp_path / "parked", "budget": 0} if parked else {}
        of_block = [a[0] for a in arguments]
        with SuspendedForwards(model.blocks[0], hidden, of_block, stage_modules(model, 0), **options) as forwards:
            for stage in stage_modules(model, 0):
                for b in range(len(BATCHES)):
                    forwards.advance(b)
                    forwards.settle(b)
                for linear in stage:
                    linear.weight.mul_(0.9)
            halted = [forwards.advance(b) for b in range(len(BATCHES))]
        fresh, _ = plain(model, 0, hidden, arguments)
    assert all(torch.equal(a, b) for a, b in zip(halted, fresh, strict=True))


@pytest.mark.parametrize("parked", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "opt"])
@torch.no_grad()
def test_two_sets_through_one_block(model_type, parked, streamed, tmp_path):
    """The two streams of the walk: other inputs, same block, halted in turn."""
    model = streamed(model_type)
    first, arguments = embedded(model)
    second, of_block = [1.5 * x for x in first], [a[0] for a in arguments]
    modules = stage_modules(model, 0)
    with model.block(0):
        expected = [plain(model, 0, hidden, arguments) for hidden in (first, second)]
        options = [{"parking": tmp_path / name, "budget": 0} if parked else {} for name in "ab"]
        with (
            SuspendedForwards(model.blocks[0], first, of_block, modules, **options[0]) as a,
            SuspendedForwards(model.blocks[0], second, of_block, modules, **options[1]) as b,
        ):
            for s in range(len(modules)):
                for batch in range(len(BATCHES)):
                    for forwards, (_, reads) in zip(
                        (b, a) if s % 2 else (a, b), expected[:: -1 if s % 2 else 1], strict=True
                    ):
                        assert torch.equal(forwards.advance(batch), reads[batch][s])
                        forwards.settle(batch)
            for forwards, (outputs, _) in zip((a, b), expected, strict=True):
                for batch in reversed(range(len(BATCHES))):
                    assert torch.equal(forwards.advance(batch), outputs[batch])
    assert close_hooks(model) == 0


@pytest.mark.parametrize("parked", [False, True])
@torch.no_grad()
def test_an_error_half_way_leaves_nothing_behind(streamed, parked, tmp_path):
    model = streamed("llama")
    hidden, arguments = embedded(model)
    with model.block(0):
        options = {"parking": tmp_path / "parked", "budget": 0} if parked else {}
        held = []
        with pytest.raises(RuntimeError, match="disk full"):
            of_block = [a[0] for a in arguments]
            with SuspendedForwards(model.blocks[0], hidden, of_block, stage_modules(model, 0), **options) as forwards:
                for b in range(len(BATCHES)):
                    held.append(weakref.ref(forwards.advance(b)))
                    forwards.settle(b)
                forwards.advance(0)
                raise RuntimeError("disk full")
        del forwards
        gc.collect()
        assert close_hooks(model) == 0 and not (tmp_path / "parked").exists()
        assert all(ref() is None for ref in held), "a halted forward still holds its activations"
        assert getcurrent().parent is None
        outputs, _ = plain(model, 0, hidden, arguments)
        assert all(torch.isfinite(x).all() for x in outputs)


@torch.no_grad()
def test_the_output_of_a_finished_forward_is_the_callers_alone(streamed):
    """Kept here, the outputs of all batches would stay in memory although the store has spilled them."""
    model = streamed("llama")
    hidden, arguments = embedded(model)
    with (
        model.block(0),
        SuspendedForwards(model.blocks[0], hidden, [a[0] for a in arguments], stage_modules(model, 0)) as forwards,
    ):
        for _ in range(len(model.family.stages) + 1):
            out = forwards.advance(0)
        assert forwards.done(0)
        output = weakref.ref(out)
        del out
        assert output() is None


@torch.no_grad()
def test_an_error_inside_a_block_reaches_the_caller(streamed):
    model = streamed("llama")
    hidden, arguments = embedded(model)

    def fail(*_):
        raise RuntimeError("inside")

    with model.block(0):
        hook = model.linear(0, "mlp.down_proj").register_forward_hook(fail)
        with (
            pytest.raises(RuntimeError, match="inside"),
            SuspendedForwards(model.blocks[0], hidden, [a[0] for a in arguments], stage_modules(model, 0)) as forwards,
        ):
            forwards.advance(1)
            for _ in range(5):
                forwards.advance(0)
        hook.remove()
    assert close_hooks(model) == 0 and getcurrent().parent is None


WRONG_STAGES = [
    ("self_attn.q_proj", "self_attn.o_proj"),
    ("self_attn.v_proj", "mlp.gate_proj"),
    ("mlp.up_proj", "mlp.down_proj"),
]


@pytest.mark.parametrize("parked", [False, True])
@pytest.mark.parametrize("wrong", WRONG_STAGES, ids="+".join)
@torch.no_grad()
def test_a_stage_of_linears_that_read_different_tensors_is_an_error(wrong, parked, streamed, tmp_path):
    model = streamed("llama")
    hidden, arguments = embedded(model)
    with model.block(0):
        modules = [[model.linear(0, name) for name in wrong]]
        options = {"parking": tmp_path / "parked", "budget": 0} if parked else {}
        with (
            pytest.raises(AssertionError, match="different tensors: the family is wrong"),
            SuspendedForwards(model.blocks[0], hidden, [a[0] for a in arguments], modules, **options) as forwards,
        ):
            forwards.advance(0)
            forwards.settle(0)
            forwards.advance(0)
    assert close_hooks(model) == 0


class Hoarder(nn.Module):
    """Keeps, across its halts, views of everything that is not its own, and changes an activation in place."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("table", torch.randn(4, 8))
        self.own = []

    def forward(self, hidden, shared):
        views = hidden[:, 1:], shared[1:], self.first.weight[:2], self.table[1:]
        doubled, tripled = hidden * 2, hidden * 3
        self.own.append((doubled, tripled))
        y = self.first(hidden)
        doubled.add_(1)
        z = self.second(y)
        return z + doubled * tripled + sum(view.sum() for view in views)


@torch.no_grad()
def test_parking_takes_a_batchs_own_activations_and_nothing_else(tmp_path):
    torch.manual_seed(0)
    block, shared, hidden = Hoarder(), torch.randn(5, 8), [torch.randn(3, 4, 8) for _ in range(3)]
    expected = [block(x, shared) for x in hidden]
    foreign = [*hidden, shared, *block.parameters(), block.table]
    block.own.clear()
    each = 2 * hidden[0].nbytes  # doubled and tripled, at the first halt

    def parked():
        return len([*tmp_path.glob("*/*")])

    for budget, files in ((0, 3), (each, 2), (2 * each, 1), (3 * each, 0)):
        stages, arguments = [[block.first], [block.second]], [((shared,), {})] * 3
        options = {"parking": tmp_path / "parked", "budget": budget}
        with SuspendedForwards(block, hidden, arguments, stages, **options) as forwards:
            for b in range(3):
                assert forwards.advance(b) is hidden[b]
                forwards.settle(b)
                assert all(x.untyped_storage().nbytes() == x.nbytes for x in foreign)
            assert parked() == files
            emptied = [all(x.untyped_storage().nbytes() == 0 for x in own) for own in block.own]
            assert sum(emptied) == files and any(emptied) == (files > 0)
            for b in range(3):
                forwards.advance(b)
                assert torch.equal(forwards.reads(b), block.first(hidden[b]))
                assert all(x.untyped_storage().nbytes() == x.nbytes for x in block.own[b])
                forwards.settle(b)
            for b in range(3):
                forwards.reads(b)
                assert torch.equal(forwards.advance(b), expected[b])
        assert parked() == 0
        block.own.clear()


class Forgetful(nn.Module):
    """Frees the first linear's input before it makes the second's, of the same size: often at the same address."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, hidden):
        x = hidden + 1
        y = self.first(x)
        del x
        return self.second(y * 2)


@torch.no_grad()
def test_a_stage_is_checked_by_tensor_and_not_by_address():
    torch.manual_seed(0)
    block, hidden = Forgetful(), [torch.randn(2, 16, 64) for _ in range(20)]
    caught = 0
    for x in hidden:
        with SuspendedForwards(block, [x], [((), {})], [[block.first, block.second]]) as forwards:
            forwards.advance(0)
            try:
                forwards.advance(0)
            except AssertionError:
                caught += 1
    assert caught == len(hidden)


def test_record_block_inputs_runs_no_block(streamed):
    model = streamed("gemma3_text")
    calls = []
    untouched = [model.linear(i, name) for i in range(2) for name in model.family.linears] + [model.model.model.norm]
    hooks = [module.register_forward_pre_hook(lambda *_: calls.append(1)) for module in untouched]
    with model.outside(head=False):
        hidden, arguments = model.embed(BATCHES[0])
    assert not calls, "neither a block nor what follows the last one is run"
    assert hidden.shape == (2, 20, 64) and len(arguments) == len(model.blocks) and hidden.device.type == "cpu"
    for hook in hooks:
        hook.remove()
    assert all("forward" not in vars(block) for block in model.blocks)
    (_, sliding), (_, full) = arguments
    assert sliding["attention_mask"] is not None  # longer than the window
    assert full["attention_mask"] is None or not torch.equal(sliding["attention_mask"], full["attention_mask"])


def test_blocks_get_their_forward_back_after_an_error(streamed):
    model = streamed("llama")

    def fail(*_, **__):
        raise RuntimeError("tokenizer and model disagree")

    with pytest.raises(RuntimeError, match="disagree"):
        record_block_inputs(fail, model.blocks)
    with pytest.raises(RuntimeError), replaced_blocks(model.blocks, [fail] * len(model.blocks)):
        model.blocks[0](torch.zeros(1))
    assert all("forward" not in vars(block) for block in model.blocks)


def test_run_block_takes_the_hidden_states_of_every_sample():
    """Current blocks return a tensor, older ones a tuple; `[0]` on a tensor would keep the first sample only."""

    class Block(nn.Module):
        def __init__(self, wrap):
            super().__init__()
            self.wrap = wrap

        def forward(self, hidden, shift, *, factor):
            out = factor * hidden + shift
            return (out, "cache") if self.wrap else out

    x = torch.ones(3, 2, 4)
    for wrap in (False, True):
        assert torch.equal(run_block(Block(wrap), x, ((1,), {"factor": 2})), 3 * x)
