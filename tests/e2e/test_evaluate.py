"""ptq.evaluate by protocol: what is printed, against a reference model, and what is refused."""

import json
import math
import shutil

import pytest
from commands import token_file
from damage import edit_json, edit_tensors, refused
from tiny_models import TEXT, make_tiny
from transformers import AutoTokenizer

from ptq import evaluate, quantize


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A model, and `w8` and `w2`: the same quantized."""
    folder = tmp_path_factory.mktemp("pristine")
    make_tiny("llama", folder / "model")
    tokens = token_file(folder / "c.npy", 4, 32)
    for bits in (2, 8):
        flags = f"--bits {bits} --group 32 --model {folder}/model --calibration {tokens} --heldout none"
        quantize.main([*flags.split(), "--out", f"{folder}/w{bits}"])
    (folder / "text.txt").write_text(TEXT * 20)
    return folder


@pytest.fixture
def here(pristine, tmp_path, monkeypatch):
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def evaluate_json(capsys, flags):
    evaluate.main([*flags.split(), "--text", "text.txt", "--json", "--cache", "cache"])
    return json.loads(capsys.readouterr().out)


def test_each_protocol_counts_its_own_tokens(here, capsys):
    tokens = len(AutoTokenizer.from_pretrained("model")(TEXT * 20).input_ids)
    gptq = evaluate_json(capsys, "model")
    cpp = evaluate_json(capsys, "model --protocol llama.cpp")
    assert (gptq["protocol"], cpp["protocol"]) == ("gptq", "llama.cpp")
    assert gptq["seqlen"] == cpp["seqlen"] == 256  # the model's context is shorter than either protocol's windows
    windows = tokens // 256
    assert gptq["tokens"] == windows * 255 and cpp["tokens"] == windows * 127
    assert 0 < gptq["stderr"] < gptq["perplexity"]
    assert evaluate_json(capsys, "model --protocol llama.cpp --seqlen 64 --max-tokens 640")["tokens"] == 10 * 31


def test_lm_eval_prints_words_and_bytes(here, capsys):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    result = evaluate_json(capsys, "w8 --protocol lm-eval --seqlen 128")
    figures = {score["metric"]: score["value"] for score in result["scores"]}
    assert figures["bits_per_byte"] == pytest.approx(math.log2(figures["byte_perplexity"]))
    assert evaluate_json(capsys, "w8 --protocol lm-eval")["scores"] != result["scores"]  # longer windows, other answers
    evaluate.main("w8 --protocol lm-eval --text text.txt --cache cache".split())
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["wikitext", "word_perplexity"], ["wikitext", "byte_perplexity"], ["wikitext", "bits_per_byte"],
    ]  # fmt: skip


def test_fewer_bits_diverge_further(here, capsys):
    results = [evaluate_json(capsys, f"w{bits} --reference model --seqlen 64") for bits in (8, 2)]
    assert 0 < results[0]["kl"] < 0.01 < results[1]["kl"]
    assert results[0]["same_top"] > results[1]["same_top"]
    assert results[0]["reference"] == results[1]["reference"]
    alone = evaluate_json(capsys, "w2 --seqlen 64")
    # The same logits; log_softmax in fp64 here and in fp32 there: 2^-23 of 10 nats.
    assert results[1]["model"]["nll"] == pytest.approx(alone["nll"], abs=2e-6)
    evaluate.main("w2 --reference model --text text.txt --seqlen 64".split())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["perplexity", "reference", "KL", "same"]


BAD = {
    "model --tasks piqa --reference w8": "--tasks asks questions and takes no --reference",
    "model --tasks piqa --text text.txt": "--tasks asks questions and takes no --text",
    "model --protocol lm-eval --max-tokens 9 --text text.txt": "takes whole documents: no --max-tokens",
    "model --protocol lm-eval --reference w8 --text text.txt": "takes whole documents: no --max-tokens, and no --ref",
    "model --protocol lm-eval --text c.npy": "c.npy: --protocol lm-eval counts words and bytes",
    "model --protocol lm-eval --text text.txt --seqlen 999": "seqlen 999 is longer than the model's context",
    "model --protocol lm-eval --text text.txt --seqlen 0": "--seqlen 0 must be at least 1",
    "model --protocol lm-eval --text gone.txt": "gone.txt: no such file",
    "model --protocol lore": "invalid choice: 'lore'",
    "model --protocol llama.cpp --text text.txt --seqlen 1": "windows of 1 token predict nothing",
    "model --protocol llama.cpp --text text.txt --seqlen 2": "the second half of windows of 2 tokens predicts nothing",
    "model --reference gone --text text.txt": "'gone' is no folder here",
    "model --reference other --text text.txt": "models of one vocabulary can be compared",
}


@pytest.mark.parametrize("flags", BAD)
def test_what_does_not_go_together_is_refused(here, capsys, flags):
    if "other" in flags:
        make_tiny("llama", here / "other")
        shrink(here / "other")
    refused(capsys, evaluate, [*flags.split(), "--cache", "cache"], BAD[flags])


def shrink(folder):
    """Cuts the last token from a model's vocabulary."""

    def cut(tensors):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:299].clone()

    edit_tensors(folder, cut)
    edit_json(folder / "config.json", vocab_size=299)
