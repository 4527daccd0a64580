"""GPT-2: q, k, v fused in c_attn; its linears are Conv1D modules, whose weights are (in, out)."""

from ptq.families.family import ModelFamily

GPT2 = ModelFamily(
    name="gpt2",
    model_types=("gpt2",),
    blocks="transformer.h",
    stages=(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
    transposed=True,
)
