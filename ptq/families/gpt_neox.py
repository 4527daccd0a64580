"""GPT-NeoX and Pythia: q, k, v fused; attention and MLP run side by side, each behind its own norm.

The two halves therefore never share a tensor and stay separate stages, with or without the parallel residual.
"""

from ptq.families.family import Fold, ModelFamily

GPT_NEOX = ModelFamily(
    name="gpt_neox",
    model_types=("gpt_neox",),
    blocks="gpt_neox.layers",
    stages=(
        ("attention.query_key_value",),
        ("attention.dense",),
        ("mlp.dense_h_to_4h",),
        ("mlp.dense_4h_to_h",),
    ),
    renamed=(("lm_head.", "embed_out."),),
    folds=(
        Fold("input_layernorm", ("attention.query_key_value",)),
        Fold("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
    ),
)
