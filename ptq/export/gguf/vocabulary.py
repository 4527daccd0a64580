"""A Hugging Face tokenizer in llama.cpp's words: tokens, their kinds, merges or scores, special tokens.

Two kinds of BPE are written: byte-level ("gpt2" to llama.cpp, whatever the model) with a pre-tokenizer by name, and
SentencePiece's ("llama"), where a score stands for the order of merges. The whole tokenizer.json goes into the file as
well, under the key that GGUF has for it, so that reading the file back needs no guess.
"""

import json

from gguf import GGUFWriter, Keys, TokenType

from calibration.errors import InputError
from calibration.tokens import leading_special_tokens
from ptq.export.gguf.pretokenizers import recognise

SPACE = "\u2581"  # SentencePiece's visible space
SPECIALS = ("bos", "eos", "unk", "sep", "pad", "mask")
CONTROL_MARKS = ("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">")  # how such tokens begin and end
CONTROL_WORDS = frozenset(
    "</s> <eos> <pad> <mask> <2mass> [@BOS@] <EOT> _<EOT> [EOT] [EOS] [PAD] <end_of_turn> <end_of_utterance>"
    " <fim_prefix> <fim_suffix> <fim_middle> <fim_pad> <fim-prefix> <fim-suffix> <fim-middle> <fim-pad> <fim-repo>"
    " <PRE> <SUF> <MID> <PAD> <REP> <REPO> <reponame> \u2581<PRE> \u2581<SUF> \u2581<MID>".split()
)


def add_vocabulary(writer: GGUFWriter, tokenizer, config, *, pre_tokenizer: str | None = None):
    """Writes a tokenizer's metadata.

    Args:
        writer: Takes the keys.
        tokenizer: A transformers tokenizer with a tokenizers backend.
        config: The transformers config: vocab_size, the embedding's rows, beyond the tokenizer's ids become unused
            tokens; special tokens that the tokenizer does not name are taken from here.
        pre_tokenizer: llama.cpp's name, where recognising it fails.

    Raises:
        InputError: The tokenizer is of another kind, or does not fit the embedding.
    """
    content = tokenizer_json(tokenizer)
    tokens, kinds = _tokens(content, config.vocab_size)
    if _is_sentencepiece(content):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre(pre_tokenizer or "default")
        writer.add_token_list(tokens)
        writer.add_token_scores(_scores(content, config.vocab_size))
        writer.add_add_space_prefix(_prepends_space(content))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer or recognise(content))
        writer.add_token_list(tokens)
        writer.add_token_merges([" ".join(pair) for pair in _merges(content)])
    writer.add_token_types(kinds)
    _add_specials(writer, tokenizer, config)
    writer.add_string(Keys.Tokenizer.HF_JSON, json.dumps(content, ensure_ascii=False, separators=(",", ":")))


