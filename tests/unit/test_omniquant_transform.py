"""Folds of scales and shifts into neighbouring weights, through the blocks that transformers really runs."""

import pytest
import torch
from tiny_models import make_tiny

from calibration.capture import run_block
from calibration.errors import InputError
from ptq.checkpoint import open_checkpoint
from ptq.families import FAMILIES
from ptq.families.family import Fold
from ptq.quantizers.omniquant.transform import SMALLEST, Heads, Transformation
from ptq.streamed import StreamedModel

TOLERANCE = 1e-5  # of what the block adds; fp32 keeps 6e-8, over some hundred products and sums 5e-7 is seen
MODEL_TYPES = sorted(FAMILIES)


class Block:
    """The first block of a tiny model, a batch of its inputs, and what it makes of them."""

    def __init__(self, model_type, folder):
        self.model = StreamedModel(open_checkpoint(make_tiny(model_type, folder)))
        self.family, config = self.model.family, self.model.config
        with self.model.outside(head=False):
            self.hidden, arguments = self.model.embed(torch.arange(2 * 24).reshape(2, 24) * 5 % 290)
        self.arguments = arguments[0]
        query = config.num_attention_heads
        self.heads = Heads(query, getattr(config, "num_key_value_heads", None) or query)
        self.loaded = self.model.block(0)
        self.block = self.loaded.__enter__()

    def transformation(self, folds=None, **options):
        options = {"transposed": self.family.transposed, "norm_offset": self.family.norm_offset, **options}
        return Transformation(self.block, self.family.folds if folds is None else folds, self.heads, **options)

    def error(self, changed):
        """Of a block with some parameters changed, as a share of what the block adds."""
        weights = {n: p.T if self.family.transposed and p.dim() == 2 else p for n, p in changed.items()}
        plain = self.run({})
        return float((self.run(weights) - plain).norm() / (plain - self.hidden).norm())

    @torch.no_grad()
    def run(self, weights):
        return run_block(self.block, self.hidden, self.arguments, {n: w.float() for n, w in weights.items()})


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    made = {}

    def get(model_type) -> Block:
        if model_type not in made:
            made[model_type] = Block(model_type, tmp_path_factory.mktemp(model_type))
        return made[model_type]

    yield get
    for block in made.values():
        block.loaded.__exit__(None, None, None)


@torch.no_grad()
def shake(transformation, seed=0):
    """Random scales in [1/2, 2] and shifts everywhere."""
    generator = torch.Generator().manual_seed(seed)
    for pair in transformation.pairs:
        pair.scale.copy_(2 ** (2 * torch.rand(pair.channels, generator=generator) - 1))
        if pair.shift is not None:
            pair.shift.copy_(torch.randn(pair.channels, generator=generator))


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_fold_leaves_the_block_unchanged(model_type, shift, blocks):
    block = blocks(model_type)
    for fold in block.family.folds:
        one = block.transformation([fold], shift=shift)
        shake(one)
        changed = one.fold()
        assert block.error(changed) < TOLERANCE, fold
        touched = {f"{name}.weight" for name in (fold.source, *fold.readers)}
        assert touched <= set(changed) and all(not torch.equal(changed[n], one.plain[n]) for n in touched)
    together = block.transformation(shift=shift)
    shake(together)
    assert block.error(together.fold()) < TOLERANCE
    together.prove(block.hidden, block.arguments, "block 0")


def test_shifts_are_learned_where_biases_can_hold_them(blocks):
    shifted = {t: [p.shift is not None for p in blocks(t).transformation(shift=True).pairs] for t in MODEL_TYPES}
    assert shifted["opt"] == [True, True, False, True]  # not between queries and keys
    assert shifted["gpt2"] == [True] * 3 and not any(shifted["llama"]) and not any(shifted["qwen2"])


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_under_rotary_embeddings_untied_scales_change_the_block(model_type, blocks):
    block = blocks(model_type)
    rotary = next(fold for fold in block.family.folds if fold.ties == "rotary")
    free = block.transformation([Fold(rotary.source, rotary.readers, "query_key")])
    shake(free)
    assert block.error(free.fold()) > 1e-3
    with pytest.raises(InputError, match="block 7: folding a scale between self_attn.q_proj and self_attn.k_proj"):
        free.prove(block.hidden, block.arguments, "block 7")
    assert bool((free.pairs[0].scale > 0.4).all()), "a failed proof leaves the learned values"


def test_a_value_scale_per_query_head_is_refused_under_shared_heads(blocks):
    block = blocks("llama")
    with pytest.raises(RuntimeError):  # 64 channels read, 32 made
        shake(wrong := block.transformation([Fold("self_attn.v_proj", ("self_attn.o_proj",))]))
        wrong.fold()


def test_half_precision_norms_stand_for_the_scale_that_readers_get(blocks):
    """bf16 keeps 8 bits: norms divided by any scale are rounded by up to 2^-9, yet the block stays exact."""
    for model_type in ("llama", "gemma2"):
        block = blocks(model_type)
        norms = [fold for fold in block.family.folds if "norm" in fold.source]
        half = block.transformation(norms, stored=lambda name: torch.bfloat16)
        for p in half.plain.values():  # as read from a bf16 file
            if p.dim() == 1:
                p.copy_(p.bfloat16())
        shake(half)
        changed = half.fold(stored=True)
        stored = [changed[f"{fold.source}.weight"] for fold in norms]
        assert all(p.dtype == torch.bfloat16 for p in stored)
        assert block.error(changed) < TOLERANCE
        naive = half.fold() | {f"{fold.source}.weight": p for fold, p in zip(norms, stored, strict=True)}
        assert block.error(naive) > 1e-4


def test_a_norm_weight_that_would_vanish_keeps_its_size(blocks):
    block = blocks("gemma2")
    norm = block.family.folds[0]
    one = block.transformation([norm], stored=lambda name: torch.bfloat16)
    shake(one)
    with torch.no_grad():
        one.plain[f"{norm.source}.weight"].copy_(one.plain[f"{norm.source}.weight"].bfloat16())
        one.pairs[0].scale[3] = 1e9  # (1 + w) / s - 1 is -1 in bf16
    assert block.error(one.fold(stored=True)) < TOLERANCE


def test_scales_start_between_activations_and_weights(blocks):
    block = blocks("llama")
    made = block.transformation()
    low = {fold.readers[0]: -torch.arange(1.0, 129) for fold in block.family.folds}
    ranges = {name: (x[: made.plain[f"{name}.weight"].shape[1]], x[: made.plain[f"{name}.weight"].shape[1]] / -2)
              for name, x in low.items()}  # fmt: skip
    made.start(ranges)
    norm, value, rotary, _, up = made.pairs
    W = made.plain["self_attn.q_proj.weight"]
    assert torch.allclose(norm.scale, torch.arange(1.0, 65) ** 0.5 / W.abs().amax(0) ** 0.5)
    # 4 query heads share 2 value heads of 16 channels: the larger activation of channels 0..15 and 16..31 counts.
    o = made.plain["self_attn.o_proj.weight"].abs().amax(0)
    shared = torch.maximum(o[:16], o[16:32])
    assert torch.allclose(value.scale[:16], torch.arange(17.0, 33) ** 0.5 / shared**0.5)
    assert bool((rotary.scale == 1).all()) and rotary.channels == 16 and up.channels == 128
    assert block.error(made.fold()) < TOLERANCE
    with torch.no_grad():
        up.scale[5] = -3
    made.limit()
    assert up.scale[5] == SMALLEST
