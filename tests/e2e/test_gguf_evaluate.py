"""`ptq.evaluate FILE.gguf`: the file alone, measured block by block."""

import json

import numpy as np
import pytest
import torch
from commands import token_file
from damage import refused
from tiny_models import TEXT, make_tiny
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ptq import evaluate
from ptq.checkpoint import open_checkpoint
from ptq.export.gguf.writer import write_gguf
from ptq.families.gguf import BY_MODEL_TYPE
from ptq.load import load_model


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def export(folder, model_type, float_type="F32"):
    source = make_tiny(model_type, folder / "source")
    config, tokenizer = AutoConfig.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    path = folder / "tiny.gguf"
    write_gguf(path, open_checkpoint(source), {}, config=config, tokenizer=tokenizer, float_type=float_type)
    return source, path


def measured(capsys, *arguments):
    capsys.readouterr()
    evaluate.main([*map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("model_type", BY_MODEL_TYPE)
def test_it_is_the_perplexity_of_hugging_face(folder, capsys, model_type):
    source, path = export(folder, model_type)
    windows = token_file(folder / "h.npy", 3, 40)
    result = measured(capsys, path, "--text", windows)
    tokens = torch.from_numpy(np.load(windows))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits[:, :-1]
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert result["nll"] == pytest.approx(float(nll), rel=1e-5)


def test_text_is_tokenised_by_the_file_and_the_source_is_not_needed(folder, capsys):
    source, path = export(folder, "llama")
    (folder / "text.txt").write_text(TEXT * 3)
    arguments = ("--text", folder / "text.txt", "--seqlen", 64)
    expected = measured(capsys, source, *arguments)
    source.rename(folder / "elsewhere")
    assert measured(capsys, path, *arguments) == expected


def test_mistakes_are_one_line(folder, capsys):
    _, path = export(folder, "llama")
    windows = token_file(folder / "h.npy", 2, 16)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(capsys, evaluate, [path, "--text", windows], "tiny.gguf", "outside its place")
    path.write_bytes(whole.replace(b"llama.block_count", b"llama.block_cound"))
    refused(capsys, evaluate, [path, "--text", windows], "llama.block_count is None")
    path.write_bytes(whole.replace(b"blk.1.ffn_down.", b"blk.7.ffn_down."))
    refused(capsys, evaluate, [path, "--text", windows], "block 1 is not there")
    path.write_bytes(whole.replace(b"blk.1.ffn_up", b"blk.7.ffn_up"))
    refused(capsys, evaluate, [path, "--text", windows], "lacks", "layers.1.mlp.up_proj.weight")
    path.write_bytes(whole.replace(b"\x05\x00\x00\x00\x00\x00\x00\x00llama", b"\x05\x00\x00\x00\x00\x00\x00\x00mamba"))
    refused(capsys, evaluate, [path, "--text", windows], "architecture 'mamba'")
    path.write_bytes(b"not a model")
    refused(capsys, evaluate, [path, "--text", windows], "another magic number")
    refused(capsys, evaluate, [folder / "absent.gguf", "--text", windows], "absent.gguf")


def test_the_whole_model_runs_too(folder, capsys):
    """What generation and tasks load; the tokenizer brings the chat template along."""
    _, path = export(folder, "llama")
    loaded = load_model(path, device="cpu")
    tokens = torch.arange(2, 12)[None]
    with torch.no_grad():
        logits = loaded.model(tokens).logits
    source = AutoModelForCausalLM.from_pretrained(folder / "source", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.allclose(logits, source(tokens).logits, rtol=1e-5, atol=1e-5)
    assert loaded.tokenizer("weight").input_ids == AutoTokenizer.from_pretrained(folder / "source")("weight").input_ids
