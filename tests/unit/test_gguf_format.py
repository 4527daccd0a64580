"""Rows that do not fill a type's blocks get a narrower type, and it is said of which tensors."""

from types import SimpleNamespace

import pytest

from calibration.errors import InputError
from ptq import QuantSpec
from ptq.formats.gguf import GgufFormat
from ptq.mixture.assignment import fitting
from ptq.mixture.mixture import Mixture

# Rows of babyllama and of OpenLLaMA-3B: of 256, 128, 64 and 32 the first is a multiple of the last alone, the others of
# 128 and of 64.
BABYLLAMA, OPEN_LLAMA_WIDTH, OPEN_LLAMA_HIDDEN = 352, 3200, 8640


@pytest.mark.parametrize(
    ("name", "types"),
    [
        ("Q2_K", ("IQ4_NL", "Q2_0", "Q2_0")),
        ("TQ2_0", ("IQ4_NL", "Q2_0", "Q2_0")),
        ("Q1_0", ("IQ4_NL", "Q1_0", "Q2_0")),
        ("Q3_K", ("IQ4_NL", "IQ4_NL", "IQ4_NL")),
        ("IQ4_XS", ("IQ4_NL", "IQ4_NL", "IQ4_NL")),
        ("Q4_K", ("Q5_0", "Q5_0", "Q5_0")),
        ("Q5_K", ("Q5_1", "Q5_1", "Q5_1")),
        ("Q6_K", ("Q8_0", "Q8_0", "Q8_0")),
        ("Q4_0", ("Q4_0", "Q4_0", "Q4_0")),
        ("Q2_0", ("IQ4_NL", "Q2_0", "Q2_0")),
    ],
)
def test_the_nearest_type_with_blocks_that_fit(name, types):
    assert tuple(fitting(name, inputs) for inputs in (BABYLLAMA, OPEN_LLAMA_WIDTH, OPEN_LLAMA_HIDDEN)) == types
    assert fitting(name, 768) == name
    with pytest.raises(InputError, match=f"rows of 48 weights do not fill the blocks of {name}"):
        fitting(name, 48)


def test_it_is_said_of_which_tensors():
    linears = {f"model.layers.{i}.mlp.{name}": (8, inputs) for i in range(2)
               for name, inputs in (("up_proj", 3200), ("gate_proj", 3200), ("down_proj", 8640))}  # fmt: skip
    shapes = {"model.embed_tokens.weight": (100, 3200), "lm_head.weight": (100, 3200)}
    embedding, head = shapes
    model = SimpleNamespace(checkpoint=SimpleNamespace(shape=shapes.get), embedding_key=embedding, head_key=head)
    kind = GgufFormat(QuantSpec(checkpoint_format="gguf", ggml_type="Q1_0", head_type="F16"))
    kind.mixture = Mixture(model, kind.spec, linears)
    assert kind.notes(model, linears) == [
        "Q2_0 instead of Q1_0, whose blocks of 128 do not divide rows of 8640: model.layers.*.mlp.down_proj",
        "Q8_0 instead of Q6_K, whose blocks of 256 do not divide rows of 3200: model.embed_tokens.weight",
    ]
