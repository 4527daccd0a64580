"""Perplexity protocols and divergence against plain computations on transformers' own model in fp64."""

import math
import re
from dataclasses import replace
from functools import cache

import pytest
import torch
from tiny_models import make_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from calibration.errors import InputError
from calibration.tokens import leading_special_tokens
from ptq.checkpoint import open_checkpoint
from ptq.evaluation import harness, stream
from ptq.evaluation.answers import AnswerStore
from ptq.evaluation.divergence import measure_divergence
from ptq.evaluation.perplexity import measure_perplexity, prepare_windows
from ptq.evaluation.tasks import articles
from ptq.load import load_model
from ptq.streamed import StreamedModel

SEQLEN = 32
# Blocks run in fp64 here; logits are rounded to fp32 once. They are below 2^6, so each is off by at most 2^-18 = 4e-6,
# a log-probability by twice that, and the mean of many, with signs at random, by far less.
NATS = 8e-6


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [
        make_tiny("llama", folder / name, seed=seed, tie=tie) for name, seed, tie in (("a", 0, True), ("b", 1, False))
    ]


def streamed(folder):
    return StreamedModel(open_checkpoint(folder), dtype=torch.float64)


def log_probabilities(folder, windows):
    """(n, seqlen, vocabulary) in fp64, all at once."""
    with torch.no_grad():
        return _whole(folder)(windows).logits.log_softmax(-1)


