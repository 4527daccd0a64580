"""Token rows come from the text they claim, repeat exactly, and every wrong input is one clear line."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from calibration import corpora
from calibration.corpora import Corpus, load_documents
from calibration.errors import InputError
from calibration.tokens import (
    check_vocabulary,
    heldout_tokens,
    leading_special_tokens,
    read_token_rows,
    sample_calibration,
    tokenizer_sha256,
)

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards brew new potions in old iron kettles".split()
SHARED = Path(__file__).parents[3] / "shared" / "tokenizers"


def prose(words: int, seed: int = 0) -> str:
    choice = np.random.default_rng(seed).integers(0, len(WORDS), words)
    return " ".join(f"{WORDS[i]}{n % 7 or ''}" for n, i in enumerate(choice))


def build_tokenizer(vocab_size=400, template=None, **kwargs):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([prose(3000)], trainer)
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **kwargs)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(model_max_length=16)


@pytest.fixture(scope="module")
def bos_tokenizer():
    return build_tokenizer(template="<s> $A </s>")


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(prose(20_000, seed=1))
    return str(path)


@pytest.fixture
def corpus_of(monkeypatch):
    def install(documents, **layout):
        monkeypatch.setitem(corpora.CORPORA, "test", Corpus("test", lambda split: iter(documents), **layout))
        return "test"

    return install


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def sample(tokenizer, source, **changes):
    return sample_calibration(tokenizer, source, **({"samples": 6, "seqlen": 32, "seed": 0} | changes))


def holds(ids, row):
    """Say whether the row is a run of consecutive ids."""
    return f" {' '.join(map(str, row))} " in f" {' '.join(map(str, ids))} "


def error_of(function, *args, **kwargs):
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Windows


def test_windows_are_runs_of_the_joined_text(tokenizer, corpus_of):
    documents = [prose(400, seed) for seed in range(5)]
    rows = sample(tokenizer, corpus_of(documents)).tokens
    assert rows.shape == (6, 32) and rows.dtype == torch.int64
    whole = ids_of(tokenizer, "\n\n".join(documents))
    assert all(holds(whole, row) for row in rows.tolist())
    assert len({tuple(row) for row in rows.tolist()}) > 1


def test_windows_reach_the_whole_pool_and_no_further(tokenizer, corpus_of):
    source = corpus_of([prose(200_000)])
    whole = ids_of(tokenizer, prose(200_000)[: 200 * 8 * 48 + 1000])
    pool = len(ids_of(tokenizer, prose(200_000)[: 200 * 8 * 48]))
    at = {tuple(whole[i : i + 8]): i for i in range(len(whole) - 8)}
    starts = [at[tuple(row)] for row in sample(tokenizer, source, samples=200, seqlen=8).tokens.tolist()]
    assert min(starts) < 0.05 * pool and 0.95 * pool < max(starts) <= pool - 8


def test_windows_by_document_take_one_from_each_of_distinct_documents(tokenizer, corpus_of):
    documents = ["the quick brown fox jumps over a lazy dog"] * 30 + [prose(100, seed) for seed in range(20)]
    rows = sample(tokenizer, corpus_of(documents, window_per_document=True), samples=20).tokens.tolist()
    homes = [[n for n, document in enumerate(documents) if holds(ids_of(tokenizer, document), row)] for row in rows]
    assert all(len(home) == 1 for home in homes)
    assert sorted(home[0] for home in homes) == list(range(30, 50))


def test_windows_of_separate_files_start_each_with_bos(tokenizer, corpus_of):
    documents = [prose(12, seed) for seed in range(200)]
    rows = sample(tokenizer, corpus_of(documents, bos_per_document=True)).tokens.tolist()
    files = {tuple(ids_of(tokenizer, document)) for document in documents}
    for row in rows:
        borders = [n for n, token in enumerate(row) if token == tokenizer.bos_token_id]
        between = [tuple(row[a + 1 : b]) for a, b in zip(borders, borders[1:], strict=False)]
        assert borders and all(inner in files for inner in between)


def test_separate_files_are_drawn_from_all_of_them(tokenizer, corpus_of):
    documents = [f"{n} " + prose(12) for n in range(4000)]
    pool = len(corpora.take_documents(documents, 6 * 32 * 48))
    text = tokenizer.decode(sample(tokenizer, corpus_of(documents, bos_per_document=True)).tokens.flatten())
    numbers = [int(word) for word in text.replace("<s>", " ").split() if word.isdigit()]
    assert max(numbers) > 2 * pool


def test_stdlib_needs_no_network(tokenizer):
    rows = sample(tokenizer, "stdlib", samples=2, seqlen=24, sampling="packed").tokens.flatten().tolist()
    first = load_documents("stdlib", "train", needed_characters=1)[0]
    assert rows == ([tokenizer.bos_token_id] + ids_of(tokenizer, first))[:48]


def test_packed_is_the_start_of_the_joined_text(tokenizer, corpus_of):
    documents = [prose(100, seed) for seed in range(50)]
    rows = sample(tokenizer, corpus_of(documents, separator=" "), sampling="packed").tokens
    assert rows.flatten().tolist() == ids_of(tokenizer, " ".join(documents))[: 6 * 32]
    assert torch.equal(rows, sample(tokenizer, "test", sampling="packed", seed=5).tokens)


def test_tokenizers_own_bos_stands_once_at_the_start_and_eos_nowhere(bos_tokenizer, text_file):
    assert leading_special_tokens(bos_tokenizer) == [0]
    rows = sample(bos_tokenizer, text_file, sampling="packed").tokens.flatten().tolist()
    assert rows == [0] + ids_of(bos_tokenizer, Path(text_file).read_text())[: 6 * 32 - 1]
    heldout = heldout_tokens(bos_tokenizer, text_file, seqlen=32, max_tokens=None).flatten()
    assert (heldout == 0).sum() == 1 and (heldout == 1).sum() == 0


def test_no_warning_about_long_sequences(tokenizer, text_file):
    tokenizer.deprecation_warnings.clear()
    sample(tokenizer, text_file)
    assert not tokenizer.deprecation_warnings


# Determinism and fingerprints


def test_same_request_gives_the_same_set_and_leaves_the_global_generator_alone(tokenizer, text_file):
    state = torch.random.get_rng_state()
    first = sample(tokenizer, text_file)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(1234)
    second = sample(tokenizer, text_file)
    assert torch.equal(first.tokens, second.tokens) and first.describe() == second.describe()
    assert first.describe() == {
        "source": text_file,
        "sampling": "windows",
        "seed": 0,
        "samples": 6,
        "seqlen": 32,
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "fingerprint": first.fingerprint,
    }


def test_fingerprint_changes_with_every_request(tokenizer, bos_tokenizer, text_file):
    requests = [{}, {"samples": 5}, {"seqlen": 31}, {"seed": 1}, {"sampling": "packed"}]
    prints = {sample(tokenizer, text_file, **changes).fingerprint for changes in requests}
    prints.add(sample(bos_tokenizer, text_file).fingerprint)
    prints.add(sample(build_tokenizer(vocab_size=300), text_file).fingerprint)
    assert len(prints) == len(requests) + 2


def test_fingerprint_covers_what_the_tokens_do_not_show(tokenizer, text_file, tmp_path):
    """Each ingredient is changed so that the token ids stay the same."""

    def packed(tokenizer=tokenizer, **changes):
        return sample(tokenizer, text_file, sampling="packed", **changes)

    first = packed()
    larger = build_tokenizer()
    larger.add_tokens(["never in the text"])
    others = [packed(seed=1), packed(samples=12, seqlen=16), packed(tokenizer=larger)]
    text = Path(text_file).read_text()
    Path(text_file).write_text(text[:1400] + "X" + text[1401:])  # inside what is read, beyond the packed rows
    others.append(packed())
    assert all(torch.equal(first.tokens.flatten(), other.tokens.flatten()) for other in others)
    assert len({calibration.fingerprint for calibration in [first, *others]}) == 5

    path = tmp_path / "one_window.txt"
    path.write_text(prose(20))
    whole = {"samples": 1, "seqlen": len(ids_of(tokenizer, prose(20)))}
    rules = [sample(tokenizer, str(path), sampling=rule, **whole) for rule in ("windows", "packed")]
    assert torch.equal(rules[0].tokens, rules[1].tokens) and rules[0].fingerprint != rules[1].fingerprint


def test_fingerprint_forgets_how_the_tokenizer_was_last_called_and_where_it_lies(tokenizer, tmp_path):
    before = tokenizer_sha256(tokenizer)
    tokenizer.pad_token = "</s>"
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert tokenizer_sha256(tokenizer) == before
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_sha256(AutoTokenizer.from_pretrained(tmp_path)) == before


# Texts and requests that do not fit


@pytest.mark.parametrize("sampling", ["windows", "packed"])
def test_short_text_names_tokens_found_and_needed(tokenizer, tmp_path, sampling):
    path = tmp_path / "short.txt"
    path.write_text(prose(60))
    found = len(ids_of(tokenizer, prose(60)))
    message = error_of(sample, tokenizer, str(path), sampling=sampling)
    assert f"short.txt: found {found} tokens; 6 samples of 32 need 192" in message


def test_too_few_long_documents(tokenizer, corpus_of):
    documents = ["short"] * 7 + [prose(100, seed) for seed in range(3)]
    message = error_of(sample, tokenizer, corpus_of(documents, window_per_document=True))
    assert "3 of 10 documents have at least 32 tokens and 6 are needed" in message


@pytest.mark.parametrize(
    "changes, rule",
    [
        ({"samples": 0}, "samples 0 must be at least 1"),
        ({"seqlen": -1}, "seqlen -1 must be at least 1"),
        ({"seed": -1}, "seed -1 must be at least 0"),
        ({"seed": 2**63}, "must be at least 0 and below 2**63"),
        ({"sampling": "random"}, "sampling 'random' is not a rule; known: windows, packed"),
        ({"vocab_size": 50}, "the model's vocabulary is 50 ids from 0"),
    ],
)
def test_request_that_breaks_a_rule(tokenizer, text_file, changes, rule):
    assert rule in error_of(sample, tokenizer, text_file, **changes)


# Held-out windows


def test_heldout_windows_are_consecutive_and_drop_the_remainder(tokenizer, text_file):
    whole = ids_of(tokenizer, Path(text_file).read_text())
    rows = heldout_tokens(tokenizer, text_file, seqlen=100, max_tokens=None)
    assert len(rows) == len(whole) // 100
    assert rows.flatten().tolist() == whole[: len(rows) * 100]


RUN = "=" * 50  # one token, so that eight characters a token are not enough


@pytest.fixture(scope="module")
def run_tokenizer():
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([RUN])
    return tokenizer


@pytest.mark.parametrize(
    "documents",
    [
        pytest.param([prose(20_000)], id="one long document"),
        pytest.param(["x"] * 3000, id="tiny documents"),
        pytest.param([RUN + "y"] * 3000, id="first guess too small"),
        pytest.param([RUN + "xyxy"] * 3000, id="first guess just enough but cut inside a token"),
    ],
)
def test_heldout_prefix_equals_that_of_the_whole_text(run_tokenizer, corpus_of, documents):
    rows = heldout_tokens(run_tokenizer, corpus_of(documents), seqlen=64, max_tokens=1000)
    assert rows.shape == (15, 64)
    assert rows.flatten().tolist() == ids_of(run_tokenizer, "\n\n".join(documents))[: 15 * 64]


def test_heldout_reads_all_of_a_text_whose_separators_outweigh_it(run_tokenizer, corpus_of):
    source = corpus_of(["x"] * 100, separator=RUN)
    whole = ids_of(run_tokenizer, RUN.join(["x"] * 100))
    rows = heldout_tokens(run_tokenizer, source, seqlen=len(whole), max_tokens=len(whole))
    assert rows.flatten().tolist() == whole


def test_heldout_shorter_than_one_window(tokenizer, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("the quick brown fox")
    found = len(ids_of(tokenizer, "the quick brown fox"))
    message = error_of(heldout_tokens, tokenizer, str(path), seqlen=32, max_tokens=None)
    assert f"held-out text has {found} tokens; one window needs 32" in message


def test_heldout_limits_are_checked(tokenizer, text_file, tmp_path):
    rows = str(tmp_path / "rows.npy")
    np.save(rows, np.ones((4, 10), dtype=np.int32))
    assert heldout_tokens(None, rows, seqlen=3, max_tokens=25).shape == (2, 10)
    assert heldout_tokens(None, rows, seqlen=3, max_tokens=None).shape == (4, 10)
    for source in (rows, text_file):
        assert "less than one window of" in error_of(heldout_tokens, tokenizer, source, seqlen=10, max_tokens=9)
        assert "max_tokens -20 must" in error_of(heldout_tokens, tokenizer, source, seqlen=10, max_tokens=-20)
    message = error_of(heldout_tokens, tokenizer, text_file, seqlen=10, max_tokens=100, vocab_size=50)
    assert "vocabulary is 50 ids" in message


# Token files


def test_npy_round_trip_keeps_every_token(tokenizer, text_file, tmp_path):
    drawn = sample(tokenizer, text_file)
    path = str(tmp_path / "rows.npy")
    for dtype in (np.int64, np.uint16, ">i4"):
        np.save(path, np.asfortranarray(drawn.tokens.numpy().astype(dtype)))
        read = sample(None, path, seqlen=999)
        assert torch.equal(read.tokens, drawn.tokens) and read.tokens.dtype == torch.int64
    assert (read.sampling, read.tokenizer_sha256, read.describe()["seqlen"]) == ("rows", None, 32)
    fewer = sample(None, path, samples=2)
    assert torch.equal(fewer.tokens, drawn.tokens[:2]) and fewer.fingerprint != read.fingerprint
    changed = drawn.tokens.numpy().copy()
    changed[0, 0] += 1
    np.save(path, changed)
    assert sample(None, path).fingerprint != read.fingerprint


@pytest.mark.parametrize(
    "array, rule",
    [
        (np.ones(8, dtype=np.int32), "shape (8,) must have two dimensions"),
        (np.ones((2, 2, 2), dtype=np.int32), "shape (2, 2, 2) must have two dimensions"),
        (np.ones((2, 4), dtype=np.float32), "dtype float32 must be an integer type"),
        (np.ones((2, 4), dtype=bool), "dtype bool must be an integer type"),
        (np.ones((0, 4), dtype=np.int32), "shape (0, 4) holds no tokens"),
        (np.ones((4, 0), dtype=np.int32), "shape (4, 0) holds no tokens"),
        (np.array([[5, 6], [7, -3]]), "token id -3 in row 1, column 1: the model's vocabulary is 100 ids"),
        (np.array([[5, 6], [100, 7]]), "token id 100 in row 1, column 0: the model's vocabulary is 100 ids"),
        (np.array([[5, 2**64 - 1]], dtype=np.uint64), "in row 0, column 1: the model's vocabulary is 100 ids"),
    ],
)
def test_npy_with_wrong_content(tmp_path, array, rule):
    path = str(tmp_path / "rows.npy")
    np.save(path, array)
    message = error_of(read_token_rows, path, vocab_size=100)
    assert message.startswith(path) and rule in message


def test_npy_without_a_vocabulary_still_refuses_negative_ids(tmp_path):
    path = str(tmp_path / "rows.npy")
    np.save(path, np.array([[10**6, -1]]))
    assert "token id -1 in row 0, column 1: ids are not negative" in error_of(read_token_rows, path, vocab_size=None)


def test_npy_that_is_not_one(tmp_path):
    path = tmp_path / "rows.npy"
    assert "no such file" in error_of(read_token_rows, str(path), vocab_size=None)
    np.save(path, np.ones((50, 50), dtype=np.int64))
    good = path.read_bytes()
    np.save(path, np.array([[{"an": "object"}]]), allow_pickle=True)
    pickled = path.read_bytes()
    for content in (b"", b"just text", good[:60], good[:-100], pickled, b"\x80\x04N."):
        path.write_bytes(content)
        assert "not a readable .npy array" in error_of(read_token_rows, str(path), vocab_size=None)
    assert "not a readable .npy array" in error_of(read_token_rows, str(tmp_path), vocab_size=None)


def test_check_vocabulary_accepts_the_last_id_only():
    check_vocabulary(torch.tensor([[0, 99]]), 100, "rows")
    assert "rows: token id 99 in row 0, column 1" in error_of(check_vocabulary, torch.tensor([[0, 99]]), 99, "rows")


# Real tokenizers


@pytest.mark.parametrize("name, leading", [("gpt2", []), ("starcoder", []), ("llama2-spm", [1])])
def test_real_tokenizer_prefix_equals_its_own_call(name, leading, text_file):
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"no {name} tokenizer in a folder named shared beside the checkout")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert leading_special_tokens(tokenizer) == leading
    rows = heldout_tokens(tokenizer, text_file, seqlen=128, max_tokens=1024)
    whole = tokenizer(Path(text_file).read_text()[:20_000], verbose=False)["input_ids"]
    assert rows.flatten().tolist() == whole[:1024]
