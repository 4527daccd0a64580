"""Text becomes the same tokens in llama.cpp, in Hugging Face's tokenizer, and in what a GGUF file reads back as."""

import json
import shutil
from itertools import zip_longest

import pytest
from llama_client import open_llama
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from calibration.errors import InputError
from ptq.checkpoint import open_checkpoint
from ptq.export.gguf.pretokenizers import PRE_TOKENIZERS, recognise, to_json
from ptq.export.gguf.writer import write_gguf
from ptq.gguf.file import GgufFile
from ptq.gguf.tokenizer import read_tokenizer
from ptq.reload import load_tokenizer

TRICKY = [
    "", " ", "  ", "\n", "\t", " leading", "trailing ", "trailing  \n", "Hello world", "  two  spaces   three",
    "\n\n\n a\n b\t\tc \r\n", "A  \n  B", "x" * 300, "3 33 333 3333 33333 3.14159 1,234,567 \u00bd \u2153 \u00b2",
    "\u0663\u0664\u0665 \u4e00\u4e8c", "I've we'll they'RE DON'T 'S 'tis",
    "na\u00efve caf\u00e9 \ufb01 \u00df \u0130 \u0131",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8 \u4e2d\u6587 \ud55c\uad6d\uc5b4",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0e44\u0e17\u0e22 \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "\U0001f680 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea", "a\u00a0b\u2003c\u200bd\ufeff",
    "\x00\x01\x7f", "def f(x):\n    return x**2  # comment\n", "...!!!??? ____ ---- ==== ''''",
    "http://a.b/c?d=e&f=g#h", "<s>hello</s> world <unk>", "<0x0A> \u2581 x\u2581y", "\u00e9" * 10,
    "<|endoftext|>after <|endoftext|> x", "<fim_prefix>a<fim_suffix>b", "<tool>x</tool> y <|im_start|>user\nhi",
    "a       b\n\n\nc", "        x",
]  # fmt: skip
SMALL = ["tokenizers/llama2-spm", "models/demo-llama", "models/stories260K", "models/babyllama-tok361"]
SHARED = [*SMALL, "tokenizers/gpt2", "tokenizers/starcoder"]
TEXTS = ["text/wiki.utf8", "text/c4.utf8", "text/code.utf8", "wikitext-2/wiki.test.raw",
         "code/python_llm-foundry_apache2.txt"]  # fmt: skip


def real_lines(shared, count):
    """Lines of every text, in turn."""
    texts = [[line for line in (shared / "data" / name).read_text().split("\n") if line] for name in TEXTS]
    lines = [line for lines in zip_longest(*texts) for line in lines if line is not None][:count]
    assert len(lines) == count
    return lines


def write_model(folder, tokenizer):
    """The smallest model that has the tokenizer, as a folder and as a GGUF file."""
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer) + 3, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    path = folder / "model.gguf"
    write_gguf(path, open_checkpoint(folder), {}, config=config, tokenizer=tokenizer)
    return path


def assert_same(path, tokenizer, texts):
    expected = [tokenizer(text)["input_ids"] for text in texts]
    file = GgufFile(path)
    stored = read_tokenizer(file)
    file.metadata.pop("tokenizer.huggingface.json")  # what files of others lack
    rebuilt = read_tokenizer(file)
    for text, ids in zip(texts, expected, strict=True):
        assert stored(text)["input_ids"] == rebuilt(text)["input_ids"] == ids, text
    llama = open_llama(path)
    assert llama.warnings == ""
    for text, ids in zip(texts, expected, strict=True):
        assert llama.tokenize(text) == ids, text
    llama.close()


