"""The small GPTBigCode that notebooks run on: whole or not at all, the real architecture, the real tokenizer."""

import json

import pytest
from transformers import AutoTokenizer

from ptq.demo import bigcode
from ptq.load import load_model


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bigcode, "ROWS", 1)
    monkeypatch.setattr(bigcode, "WARMUP", 1)


def test_it_is_made_once_and_learns(small, tmp_path):
    folder = bigcode.make_bigcode(tmp_path / "in/side/model", steps=2)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "gpt_bigcode" and config["multi_query"] and config["vocab_size"] == 4096
    assert [file.name for file in folder.parent.iterdir()] == ["model"]
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert bigcode.make_bigcode(folder, steps=9) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_with_the_real_tokenizer(small, tmp_path, shared):
    words = shared / "tokenizers/starcoder"
    folder = bigcode.make_bigcode(tmp_path / "model", tokenizer=words, steps=1)
    loaded = load_model(folder)
    assert loaded.model.config.vocab_size == 49152
    text = "def f(x):\n    return x"
    assert loaded.tokenizer(text).input_ids == AutoTokenizer.from_pretrained(words)(text).input_ids


def test_a_failure_leaves_nothing(small, tmp_path, monkeypatch):
    monkeypatch.setattr(bigcode, "_train", lambda *_: pytest.fail("stop"))
    with pytest.raises(pytest.fail.Exception):
        bigcode.make_bigcode(tmp_path / "out/model", steps=1)
    assert not (tmp_path / "out").exists()
