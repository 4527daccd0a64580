"""GLM-4 (dense): separate q, k, v; gate and up fused into one linear. Model type "glm" is of 2024, "glm4" of 2025."""

from ptq.families.family import Fold, ModelFamily
from ptq.families.parts import ATTENTION, DOWN, NORM_TO_QKV, VALUES

GLM = ModelFamily(
    name="glm",
    model_types=("glm", "glm4"),
    blocks="model.layers",
    stages=(*ATTENTION, ("mlp.gate_up_proj",), DOWN),
    folds=(
        NORM_TO_QKV,
        VALUES,
        Fold("post_attention_layernorm", ("mlp.gate_up_proj",)),
        Fold("mlp.gate_up_proj", DOWN),
    ),
)