@pytest.mark.parametrize("name", SMALL)
def test_shared_tokenizers(tmp_path, shared, name):
    tokenizer = AutoTokenizer.from_pretrained(shared / name)
    assert_same(write_model(tmp_path, tokenizer), tokenizer, TRICKY + real_lines(shared, 300))


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARED)
def test_shared_tokenizers_on_ten_thousand_lines(tmp_path, shared, name):
    tokenizer = AutoTokenizer.from_pretrained(shared / name)
    assert_same(write_model(tmp_path, tokenizer), tokenizer, TRICKY + real_lines(shared, 10_000))


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [("starcoder", "GPT2Tokenizer", "x            0, 1"), ("llama2-spm", "LlamaTokenizer", " leading </s> space")],
)
def test_tokenizer_json_is_taken_as_it_stands(tmp_path, shared, name, kind, text):
    """Whatever class tokenizer_config.json names; the hub's StarCoder and Llama 2 name these."""
    source = shared / "tokenizers" / name
    shutil.copyfile(source / "tokenizer.json", tmp_path / "tokenizer.json")
    config = json.loads((source / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": kind}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer(text)["input_ids"] == Tokenizer.from_file(str(source / "tokenizer.json")).encode(text).ids
    assert (tokenizer.bos_token, tokenizer.eos_token) == (config["bos_token"], config["eos_token"])


def train(name, *, normalizer=None, bos=False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that cuts text as one of llama.cpp's names says."""
    parts = json.loads(Tokenizer(models.BPE(ignore_merges=PRE_TOKENIZERS[name].ignore_merges)).to_str())
    tokenizer = Tokenizer.from_str(json.dumps(parts | {"pre_tokenizer": to_json(name)}))
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    specials, alphabet = ["<|begin|>", "<|end|>"], sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TRICKY + ["year 2024, 1234 words they've\n\n  return it's 99"] * 5, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("\n\n\n", normalized=False)])
    tokenizer.add_special_tokens([AddedToken("<|im_start|>", normalized=False)])
    if bos:
        single, pair = "<|begin|> $A", "<|begin|> $A <|begin|> $B"
        tokenizer.post_processor = processors.TemplateProcessing(single, pair, [("<|begin|>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>")


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_way_of_cutting(tmp_path, name):
    normalizer = normalizers.NFC() if name == "qwen2" else None
    tokenizer = train(name, normalizer=normalizer, bos=name == "llama-bpe")
    path = write_model(tmp_path, tokenizer)
    assert GgufFile(path).metadata["tokenizer.ggml.pre"] == name
    assert read_tokenizer(GgufFile(path)).chat_template is None
    assert_same(path, tokenizer, TRICKY + [f"{text} 12345 {text}" for text in TRICKY])


def test_sentencepiece_without_a_leading_space(tmp_path, shared):
    """Gemma's way: no space before the text, runs of spaces among the added tokens."""
    content = json.loads((shared / "models/stories260K/tokenizer.json").read_text())
    content["normalizer"] = content["normalizer"]["normalizers"][1]
    content["decoder"]["decoders"].pop()
    vocab = content["model"]["vocab"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for text, special in (("\u2581" * 4, False), ("\n\n\n", False), ("<|im_start|>", True)):
        i = vocab.setdefault(text, len(vocab))
        content["added_tokens"].append({"id": i, "content": text, "special": special} | flags)
    backend = Tokenizer.from_str(json.dumps(content))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    assert_same(write_model(tmp_path, tokenizer), tokenizer, TRICKY + real_lines(shared, 500))


@pytest.mark.parametrize(
    "change", [{"normalizer": {"type": "Lowercase"}}, {"pre_tokenizer": {"type": "Whitespace"}}], ids=["norm", "cut"]
)
def test_sentencepiece_with_more_steps_is_refused(tmp_path, shared, change):
    content = json.loads((shared / "models/stories260K/tokenizer.json").read_text()) | change
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), bos_token="<s>")
    with pytest.raises(InputError, match="no SentencePiece tokenizer with"):
        write_model(tmp_path, tokenizer)


def test_special_tokens_and_chat_template(tmp_path):
    tokenizer = train("gpt-2")
    tokenizer.chat_template = {"default": "{{ messages }}", "tool": "{{ tools }}"}
    path = write_model(tmp_path, tokenizer)
    metadata = GgufFile(path).metadata
    assert read_tokenizer(GgufFile(path)).chat_template == "{{ messages }}"
    assert metadata["tokenizer.chat_template"] == "{{ messages }}"
    assert metadata["tokenizer.chat_template.tool"] == "{{ tools }}"
    assert (metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    kinds = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"].tolist(), strict=True))
    assert [kinds[text] for text in ("<|im_start|>", "<tool>", "a", f"[PAD{len(tokenizer)}]")] == [3, 4, 1, 5]


ENDS = ["</s>", "<|im_end|>", "<end_of_turn>", "<EOT>", "<fim_prefix>", "<PRE>", "<reponame>", "<|file_sep|>"]


def test_added_tokens_that_look_special_are_control_tokens(tmp_path):
    """llama.cpp would take them for such, and say that the file is wrong."""
    tokenizer = train("gpt-2")
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ENDS])
    path = write_model(tmp_path, tokenizer)
    metadata = GgufFile(path).metadata
    kinds = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"].tolist(), strict=True))
    assert {kinds[text] for text in ENDS} == {3} and kinds["<tool>"] == 4
    assert_same(path, tokenizer, [f"a {text} b{text}" for text in ENDS])


def test_an_unknown_way_of_cutting_is_refused_and_can_be_named(tmp_path):
    tokenizer = train("gpt-2")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with pytest.raises(InputError, match="give the right one with --pre-tokenizer NAME"):
        write_model(tmp_path, tokenizer)
    config = AutoConfig.from_pretrained(tmp_path)
    options = dict(config=config, tokenizer=tokenizer, pre_tokenizer="tekken")
    write_gguf(tmp_path / "named.gguf", open_checkpoint(tmp_path), {}, **options)
    assert GgufFile(tmp_path / "named.gguf").metadata["tokenizer.ggml.pre"] == "tekken"


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": to_json("starcoder") | {"pretokenizers": to_json("starcoder")["pretokenizers"][::-1]}},
    ],
)
def test_near_misses_are_not_recognised(change):
    content = {"normalizer": None, "pre_tokenizer": to_json("gpt-2"), "model": {"ignore_merges": False}}
    assert recognise(content) == "gpt-2"
    with pytest.raises(InputError):
        recognise(content | change)
    with pytest.raises(InputError):
        recognise(content | {"model": {"ignore_merges": True}})


def test_tokenizers_of_other_kinds_are_refused(tmp_path):
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1})))
    with pytest.raises(InputError, match="WordPiece"):
        write_model(tmp_path, other)
    shutil.rmtree(tmp_path)
    tokenizer = train("gpt-2")
    config = AutoConfig.from_pretrained(write_model(tmp_path, tokenizer).parent)
    config.vocab_size = 100
    with pytest.raises(InputError, match="embedding has 100 rows"):
        write_gguf(tmp_path / "m.gguf", open_checkpoint(tmp_path), {}, config=config, tokenizer=tokenizer)
