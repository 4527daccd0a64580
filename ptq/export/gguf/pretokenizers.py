r"""How byte-level BPE tokenizers cut text before merging, by llama.cpp's names.

llama.cpp knows each way of cutting by a name in the file and has it as code. Here a name is recognised by what the
tokenizer.json says, step by step, and the same table makes a tokenizer out of a name. A tokenizer whose steps are not
in the table is refused: under a wrong name numbers, spaces or contractions would be cut elsewhere, silently.

NFC normalisation is something llama.cpp does not do; it changes no text that is already composed, as nearly all is.
"""

from dataclasses import dataclass

from calibration.errors import InputError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTIONS + _WORDS + r"\p{N}" + _REST

_DIGITS = ("Digits", True)
_GPT2 = ("ByteLevel", True)
_BYTES = ("ByteLevel", False)


@dataclass(frozen=True)
class PreTokenizer:
    """One way of cutting.

    Attributes:
        steps: ("Split", regex), ("Digits", one by one) or ("ByteLevel", whether it cuts by GPT-2's regex).
        ignore_merges: A piece that is a token is taken whole, whatever the merges say.
    """

    steps: tuple[tuple[str, object], ...]
    ignore_merges: bool = False


PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "gpt-2": PreTokenizer((_GPT2,)),
    "starcoder": PreTokenizer((_DIGITS, _GPT2)),
    "llama-bpe": PreTokenizer((("Split", _LLAMA3), _BYTES), ignore_merges=True),
    "dbrx": PreTokenizer((("Split", _LLAMA3), _BYTES)),
    "qwen2": PreTokenizer((("Split", _QWEN2), _BYTES)),
}


def recognise(content: dict) -> str:
    """llama.cpp's name for the cutting of a parsed tokenizer.json.

    Raises:
        InputError: None of the names means it.
    """
    normalizer = (content.get("normalizer") or {}).get("type")
    found = PreTokenizer(_steps(content.get("pre_tokenizer")), bool(content["model"].get("ignore_merges")))
    for name, known in PRE_TOKENIZERS.items():
        if found == known and normalizer in (None, "NFC"):
            return name
    raise InputError(
        f"tokenizer.json: its pre_tokenizer is none that is known by a llama.cpp name ({', '.join(PRE_TOKENIZERS)});"
        " give the right one with --pre-tokenizer NAME"
    )


def to_json(name: str) -> dict:
    """The pre_tokenizer of a tokenizer.json for one of the names."""
    return {"type": "Sequence", "pretokenizers": [_step_json(*step) for step in PRE_TOKENIZERS[name].steps]}


def _steps(part: dict | None) -> tuple:
    """A pre_tokenizer as steps; what has no place in the table comes out as its type alone."""
    if part is None:
        return ()
    kind = part.get("type")
    if kind == "Sequence":
        return tuple(step for inner in part["pretokenizers"] for step in _steps(inner))
    if kind == "Digits":
        return ((kind, part["individual_digits"]),)
    if kind == "ByteLevel" and not part["add_prefix_space"]:
        return ((kind, part.get("use_regex", True)),)
    if kind == "Split" and part["behavior"] == "Isolated" and not part["invert"] and "Regex" in part["pattern"]:
        return ((kind, part["pattern"]["Regex"]),)
    return ((kind, None),)


def _step_json(kind, value) -> dict:
    if kind == "Split":
        return {"type": kind, "pattern": {"Regex": value}, "behavior": "Isolated", "invert": False}
    if kind == "Digits":
        return {"type": kind, "individual_digits": value}
    return {"type": kind, "add_prefix_space": False, "trim_offsets": True, "use_regex": value}
