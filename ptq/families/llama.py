"""Llama, and what has its block: separate q, k, v and a gated MLP behind a norm each."""

from ptq.families.family import Fold, ModelFamily

LLAMA = ModelFamily(
    name="llama",
    model_types=("llama", "mistral", "granite", "smollm3", "seed_oss", "cwm"),
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
        Fold("self_attn.q_proj", ("self_attn.k_proj",), "rotary"),
        Fold("post_attention_layernorm", ("mlp.up_proj", "mlp.gate_proj")),
        Fold("mlp.up_proj", ("mlp.down_proj",)),
    ),
)
