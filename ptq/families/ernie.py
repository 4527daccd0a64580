"""ERNIE 4.5 (dense) and Helium: Llama's block, but queries and keys are rotated in pairs of neighbours."""

from ptq.families.family import Fold, ModelFamily

ERNIE = ModelFamily(
    name="ernie",
    model_types=("ernie4_5", "helium"),
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
