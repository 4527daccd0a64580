"""GPT-2: q, k, v fused in c_attn; its linears are Conv1D modules, whose weights are (in, out)."""

from ptq.families.family import Fold, ModelFamily

GPT2 = ModelFamily(
    name="gpt2",
    model_types=("gpt2",),
    blocks="transformer.h",
    stages=(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
    transposed=True,
    folds=(
        Fold("ln_1", ("attn.c_attn",)),
        Fold("attn.c_attn", ("attn.c_proj",), "kv_head"),
        Fold("ln_2", ("mlp.c_fc",)),
    ),
)
