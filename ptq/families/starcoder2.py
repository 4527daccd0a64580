"""StarCoder2: Llama's attention and an MLP without gate, biases in all linears, LayerNorms."""

from ptq.families.family import Fold, ModelFamily

STARCODER2 = ModelFamily(
    name="starcoder2",
    model_types=("starcoder2",),
    blocks="model.layers",
    stages=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.c_fc",),
        ("mlp.c_proj",),
    ),
    folds=(
        Fold("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Fold("self_attn.v_proj", ("self_attn.o_proj",), "kv_head"),
        Fold("self_attn.q_proj", ("self_attn.k_proj",), "rotary"),
        Fold("post_attention_layernorm", ("mlp.c_fc",)),
    ),
)
