"""OPT: separate q, k, v and a plain MLP; fc1 and fc2 see tokens flattened to (batch * tokens, width)."""

from ptq.families.family import Fold, ModelFamily

OPT = ModelFamily(
    name="opt",
    model_types=("opt",),
    blocks="model.decoder.layers",
    stages=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.out_proj",),
        ("fc1",),
        ("fc2",),
    ),
    folds=(
        Fold("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Fold("self_attn.v_proj", ("self_attn.out_proj",), "kv_head"),
        Fold("self_attn.q_proj", ("self_attn.k_proj",), "query_key"),
        Fold("final_layer_norm", ("fc1",)),
    ),
)