@cache
def _whole(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def _chosen(log_p, windows, skip):
    return log_p.gather(-1, windows[:, skip + 1 :].reshape(-1, 1))


@pytest.fixture(autouse=True)
def several_batches(monkeypatch):
    monkeypatch.setattr(stream, "BATCH_TOKENS", 8 * SEQLEN)


@pytest.fixture(scope="module")
def windows():
    return torch.randint(2, 300, (37, SEQLEN), generator=torch.Generator().manual_seed(0))


def test_gptq_scores_every_token_but_the_first(folders, windows):
    tokens, skip = prepare_windows("gptq", windows, [0])
    assert tokens is windows
    result = measure_perplexity(streamed(folders[0]), tokens, skip=skip)
    log_p = log_probabilities(folders[0], windows)
    nll = (-_chosen(log_p[:, :-1].flatten(0, 1), windows, 0)[:, 0]).tolist()
    assert result.tokens == len(nll) == 37 * 31 and result.seqlen == SEQLEN
    assert result.nll == pytest.approx(sum(nll) / len(nll), abs=NATS)
    assert result.perplexity == pytest.approx(math.exp(sum(nll) / len(nll)), rel=NATS)


def test_rows_of_many_windows_pass_the_learned_positions(tmp_path, windows):
    """Logits are made for as many rows as memory allows, whatever number of positions the model knows."""
    folder = make_tiny("gpt_bigcode", tmp_path / "bigcode", n_positions=SEQLEN)
    result = measure_perplexity(streamed(folder), windows)
    log_p = log_probabilities(folder, windows)
    nll = -_chosen(log_p[:, :-1].flatten(0, 1), windows, 0).mean()
    assert result.nll == pytest.approx(float(nll), abs=NATS)


@pytest.mark.parametrize("bos", [0, None])
@pytest.mark.parametrize("seqlen", [32, 31])
def test_llama_cpp_scores_the_second_half_after_a_bos(folders, windows, bos, seqlen):
    """The loop of llama-perplexity, position by position: n_ctx - n_ctx / 2 - 1 predictions a window."""
    chunks = windows[:, :seqlen]
    tokens, skip = prepare_windows("llama.cpp", chunks, [] if bos is None else [bos])
    result = measure_perplexity(streamed(folders[0]), tokens, skip=skip)
    total = squares = count = 0
    evaluated = [chunk if bos is None else [bos, *chunk[1:]] for chunk in chunks.tolist()]
    log_p = log_probabilities(folders[0], torch.tensor(evaluated)).tolist()
    for n, chunk in enumerate(chunks.tolist()):
        first = seqlen // 2
        for position in range(first, seqlen - 1):
            v = -log_p[n][position][chunk[position + 1]]
            total, squares, count = total + v, squares + v * v, count + 1
    mean = total / count
    assert result.tokens == count == 37 * (seqlen - seqlen // 2 - 1)
    assert result.nll == pytest.approx(mean, abs=NATS)
    error = math.sqrt((squares / count - mean**2) / (count - 1)) * math.exp(mean)
    assert result.stderr == pytest.approx(error, rel=1e-5)
    assert bos is None or not torch.equal(tokens, chunks)  # a copy: the caller's windows are left alone


def test_a_text_s_own_leading_token_is_what_windows_begin_with(folders):
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    assert leading_special_tokens(tokenizer) == []
    assert prepare_windows("llama.cpp", torch.full((2, 8), 5), [3])[0][:, :2].tolist() == [[3, 5], [3, 5]]


@pytest.mark.parametrize("skip", [0, SEQLEN // 2])
def test_divergence_is_the_sum_over_the_vocabulary(folders, windows, skip):
    result = measure_divergence(streamed(folders[1]), streamed(folders[0]), windows, skip=skip)
    log_p, log_q = (log_probabilities(folder, windows)[:, skip:-1].reshape(-1, 300) for folder in folders)
    kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    assert result.tokens == len(kl) == 37 * (SEQLEN - 1 - skip)
    assert result.kl == pytest.approx(kl.mean().item(), rel=1e-5)
    assert result.kl_max == pytest.approx(kl.max().item(), rel=1e-5)
    assert result.kl_stderr == pytest.approx((kl.var() / len(kl)).sqrt().item(), rel=1e-5)
    assert (kl <= result.kl_99 + NATS).double().mean() == pytest.approx(0.99, abs=1 / len(kl))
    assert result.same_top == (log_p.argmax(-1) == log_q.argmax(-1)).double().mean()
    assert result.model.nll == pytest.approx(measure_perplexity(streamed(folders[1]), windows, skip=skip).nll, abs=NATS)
    assert result.reference.nll == pytest.approx(-_chosen(log_p, windows, skip).mean().item(), abs=NATS)


def test_a_model_does_not_diverge_from_itself(folders, windows):
    result = measure_divergence(streamed(folders[0]), streamed(folders[0]), windows)
    assert (result.kl, result.kl_max, result.same_top) == (0, 0, 1) and result.model == result.reference


def test_the_size_of_what_is_held_does_not_change_the_figures(folders, windows, tmp_path, monkeypatch):
    whole = measure_divergence(streamed(folders[1]), streamed(folders[0]), windows)
    monkeypatch.setattr(stream, "LOGIT_ENTRIES", 300 * 300)
    spilled = measure_divergence(streamed(folders[1]), streamed(folders[0]), windows, spill=tmp_path / "s", budget=0)
    assert len(list((tmp_path / "s").rglob("*.bin"))) == 2 * 5
    # Matrix products of other shapes may sum in another order: a few fp64 roundings, then the same fp32 numbers.
    assert spilled.kl == pytest.approx(whole.kl, rel=1e-6) and spilled.same_top == whole.same_top
    assert replace(spilled.model, nll=0, perplexity=0, stderr=0) == replace(whole.model, nll=0, perplexity=0, stderr=0)


def test_models_of_two_vocabularies_are_refused(folders, windows, tmp_path):
    other = make_tiny("gpt2", tmp_path / "other")
    reference = streamed(other)
    reference.config.vocab_size = 299
    with pytest.raises(InputError, match="has 300 tokens and .* 299: models of one vocabulary"):
        measure_divergence(streamed(folders[0]), reference, windows)


# lm-eval


DOCUMENTS = ["f ( x ) = x @-@ 1", "\u00e9t\u00e9  and\nwinter\n", "one"]


@pytest.fixture(scope="module")
def byte_perplexities(folders):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    loaded = load_model(folders[0])
    scores = harness.run_tasks(
        loaded.model, loaded.tokenizer, harness.document_tasks(DOCUMENTS), AnswerStore(None), batch_size=1
    )
    return {score.metric: score.value for score in scores}


def test_lm_eval_counts_the_words_and_bytes_of_whole_documents(folders, byte_perplexities):
    """From the definition: log-likelihood of the mended text, over words and bytes of the text as it is."""
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    mended = ["f (x) = x-1", *DOCUMENTS[1:]]
    total = 0.0
    for text in mended:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]])
        assert ids.shape[1] < 256  # one window
        log_p = log_probabilities(folders[0], ids)
        total += sum(log_p[0, t, ids[0, t + 1]].item() for t in range(ids.shape[1] - 1))
    words = sum(len(re.split(r"\s+", text)) for text in DOCUMENTS)
    size = sum(len(text.encode()) for text in DOCUMENTS)
    # The harness runs the model in fp32: 1e-6 relative in a sum of some 100 nats, then exponentials of it per word.
    assert byte_perplexities["bits_per_byte"] == pytest.approx(-total / size / math.log(2), rel=1e-5)
    assert byte_perplexities["byte_perplexity"] == pytest.approx(math.exp(-total / size), rel=1e-5)
    assert byte_perplexities["word_perplexity"] == pytest.approx(math.exp(-total / words), rel=1e-4)


def test_lm_eval_is_the_harness_s_own(folders, byte_perplexities):
    lm_eval = pytest.importorskip("lm_eval")
    manager = pytest.importorskip("lm_eval.tasks").TaskManager(include_defaults=False)
    own = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folders[0]), "dtype": "float32"},
        tasks=[*harness.document_tasks(DOCUMENTS)["tasks"].values()],
        device="cpu",
        task_manager=manager,
    )
    figures = own["results"]["wikitext"]
    assert byte_perplexities == {metric: figures[f"{metric},none"] for metric in byte_perplexities}
    assert len(byte_perplexities) == 3


def test_articles_begin_at_their_titles():
    text = " \n = Du Fu = \n \n was = a poet = \n = = Life = = \n \n = = = Early = = = \n \n = Nero = \n x"
    assert [page.split("\n")[0].strip() for page in articles(text)] == ["= Du Fu =", "= Nero ="]
    assert articles("plain\ntext") == ["plain\ntext"] and articles(" \n") == []


def test_wikitext_2_s_test_text_has_62_articles(shared):
    text = (shared / "data/wikitext-2/wiki.test.raw").read_text(encoding="utf-8")
    pages = articles(text)
    assert len(pages) == 62 and "\n".join(pages) == text.removeprefix(" \n")
