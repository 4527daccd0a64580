"""GPTBigCode (StarCoder, SantaCoder): q, k, v fused in c_attn, one key-value head, LayerNorm and biases."""

from ptq.families.family import Fold, ModelFamily

GPT_BIGCODE = ModelFamily(
    name="gpt_bigcode",
    model_types=("gpt_bigcode",),
    blocks="transformer.h",
    stages=(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
    folds=(
        Fold("ln_1", ("attn.c_attn",)),
        Fold("attn.c_attn", ("attn.c_proj",), "kv_head"),
        Fold("ln_2", ("mlp.c_fc",)),
    ),
)
