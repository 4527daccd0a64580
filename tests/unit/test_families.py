"""Every family's data against the forward that transformers really runs."""

import pytest
import torch
from tiny_models import TEXT, make_tiny
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from calibration.errors import InputError
from ptq.checkpoint import open_checkpoint
from ptq.families import FAMILIES, family_of

MODEL_TYPES = sorted(FAMILIES)


def run_block_linears(model, blocks):
    """(name, input) of every linear's call, block by block; holding the inputs keeps their identities unique."""
    calls = [[] for _ in blocks]
    for block, seen in zip(blocks, calls, strict=True):
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                module.register_forward_pre_hook(lambda _, args, name=name, seen=seen: seen.append((name, args[0])))
    with torch.no_grad():
        model(torch.arange(2 * 24).reshape(2, 24))
    return calls


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_stages_are_what_the_forward_runs(model_type, tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny(model_type)).eval()
    family = family_of(model.config.to_dict())
    blocks = model.get_submodule(family.blocks)
    assert len(blocks) == 2
    for calls in run_block_linears(model, blocks):
        # Equal lists: every linear is covered, runs once, and in the stated order.
        assert [name for name, _ in calls] == list(family.linears)
        inputs = dict(calls)
        firsts = [inputs[stage[0]] for stage in family.stages]
        for stage, first in zip(family.stages, firsts, strict=True):
            assert all(inputs[name] is first for name in stage)
            assert first.shape[-1] % 32 == 0
        assert len({first.data_ptr() for first in firsts}) == len(firsts), "two stages read one tensor: merge them"


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_tiny_model_is_a_usable_folder(model_type, tiny, tmp_path):
    folder = tiny(model_type)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, parameter in model.named_parameters():
        assert parameter.numel() == 1 or parameter.std() > 0.01, f"{name} is constant"
    assert (folder / "generation_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT and max(ids) < model.config.vocab_size and len(ids) < len(TEXT) / 2
    again = make_tiny(model_type, tmp_path)
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_tiny_model_variants(tmp_path, tiny):
    assert AutoModelForCausalLM.from_pretrained(tiny("gpt_neox")).config.use_parallel_residual
    assert AutoModelForCausalLM.from_pretrained(tiny("gpt_bigcode")).config.num_key_value_heads == 1
    gemma = AutoModelForCausalLM.from_pretrained(tiny("gemma3_text")).config
    assert gemma.layer_types == ["sliding_attention", "full_attention"] and gemma.sliding_window < 24
    half = open_checkpoint(make_tiny("llama", tmp_path, dtype="bfloat16", blocks=3, shards=2, tie=True))
    assert len(half.shards) >= 2 and {half.dtype(name) for name in half.names()} == {"BF16"}
    assert "lm_head.weight" not in half.names() and "model.layers.2.mlp.up_proj.weight" in half.names()


def test_unknown_model_type_lists_the_known_ones():
    with pytest.raises(InputError, match="'bloom' is not a known family; known: apertus, .*gpt_bigcode, .*starcoder2$"):
        family_of({"model_type": "bloom"})
    with pytest.raises(InputError, match=r"\['llama'\] is not a known family"):
        family_of({"model_type": ["llama"]})


def test_config_without_model_type():
    with pytest.raises(InputError, match="no model_type; known: apertus, .*starcoder2$"):
        family_of({"hidden_size": 64})
