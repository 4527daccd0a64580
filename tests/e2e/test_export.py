"""`python -m ptq.export`: GPTQ folders as GGUF files, value for value."""

import importlib

import pytest
import torch
from commands import token_file
from damage import refused
from llama_client import open_llama
from test_gguf_quantize import types_of
from tiny_models import make_tiny

from ptq import QuantSpec, quantize, quantize_model
from ptq.reload import open_weights

export = importlib.import_module("ptq.export.__main__")
CELLS = {  # what holds it, spec
    "Q1_0": {"bits": 1, "group_size": 128},
    "Q2_0": {"bits": 2, "group_size": 64},
    "Q4_0": {"bits": 4, "group_size": 32},
    "Q4_1": {"bits": 4, "group_size": 64, "sym": False},
    "Q8_0": {"bits": 8, "group_size": -1},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    token_file(tmp_path / "c.npy", 4, 48)
    return tmp_path


def packed(folder, source, out="packed", **spec):
    quantize_model(source, QuantSpec(refine_rounds=1, **spec), out=out, calibration="c.npy", heldout="none")
    return folder / out


def wide(folder):
    """Inputs of 128 and 256."""
    return make_tiny("llama", folder / "source", hidden_size=128, intermediate_size=256)


@pytest.mark.parametrize("ggml_type", CELLS)
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_values_are_kept(folder, capsys, ggml_type, checkpoint_format):
    source = packed(folder, wide(folder), checkpoint_format=checkpoint_format, **CELLS[ggml_type])
    export.main([str(source), "--format", "gguf", "--out", "out.gguf"])
    assert f"14 tensors {ggml_type}" in capsys.readouterr().out
    ours, theirs = open_weights(source), open_weights("out.gguf")
    for name in theirs.names():
        (expected,), (values,) = ours.read([name]).values(), theirs.read([name]).values()
        if ggml_type == "Q4_1" and "proj" in name:
            # m = -s * zero is rounded to fp16: half a unit in its last place, at most 2**-11 of 15 steps.
            assert float((values - expected).abs().max()) <= 15 * 2**-11 * float(expected.abs().max())
        elif "proj" in name or "norm" in name:
            assert torch.equal(values, expected.float()), name
        else:
            assert torch.equal(values, expected.half().float()), name
    assert open_llama("out.gguf", n_ctx=64).logits(list(range(9))).shape == (9, 300)


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_bigcode", "gpt_neox", "phi3", "qwen2"])
def test_other_layouts(folder, model_type):
    source = packed(folder, make_tiny(model_type, folder / "source"), bits=4, group_size=32)
    export.main([str(source), "--out", "out.gguf"])
    ours, theirs = open_weights(source), open_weights("out.gguf")
    for name in theirs.names():
        if name in ours.names() and len(ours.shape(name)) == 2 and name.endswith("proj.weight"):
            assert torch.equal(theirs.read([name])[name], ours.read([name])[name].float())
    assert "Q4_0" in types_of("out.gguf").values()
    assert open_llama("out.gguf", n_ctx=64).logits(list(range(9))).shape == (9, 300)


@pytest.mark.parametrize("ggml_type", [None, "TQ1_0", "TQ2_0", "Q2_0"])
def test_three_values_in_each_type_that_holds_them(folder, capsys, ggml_type):
    source = make_tiny("llama", folder / "source", hidden_size=256, intermediate_size=512)
    source = packed(folder, source, bits=1.58, group_size=256)
    export.main([str(source), "--out", "out.gguf", *(["--type", ggml_type] if ggml_type else [])])
    assert f"14 tensors {ggml_type or 'TQ1_0'}" in capsys.readouterr().out
    ours, theirs = open_weights(source), open_weights("out.gguf")
    for linear in ours.linears:
        (expected,), (values,) = (weights.read([f"{linear}.weight"]).values() for weights in (ours, theirs))
        assert torch.equal(values, expected), linear
    assert open_llama("out.gguf", n_ctx=64).logits(list(range(9))).shape == (9, 300)


def test_full_precision(folder):
    source = make_tiny("llama", folder / "source")
    export.main([str(source), "--type", "f32", "--out", "out.gguf"])
    ours, theirs = open_weights(source), open_weights("out.gguf")
    for name in theirs.names():
        assert torch.equal(theirs.read([name])[name], ours.read([name])[name].float())


def test_embedding_of_a_type(folder):
    export.main([str(packed(folder, wide(folder), bits=4, group_size=32)), "--embed-type", "q8_0", "--out", "out.gguf"])
    assert types_of("out.gguf")["token_embd.weight"] == "Q8_0"


def test_what_does_not_fit_is_one_line_and_no_file(folder, capsys):
    source = wide(folder)
    asym = packed(folder, source, bits=2, group_size=64, sym=False)
    ragged = packed(folder, source, out="ragged", bits=4, group_size=48)
    again = "python -m ptq.quantize --model ORIGINAL --format gguf --type"  # made by a call, not by a command
    refused(capsys, export, [asym, "--type", "Q2_0"], "mlp.down_proj", "Q2_0", f"{again} Q2_K --out packed-q2_k")
    refused(capsys, export, [ragged], "mlp.down_proj", "groups of 48", f"{again} Q4_K --out ragged-q4_k")
    again = again.replace("ORIGINAL", str(source))
    refused(capsys, export, [source, "--type", "Q2_K"], f"{again} Q2_K")
    refused(capsys, export, [folder / "nothing"], "nothing")
    for kind in ("Q9_K", "IQ1_S"):
        refused(capsys, export, [ragged, "--embed-type", kind], f"--embed-type '{kind}' is not one of")
    (folder / "there.gguf").write_bytes(b"mine")
    refused(capsys, export, [source, "--out", "there.gguf"], "exists already")
    assert (folder / "there.gguf").read_bytes() == b"mine"


def test_the_advice_is_a_command_that_works(folder, capsys):
    """The folder's own command with another grid: model, text and seed stay."""
    wide(folder)
    given = "--model source --bits 2 --group=64 --asym --calibration c.npy --heldout none --seed 3 --out packed"
    quantize.main(given.split())
    with pytest.raises(SystemExit):
        export.main(["packed", "--format", "gguf", "--type", "Q2_0"])
    advice = capsys.readouterr().err.strip().rpartition("grid: ")[2]
    flags = "--model source --calibration c.npy --heldout none --seed 3 --format gguf --type Q2_K --out packed-q2_k"
    assert advice == f"python -m ptq.quantize {flags}"
    quantize.main(flags.split())
    printed = capsys.readouterr().out
    assert "Q2_0 instead of Q2_K, whose blocks of 256 do not divide rows of 128: " in printed
    assert "model.layers.*.self_attn.q_proj" in printed and "down_proj" not in printed
    both = "model.embed_tokens.weight, lm_head.weight"
    assert f"Q8_0 instead of Q6_K, whose blocks of 256 do not divide rows of 128: {both}" in printed
