"""Phi-3: Llama's block with q, k, v fused into one linear and gate, up into another."""

from ptq.families.family import Fold, ModelFamily

PHI3 = ModelFamily(
    name="phi3",
    model_types=("phi3",),
    blocks="model.layers",
    stages=(("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
    folds=(
        Fold("input_layernorm", ("self_attn.qkv_proj",)),
        Fold("self_attn.qkv_proj", ("self_attn.o_proj",), "kv_head"),
        Fold("post_attention_layernorm", ("mlp.gate_up_proj",)),
        Fold("mlp.gate_up_proj", ("mlp.down_proj",)),
    ),
)
