"""Nemotron (dense), Arcee and Apertus: Llama's attention, and an MLP without gate.

Nemotron rotates half of each head, and its LayerNorms multiply by 1 + weight; Apertus has norms on q and k.
"""

from ptq.families.family import Fold, ModelFamily
from ptq.families.parts import NORM_TO_QKV, NORM_TO_UNGATED, QKV, ROTARY, UNGATED, VALUES

NEMOTRON = ModelFamily(
    name="nemotron",
    model_types=("nemotron",),
    blocks="model.layers",
    stages=UNGATED,
    folds=(NORM_TO_QKV, VALUES, NORM_TO_UNGATED),
    norm_offset=1.0,
)
ARCEE = ModelFamily(
    name="arcee",
    model_types=("arcee",),
    blocks="model.layers",
    stages=UNGATED,
    folds=(NORM_TO_QKV, VALUES, ROTARY, NORM_TO_UNGATED),
)
APERTUS = ModelFamily(
    name="apertus",
    model_types=("apertus",),
    blocks="model.layers",
    stages=UNGATED,
    folds=(Fold("attention_layernorm", QKV), VALUES, Fold("feedforward_layernorm", ("mlp.up_proj",))),
)
