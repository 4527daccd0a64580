"""ptq.generate: the text is that of transformers' own model; what a user can get wrong is one line."""

import json
import shutil

import pytest
import torch
from commands import run, token_file
from damage import WEIGHTS, cut, edit_json, refused, set_values
from tiny_models import make_tiny
from transformers import AutoModelForCausalLM

from ptq import generate, quantize
from ptq.continuation import continuation, prompt_tokens
from ptq.generate import side_by_side
from ptq.load import load_model
from ptq.reload import GptqCheckpoint, open_weights

PROMPT = "def quantize(weight"
TEMPLATE = "{% for m in messages %}<s>{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A model, and `packed`: the same quantized."""
    folder = tmp_path_factory.mktemp("pristine")
    make_tiny("llama", folder / "model", dtype="bfloat16")
    tokens = token_file(folder / "c.npy", 4, 32)
    flags = f"--bits 4 --group 32 --model {folder}/model --calibration {tokens} --heldout none --out {folder}/packed"
    quantize.main(flags.split())
    return folder


@pytest.fixture
def here(pristine, tmp_path, monkeypatch):
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def reference(folder, ids, new, state=None, **options):
    """What transformers' own loader and generate() say; `state` replaces weights."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if state:
        model.load_state_dict(state, strict=False)
    return model.generate(ids, max_new_tokens=new, pad_token_id=1, **options)[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("model_type", ["gpt_bigcode", "gemma2", "opt"])
def test_tokens_are_those_of_transformers(model_type, tmp_path):
    folder = make_tiny(model_type, tmp_path / "model")
    loaded = load_model(folder)
    ids = prompt_tokens(loaded, PROMPT)
    assert continuation(loaded, ids, max_new_tokens=12) == reference(folder, ids, 12, do_sample=False)


def test_a_packed_folder_says_what_its_dequantized_weights_say(here):
    loaded = load_model("packed")
    packed = open_weights("packed")
    assert isinstance(packed, GptqCheckpoint)
    ids = prompt_tokens(loaded, PROMPT)
    state = {name: tensor.float() for name, tensor in packed.read(packed.names()).items()}
    expected = reference("model", ids, 12, state, do_sample=False)
    assert continuation(loaded, ids, max_new_tokens=12) == expected != reference("model", ids, 12, do_sample=False)


def test_drawing_follows_the_seed_and_the_folder_s_own_settings_do_not_interfere(here):
    edit_json("model/generation_config.json", do_sample=True, temperature=9.0, top_k=2)
    loaded = load_model("model")
    ids = prompt_tokens(loaded, PROMPT)
    greedy = reference("model", ids, 8, do_sample=False)
    assert continuation(loaded, ids, max_new_tokens=8) == greedy
    drawn = [continuation(loaded, ids, max_new_tokens=8, temperature=5.0, seed=seed) for seed in (0, 1, 0)]
    assert drawn[0] == drawn[2] != drawn[1]
    # A nucleus of next to nothing holds one token.
    assert continuation(loaded, ids, max_new_tokens=8, temperature=5.0, top_p=1e-6) == greedy


def test_the_command_prints_the_new_text_alone(here, capsys):
    loaded = load_model("model")
    new = continuation(loaded, prompt_tokens(loaded, PROMPT), max_new_tokens=20)
    generate.main(["model", "--prompt", PROMPT, "--max-new-tokens", "20"])
    assert capsys.readouterr().out == loaded.tokenizer.decode(new, skip_special_tokens=True) + "\n"


def test_chat_puts_the_prompt_into_the_template(here):
    edit_json("model/tokenizer_config.json", chat_template=TEMPLATE)
    loaded = load_model("model")
    plain, chat = (prompt_tokens(loaded, PROMPT, chat=chat)[0].tolist() for chat in (False, True))
    assert chat == [loaded.tokenizer.bos_token_id, *plain]


def test_compare_prints_two_columns(here, capsys):
    generate.main(["model", "--prompt", PROMPT, "--max-new-tokens", "9", "--compare", "packed"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["model", "|", "packed"] and printed[-1].startswith("the same for ")
    generate.main(["model", "--prompt", PROMPT, "--max-new-tokens", "9", "--compare", "model"])
    assert capsys.readouterr().out.splitlines()[-1] == "the same 9 tokens"


def test_columns_wrap_and_end_evenly():
    assert side_by_side(["a", "b"], ["one two three four five six", "1\n\n  2"], 45).splitlines() == [
        "a                     |  b",
        "--------------------  |  --------------------",
        "one two three four    |  1",
        "five six              |",
        "                      |    2",
    ]


def test_without_generation_config(here):
    (here / "model/generation_config.json").unlink()
    loaded = load_model("model")
    ids = prompt_tokens(loaded, PROMPT)
    assert continuation(loaded, ids, max_new_tokens=6) == reference("model", ids, 6, do_sample=False)


BAD_FLAGS = {
    "--max-new-tokens 0": "--max-new-tokens 0 must be at least 1",
    "--max-new-tokens 999": "tokens and 999 new ones pass the model's context of 256 positions",
    "--temperature -1": "--temperature -1 must be 0 or more",
    "--temperature nan": "--temperature nan must be 0 or more",
    "--top-p 0": "--top-p 0 is not above 0",
    "--top-p 1.5": "--top-p 1.5 is not above 0 and at most 1",
    "--seed -1": "--seed -1 is not in 0",
    "--chat": "its tokenizer has no chat template",
    "--device tpu": "device 'tpu'",
    "--dtype int8": "dtype 'int8'",
    "--compare nowhere/at/all": "nowhere/at/all: there is no such folder",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags(here, capsys, flags):
    refused(capsys, generate, ["model", "--prompt", PROMPT, *flags.split()], BAD_FLAGS[flags])


def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def broken_template(folder):
    edit_json(folder / "tokenizer_config.json", chat_template="{{ raise_exception('no user turns') }}")


DAMAGES = {
    "no tokenizer": (no_tokenizer, "has no usable tokenizer"),
    "generation settings cut short": (cut("generation_config.json", 9), "generation_config.json: transformers cannot"),
    "weights cut short": (cut(WEIGHTS, -3), "cut short or damaged"),
    "NaN": (set_values("model.norm.weight", torch.nan), "model.norm.weight holds NaN"),
    "a template that fails": (broken_template, "its chat template fails (TemplateError: no user turns)"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_folder(here, capsys, damage, words):
    damage(here / "model")
    refused(capsys, generate, ["model", "--prompt", PROMPT, "--chat"], words)


def test_empty_prompt_and_another_model_s_tokenizer(here, capsys):
    refused(capsys, generate, ["model", "--prompt", ""], "the prompt '' has no tokens")
    words = json.loads((here / "model/tokenizer.json").read_text())
    edit_json("model/tokenizer.json", added_tokens=[*words["added_tokens"], words["added_tokens"][0] | {
        "id": 300, "content": "extra"}])  # fmt: skip
    refused(capsys, generate, ["model", "--prompt", "extra"], "its tokenizer gives id 300; the vocabulary is 300 ids")


def test_in_a_process_of_its_own(here):
    done = run("generate", "packed", "--prompt", PROMPT, "--max-new-tokens", "5")
    assert done.returncode == 0 and done.stderr == "" and done.stdout
