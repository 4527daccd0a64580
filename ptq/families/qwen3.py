"""Qwen3 (dense): Llama's block with a norm on every head's q and k, and heads wider than hidden / heads."""

from ptq.families.family import Fold, ModelFamily

QWEN3 = ModelFamily(
    name="qwen3",
    model_types=("qwen3",),
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
        Fold("post_attention_layernorm", ("mlp.up_proj", "mlp.gate_proj")),
        Fold("mlp.up_proj", ("mlp.down_proj",)),
    ),
)