def tokenizer_json(tokenizer) -> dict:
    """The parsed tokenizer.json that a transformers tokenizer works by.

    Raises:
        InputError: It has none, or its model is not BPE.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError("a GGUF file needs a tokenizer that can be read as tokenizer.json; this model has none")
    content = json.loads(backend.to_str())
    content.pop("padding", None)  # settings of the last call
    content.pop("truncation", None)
    if content["model"]["type"] != "BPE":
        raise InputError(f"tokenizer.json: a {content['model']['type']} model cannot be written as GGUF, only BPE")
    return content


def _is_sentencepiece(content) -> bool:
    return bool(content["model"].get("byte_fallback")) and "ByteLevel" not in json.dumps(content["pre_tokenizer"])


def _merges(content) -> list[tuple[str, str]]:
    """Pairs; older files write each as one string."""
    merges = content["model"]["merges"]
    return [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in merges]


def _tokens(content, vocab_size) -> tuple[list[str], list[int]]:
    """Text and kind of every id."""
    model, sentencepiece = content["model"], _is_sentencepiece(content)
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    kinds = [TokenType.UNUSED] * vocab_size
    added = {token["id"]: token for token in content["added_tokens"]}
    for text, i in model["vocab"].items():
        if i >= vocab_size and i not in added:
            raise InputError(f"tokenizer.json: token {text!r} has id {i}; the model's embedding has {vocab_size} rows")
        if i < vocab_size:
            tokens[i], kinds[i] = text, TokenType.BYTE if sentencepiece and _is_byte(text) else TokenType.NORMAL
    for i, token in added.items():
        if i >= vocab_size:  # Gemma 3's image token has no row in its text models
            continue
        tokens[i], kinds[i] = token["content"], TokenType.CONTROL if _is_control(token) else TokenType.USER_DEFINED
        if sentencepiece:
            tokens[i], kinds[i] = _sentencepiece_added(token, model)
    return tokens, kinds


def _is_control(token) -> bool:
    """Whether an added token is no text; where a tokenizer does not say so, llama.cpp goes by its looks and warns."""
    text = token["content"]
    marked = any(text.startswith(left) and text.endswith(right) for left, right in CONTROL_MARKS)
    return token["special"] or marked or text in CONTROL_WORDS


def _sentencepiece_added(token, model) -> tuple[str, int]:
    text = token["content"]
    if _is_control(token):
        return text, TokenType.UNKNOWN if text == model.get("unk_token") else TokenType.CONTROL
    if token["normalized"]:  # llama.cpp looks for it in the raw text, before spaces become visible
        return text.replace(SPACE, " "), TokenType.USER_DEFINED
    # A run of visible spaces stands for itself when it is looked for, and for spaces when it is merged.
    return text, TokenType.NORMAL if set(text) == {SPACE} and text in model["vocab"] else TokenType.USER_DEFINED


def _is_byte(text) -> bool:
    return len(text) == 6 and text.startswith("<0x")


def _scores(content, vocab_size) -> list[float]:
    """llama.cpp merges the pair whose token has the highest score: minus the rank of the first merge that makes it."""
    vocab, added = content["model"]["vocab"], {token["id"] for token in content["added_tokens"]}
    made = dict.fromkeys(vocab[left + right] for left, right in _merges(content))
    pieces = [i for text, i in vocab.items() if i not in made and i not in added and not _is_byte(text)]
    scores = [0.0] * vocab_size
    for rank, i in enumerate([*made, *sorted(pieces)]):
        scores[i] = -float(rank)
    return scores


def _prepends_space(content) -> bool:
    """Whether a space is put before a text; what else is done to a text must be what llama.cpp does."""
    normalizer, splitter = content.get("normalizer") or {}, content.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    kinds = [step["type"] for step in steps]
    at_spaces = splitter.get("type") in (None, "Metaspace") or splitter.get("pattern") == {"String": " "}
    if not set(kinds) <= {"Prepend", "Replace"} or not at_spaces:
        raise InputError(
            f"tokenizer.json: llama.cpp has no SentencePiece tokenizer with the normalizer {kinds} and the"
            f" pre_tokenizer {splitter.get('type')}"
        )
    return "Prepend" in kinds or (splitter.get("type") == "Metaspace" and splitter["prepend_scheme"] != "never")


def _add_specials(writer, tokenizer, config):
    ids = {name: _special_id(tokenizer, config, f"{name}_token_id") for name in SPECIALS}
    leading, trailing = leading_special_tokens(tokenizer), _trailing_special_tokens(tokenizer)
    for name, found in (("bos", leading), ("eos", trailing)):
        if len(found) > 1 or (found and ids[name] not in (None, found[0])):
            raise InputError(f"the tokenizer adds {found} to every text; llama.cpp can only add its {name} token")
        ids[name] = found[0] if found else ids[name]
    for name, i in ids.items():
        if i is not None and 0 <= i < config.vocab_size:
            getattr(writer, f"add_{name}_token_id")(i)
    writer.add_add_bos_token(bool(leading))
    writer.add_add_eos_token(bool(trailing))
    templates = tokenizer.chat_template or {}
    for name, text in ({"default": templates} if isinstance(templates, str) else templates).items():
        key = Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name)
        writer.add_string(Keys.Tokenizer.CHAT_TEMPLATE if name == "default" else key, text)


def _special_id(tokenizer, config, name) -> int | None:
    own, configured = getattr(tokenizer, name), getattr(config, name, None)
    configured = configured[0] if isinstance(configured, list) and configured else configured
    return configured if own is None else own


def _trailing_special_tokens(tokenizer) -> list[int]:
    """What the tokenizer itself puts behind a text."""
    leading, plain = leading_special_tokens(tokenizer), tokenizer("a", add_special_tokens=False)["input_ids"]
    return tokenizer("a")["input_ids"][len(leading) + len(plain) :]
