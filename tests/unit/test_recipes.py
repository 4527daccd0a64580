"""llama.cpp's named mixes: how many tensors of each type, as its loader prints them."""

from collections import Counter

import pytest
from transformers import AutoConfig

from ptq.mixture.assignment import candidates, fitting, recipe_types
from ptq.mixture.recipes import HEAD, RECIPES

# Of files of Llama 2 7B: 226 matrices, 32 blocks of 7, the embedding and the head.
PRINTED = {
    "Q3_K_S": {"Q3_K": 225, "Q6_K": 1},
    "Q3_K_M": {"Q3_K": 129, "Q4_K": 92, "Q5_K": 4, "Q6_K": 1},
    "Q3_K_L": {"Q3_K": 129, "Q5_K": 96, "Q6_K": 1},
    "Q4_K_S": {"Q4_K": 217, "Q5_K": 8, "Q6_K": 1},
    "Q4_K_M": {"Q4_K": 193, "Q6_K": 33},
    "Q5_K_S": {"Q5_K": 225, "Q6_K": 1},
    "Q5_K_M": {"Q5_K": 193, "Q6_K": 33},
}
LINEARS = [
    f"model.layers.{i}.{name}_proj"
    for i in range(32)
    for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
]


def types(name, **config):
    return recipe_types(RECIPES[name], AutoConfig.for_model("llama", num_hidden_layers=32, **config), LINEARS)


@pytest.mark.parametrize("name", PRINTED)
def test_counts_of_llama_2(name):
    found = Counter(types(name).values())
    found.update([RECIPES[name].ggml_type, HEAD])
    assert found == PRINTED[name]


def test_shared_heads_get_more():
    alone, shared = (types("Q2_K_S", num_attention_heads=32, num_key_value_heads=heads) for heads in (32, 8))
    assert alone["model.layers.9.self_attn.v_proj"] == "Q2_K" and alone["model.layers.3.mlp.down_proj"] == "Q4_K"
    assert shared["model.layers.9.self_attn.v_proj"] == "Q4_K" and shared["model.layers.4.mlp.down_proj"] == "Q2_K"
    both = [types("Q2_K", num_attention_heads=32, num_key_value_heads=heads) for heads in (32, 8)]
    assert [of["model.layers.9.self_attn.v_proj"] for of in both] == ["Q3_K", "Q4_K"]
    assert both[0]["model.layers.9.mlp.down_proj"] == "Q3_K" and both[0]["model.layers.9.mlp.up_proj"] == "Q2_K"


def test_ragged_rows_have_fewer_choices():
    assert fitting("Q2_K", 256) == "Q2_K" and fitting("Q2_K", 320) == "Q2_0" and fitting("Q2_K", 96) == "IQ4_NL"
    assert candidates(96) == ("IQ4_NL", "Q5_0", "Q5_1", "Q8_0")
