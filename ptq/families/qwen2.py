"""Qwen2 and Qwen2.5: Llama's block with biases on q, k and v."""

from ptq.families.family import Fold, ModelFamily

QWEN2 = ModelFamily(
    name="qwen2",
    model_types=("qwen2",),
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
