"""Gemma 2 and the text model of Gemma 3: Llama's linears, a norm on both sides of each half, and norms of 1 + weight.

Blocks alternate between a sliding window and full attention, so masks (and in Gemma 3 rotary tables) differ by block.
"""

from ptq.families.family import Fold, ModelFamily

GEMMA = ModelFamily(
    name="gemma",
    model_types=("gemma2", "gemma3_text"),
    blocks="model.layers",
    stages=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
    folds=(
        Fold("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Fold("self_attn.v_proj", ("self_attn.o_proj",), "kv_head"),
        Fold("pre_feedforward_layernorm", ("mlp.up_proj", "mlp.gate_proj")),
        Fold("mlp.up_proj", ("mlp.down_proj",)),
    ),
    norm_offset=1.0,
)
