"""Text to rows of token ids: calibration samples and held-out windows.

Sampling rules (`sampling`), all deterministic in (tokenizer, text, samples, seqlen, seed):

- "windows": as the GPTQ papers do it. wikitext2, ptb and files: `samples` random windows of the joined, tokenised text
  (windows may overlap). c4, pile and code: one random window from each of `samples` random documents of at least
  `seqlen` tokens. stdlib: the files in a seeded random order, each behind a bos token, then random windows of that.
- "packed": consecutive non-overlapping windows from the start of the joined text; the seed does not matter.
- "rows": what a .npy file says, in the file's order; the seed does not matter.

Not offered: padding or truncating documents to `seqlen` (pads would enter the Hessian) and attention masks at document
borders (no GPTQ implementation has them).

"windows" reads only the leading `POOL_CHARACTERS_PER_TOKEN` characters of the source per token asked for, so that 16
short samples do not tokenise 100 MB; at the papers' 128 x 2048 this is all of wikitext2 and ptb. Special tokens: the
ones the tokenizer itself puts before a text stand once at the start of the joined text (or of each document, for
windows by document); nothing is appended.

Shapes: N samples, T tokens in each (seqlen).
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from calibration.corpora import Corpus, find_corpus, load_documents, take_documents
from calibration.errors import InputError

POOL_CHARACTERS_PER_TOKEN = 48  # about ten times what the samples hold: windows rarely overlap
DOCUMENT_CHARACTERS_PER_TOKEN = 256  # most documents of c4 are far too short for a window
FIRST_GUESS_CHARACTERS_PER_TOKEN = 8
CUT_TOKENS = 64  # the last tokens before a cut could differ from those of the uncut text
HELD_BACK = 8  # every so many-th batch is left out of training
ENCODE_DOCUMENTS = 32  # at a time: the tokenizer keeps some 100 bytes a token


@dataclass(frozen=True, eq=False)  # tensors do not compare to one bool; fingerprints do
class CalibrationSet:
    """Token rows and what they were made of.

    Attributes:
        tokens: int64 ids (N, T).
        source: Corpus name or file.
        seed: Seed of the windows.
        sampling: "windows", "packed" or "rows".
        tokenizer_sha256: Content hash of the tokenizer; None for a .npy file.
        fingerprint: sha256 over tokenizer, text, N, T, seed, sampling rule and the tokens.
    """

    tokens: torch.Tensor
    source: str
    seed: int
    sampling: str
    tokenizer_sha256: str | None
    fingerprint: str

    def describe(self) -> dict:
        """Return the facts a report or an artefact records."""
        samples, seqlen = self.tokens.shape
        facts = {"source": self.source, "sampling": self.sampling, "seed": self.seed, "samples": samples}
        return facts | {
            "seqlen": seqlen,
            "tokenizer_sha256": self.tokenizer_sha256,
            "fingerprint": self.fingerprint,
        }


def sample_calibration(
    tokenizer,
    source: str,
    *,
    samples: int,
    seqlen: int,
    seed: int,
    sampling: str = "windows",
    vocab_size: int | None = None,
) -> CalibrationSet:
    """Draw the calibration rows of a model.

    Args:
        tokenizer: The model's transformers tokenizer; not used, and may be None, for a .npy source.
        source: Corpus name, text file or .npy file of token rows (whose width then replaces `seqlen`).
        samples: Rows wanted; a .npy file gives its first `samples` rows, or all it has.
        seqlen: Tokens in a row.
        seed: Seed of the one generator that every random choice comes from.
        sampling: A key of `SAMPLERS`; see the module docstring.
        vocab_size: The model's number of embeddings; None leaves out the check of the largest id.

    Raises:
        InputError: A count, the source, its text or an id breaks a rule.
    """
    _check_counts(samples=samples, seqlen=seqlen)
    if not 0 <= seed < 2**63:
        raise InputError(f"seed {seed} must be at least 0 and below 2**63")
    if sampling not in SAMPLERS:
        raise InputError(f"sampling {sampling!r} is not a rule; known: {', '.join(SAMPLERS)}")
    if is_token_file(source):
        tokens = read_token_rows(source, vocab_size=vocab_size)[:samples].clone()
        return _fingerprinted(tokens, source, seed, "rows", None, _sha256(tokens.numpy().tobytes()))
    generator = torch.Generator().manual_seed(seed)
    tokens, text_sha256 = SAMPLERS[sampling](tokenizer, source, samples, seqlen, generator)
    check_vocabulary(tokens, vocab_size, f"{source} through this tokenizer")
    return _fingerprinted(tokens, source, seed, sampling, tokenizer_sha256(tokenizer), text_sha256)


def heldout_tokens(
    tokenizer, source: str, *, seqlen: int, max_tokens: int | None, vocab_size: int | None = None
) -> torch.Tensor:
    """Return the held-out text as consecutive non-overlapping windows (N, T), the usual perplexity protocol.

    The documents are joined as the corpus says (wikitext2, ptb and files by a blank line, c4 by a space), the joined
    text is tokenised with the tokenizer's own default special tokens once at its start, and the remainder after the
    last whole window is dropped. stdlib has one bos token before each file instead. A .npy file gives its own rows,
    whatever their width. `max_tokens` None takes everything.
    """
    _check_counts(seqlen=seqlen, **({} if max_tokens is None else {"max_tokens": max_tokens}))
    if is_token_file(source):
        rows = read_token_rows(source, vocab_size=vocab_size)
        _check_predicts(rows.shape[1])
        windows = len(rows) if max_tokens is None else max_tokens // rows.shape[1]
        return _at_least_one_window(rows[:windows], rows.shape[1], max_tokens)
    _check_predicts(seqlen)
    if max_tokens is not None:
        _at_least_one_window(range(max_tokens // seqlen), seqlen, max_tokens)
        max_tokens -= max_tokens % seqlen
    ids, _ = _leading_tokens(tokenizer, source, "heldout", max_tokens)
    if len(ids) < seqlen:
        raise InputError(f"{source}: held-out text has {len(ids)} tokens; one window needs {seqlen}")
    rows = torch.tensor(ids[: len(ids) - len(ids) % seqlen]).view(-1, seqlen)
    check_vocabulary(rows, vocab_size, f"{source} through this tokenizer")
    return rows


def _check_predicts(seqlen: int) -> None:
    if seqlen == 1:
        raise InputError("windows of 1 token predict nothing: seqlen must be at least 2")


def _at_least_one_window(windows, seqlen: int, max_tokens: int | None):
    if len(windows) == 0:
        raise InputError(f"max_tokens {max_tokens} is less than one window of {seqlen} tokens")
    return windows


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise InputError(f"{name} {value} must be at least 1")


# Ids that are already there


def is_token_file(source: str) -> bool:
    """Say whether the source is a file of token rows, not text."""
    return Path(source).suffix.lower() == ".npy"


def read_token_rows(path: str, *, vocab_size: int | None) -> torch.Tensor:
    """Read a .npy file of integer token rows (N, T) and check every id."""
    rows = _load_array(path)
    if rows.dtype.kind not in "iu":
        raise InputError(f"{path}: dtype {rows.dtype} must be an integer type")
    if rows.ndim != 2:
        raise InputError(f"{path}: shape {rows.shape} must have two dimensions (samples, seqlen)")
    if rows.size == 0:
        raise InputError(f"{path}: shape {rows.shape} holds no tokens; it needs at least one row of one token")
    # uint64 ids beyond int64 come out negative, so they are refused too
    tokens = torch.from_numpy(np.ascontiguousarray(rows, dtype=np.int64))
    check_vocabulary(tokens, vocab_size, str(path))
    return tokens


def _load_array(path: str) -> np.ndarray:
    try:
        with open(path, "rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (OSError, ValueError, EOFError, MemoryError) as error:
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise InputError(f"{path}: not a readable .npy array of integers ({cause})") from error


def check_vocabulary(tokens: torch.Tensor, vocab_size: int | None, what: str) -> None:
    """Refuse ids (N, T) that a model of `vocab_size` embeddings does not have: a wrong file or tokenizer."""
    wrong = tokens < 0 if vocab_size is None else (tokens < 0) | (tokens >= vocab_size)
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        rule = "ids are not negative" if vocab_size is None else f"the model's vocabulary is {vocab_size} ids from 0"
        raise InputError(f"{what}: token id {tokens[row, column]} in row {row}, column {column}: {rule}")


# Sampling rules: (tokenizer, source, samples, seqlen, generator) -> tokens (N, T), sha256 of the text


def _windows(tokenizer, source: str, samples: int, seqlen: int, generator: torch.Generator):
    corpus = find_corpus(source)
    if corpus.window_per_document:
        return _document_windows(tokenizer, source, samples, seqlen, generator)
    characters = samples * seqlen * POOL_CHARACTERS_PER_TOKEN
    if corpus.bos_per_document:  # files in the order of their names would be the a's of the library
        documents = load_documents(source, "train", needed_characters=None)
        order = torch.randperm(len(documents), generator=generator).tolist()
        documents = take_documents((documents[i] for i in order), characters)
    else:
        documents = load_documents(source, "train", needed_characters=characters)
    pieces = _pieces(corpus, documents, characters)
    ids = _encode_pieces(tokenizer, corpus, pieces)
    _check_length(source, ids, samples, seqlen)
    starts = torch.randint(0, len(ids) - seqlen + 1, (samples,), generator=generator).tolist()
    return torch.tensor([ids[start : start + seqlen] for start in starts]), _sha256_of_texts(pieces)


def _document_windows(tokenizer, source: str, samples: int, seqlen: int, generator: torch.Generator):
    characters = samples * seqlen * DOCUMENT_CHARACTERS_PER_TOKEN
    documents = load_documents(source, "train", needed_characters=characters)
    # A token is rarely less than a character, so shorter documents are not worth tokenising.
    long_enough = [document for document in documents if len(document) >= seqlen]
    prefix = leading_special_tokens(tokenizer)
    rows = []
    for index in torch.randperm(len(long_enough), generator=generator).tolist():
        ids = prefix + _encode(tokenizer, [long_enough[index]])[0]
        if len(ids) >= seqlen:
            start = int(torch.randint(0, len(ids) - seqlen + 1, (), generator=generator))
            rows.append(ids[start : start + seqlen])
        if len(rows) == samples:
            return torch.tensor(rows), _sha256_of_texts(documents)
    raise InputError(
        f"{source}: {len(rows)} of {len(documents)} documents have at least {seqlen} tokens and {samples} are needed; "
        'use fewer or shorter samples, or sampling "packed"'
    )


def _packed(tokenizer, source: str, samples: int, seqlen: int, generator: torch.Generator):
    ids, text_sha256 = _leading_tokens(tokenizer, source, "train", samples * seqlen)
    _check_length(source, ids, samples, seqlen)
    return torch.tensor(ids).view(samples, seqlen), text_sha256


SAMPLERS: dict[str, Callable] = {"windows": _windows, "packed": _packed}


def _check_length(source: str, ids: list[int], samples: int, seqlen: int) -> None:
    if len(ids) < samples * seqlen:
        raise InputError(
            f"{source}: found {len(ids)} tokens; {samples} samples of {seqlen} need {samples * seqlen}; "
            "use fewer or shorter samples, or more text"
        )


# Tokenising


def _leading_tokens(tokenizer, source: str, split: str, needed: int | None) -> tuple[list[int], str]:
    """Return the first `needed` tokens of the joined text, or all, reading no more of it than that takes."""
    corpus = find_corpus(source)
    characters = None if needed is None else needed * FIRST_GUESS_CHARACTERS_PER_TOKEN
    while True:
        documents = load_documents(source, split, needed_characters=characters)
        everything = characters is None or sum(map(len, documents)) < characters
        pieces = _pieces(corpus, documents, None if everything else characters)
        ids = _encode_pieces(tokenizer, corpus, pieces)
        if everything or len(ids) >= needed + CUT_TOKENS:
            return ids[:needed], _sha256_of_texts(pieces)
        characters *= 2


def _pieces(corpus: Corpus, documents: list[str], characters: int | None) -> list[str]:
    """Return what is tokenised: the documents, or the start of the one joined text."""
    return documents if corpus.bos_per_document else [corpus.separator.join(documents)[:characters]]


def _encode_pieces(tokenizer, corpus: Corpus, pieces: list[str]) -> list[int]:
    if not corpus.bos_per_document:
        return leading_special_tokens(tokenizer) + _encode(tokenizer, pieces)[0]
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = []
    for first in range(0, len(pieces), ENCODE_DOCUMENTS):
        for document_ids in _encode(tokenizer, pieces[first : first + ENCODE_DOCUMENTS]):
            ids += bos + document_ids
    return ids


def leading_special_tokens(tokenizer) -> list[int]:
    """Return what the tokenizer itself puts before a text: a bos token or nothing.

    Adding them by hand keeps an end token that some tokenizers append out of the middle of a cut text.
    """
    with_specials = tokenizer("a", verbose=False)["input_ids"]
    plain = _encode(tokenizer, ["a"])[0]
    starts = range(len(with_specials) - len(plain) + 1)
    return with_specials[: next((i for i in starts if with_specials[i : i + len(plain)] == plain), 0)]


def _encode(tokenizer, texts: list[str]) -> list[list[int]]:
    # verbose=False: a joined corpus is longer than any context, and that warning would only alarm
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


# Hashes


def tokenizer_sha256(tokenizer) -> str:
    """Return the content hash of a tokenizer, whatever folder it came from and whatever it was last used for."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        # settings of the last call, not of the tokenizer
        content.pop("padding", None)
        content.pop("truncation", None)
    else:
        content = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    special = [tokenizer.bos_token_id, leading_special_tokens(tokenizer)]
    return _sha256(json.dumps([content, special], sort_keys=True).encode())


def _fingerprinted(
    tokens: torch.Tensor, source: str, seed: int, sampling: str, tokenizer_hash: str | None, text_sha256: str
) -> CalibrationSet:
    token_hash = _sha256(tokens.numpy().tobytes())
    parts = [tokenizer_hash, text_sha256, list(tokens.shape), seed, sampling, token_hash]
    return CalibrationSet(tokens, source, seed, sampling, tokenizer_hash, _sha256(json.dumps(parts).encode()))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _sha256_of_texts(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        content = text.encode("utf-8")
        digest.update(len(content).to_bytes(8, "little"))  # so that moving a border changes the hash
        digest.update(content)
    return digest.hexdigest()


def hold_back(batches: int) -> tuple[list[int], list[int]]:
    """Which of so many batches of calibration rows are trained on, and which tell whether that helped.

    The same for every training of a run, so that what is held back was never trained on. A single batch is both.
    """
    held = list(range(0, batches, HELD_BACK)) if batches > 1 else [0]
    return [b for b in range(batches) if b not in held] or held, held
