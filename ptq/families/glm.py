"""GLM-4 (dense): separate q, k, v; gate and up fused into one linear. Model type "glm" is of 2024, "glm4" of 2025."""

from ptq.families.family import Fold, ModelFamily

GLM = ModelFamily(
    name="glm",
    model_types=("glm", "glm4"),
    blocks="model.layers",
    stages=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_up_proj",),
        ("mlp.down_proj",),
    ),
    folds=(
        Fold("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Fold("self_attn.v_proj", ("self_attn.o_proj",), "kv_head"),
        Fold("post_attention_layernorm", ("mlp.gate_up_proj",)),
        Fold("mlp.gate_up_proj", ("mlp.down_proj",)),
    ),
)
