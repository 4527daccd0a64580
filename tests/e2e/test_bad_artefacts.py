"""ptq.evaluate on broken quantized folders and with bad arguments: one line on stderr, status 2."""

import json
import shutil

import pytest
import torch
from commands import run, token_file
from damage import WEIGHTS, config, cut, edit_json, edit_tensors, refused, set_values
from tiny_models import TEXT, make_tiny

from ptq import evaluate, quantize


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A model, and `packed`: the same quantized."""
    folder = tmp_path_factory.mktemp("pristine")
    make_tiny("llama", folder / "model")
    tokens = token_file(folder / "c.npy", 4, 32)
    (folder / "text.txt").write_text(TEXT * 20)
    flags = f"--bits 4 --group 32 --model {folder}/model --calibration {tokens} --heldout none --out {folder}/packed"
    quantize.main(flags.split())
    return folder


@pytest.fixture
def here(pristine, tmp_path, monkeypatch):
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def without(name):
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.pop(name))


def changed(name, function):
    def change(tensors):
        tensors[name] = function(tensors[name])

    return lambda folder: edit_tensors(folder, change)


def setting(**values):
    def change(folder):
        quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
        edit_json(folder / "config.json", quantization_config=quantization | values)

    return change


Q = "model.layers.0.self_attn.q_proj"
PACKED = {
    "no scales": (without(f"{Q}.scales"), f"{Q} lacks scales"),
    "no words": (without(f"{Q}.qweight"), f"lacks {Q}.weight"),
    "scales of another shape": (changed(f"{Q}.scales", lambda t: t[:1].clone()), "scales is F16 [1, 64]", "[2, 64]"),
    "scales of no shape": (changed(f"{Q}.scales", lambda t: t[0, 0].clone()), f"{Q}.scales is F16 []"),
    "zeros of floats": (changed(f"{Q}.qzeros", lambda t: t.float()), f"{Q}.qzeros is F32"),
    "words of another shape": (changed(f"{Q}.qweight", lambda t: t[:, :32].clone()), f"{Q}."),
    "words without columns": (changed(f"{Q}.qweight", lambda t: t[:, 0].clone()), f"{Q}."),
    "g_idx out of range": (changed(f"{Q}.g_idx", lambda t: t + 1), "g_idx spans 1..2, outside the 2 groups"),
    "NaN scales": (changed(f"{Q}.scales", lambda t: t * torch.nan), f"{Q}.scales holds NaN"),
    "NaN in what was copied": (set_values("model.norm.weight", torch.nan), "model.norm.weight holds NaN"),
    "another width": (setting(bits=8), "bits 8 and group_size 32 ask for"),
    "no width": (setting(bits=None), "bits None, group_size 32 are no GPTQ layout"),
    "group 0": (setting(group_size=0), "group_size 0 are no GPTQ layout"),
    "unknown format": (setting(checkpoint_format="marlin"), "checkpoint_format 'marlin' is not read here"),
    "another method": (setting(quant_method="awq"), "quant_method 'awq' is not read here"),
    "an empty quantization": (config(quantization_config={}), "quant_method None is not read here"),
    "config of another shape": (config(intermediate_size=96), "config.json asks for (96, 64)"),
    "cut short": (cut(WEIGHTS, -5), "cut short or damaged"),
}


@pytest.mark.parametrize(("damage", "words"), [(d, w) for d, *w in PACKED.values()], ids=PACKED)
def test_evaluate_a_broken_folder(here, capsys, damage, words):
    damage(here / "packed")
    refused(capsys, evaluate, ["packed", "--text", "c.npy"], *words)


EVALUATIONS = {
    "nowhere/at/all --text c.npy": "there is no such folder",
    "model --text short.txt": "one window needs 256",
    "model --text c.npy --max-tokens 3": "less than one window",
    "model --text text.txt --seqlen 1": "windows of 1 token predict nothing",
    "model --text text.txt --seqlen 999": "longer than the model's context",
    "model --corpus lore": "invalid choice: 'lore'",
    "model --text c.npy --device cuda:99": "is not here",
}


@pytest.mark.parametrize("arguments", EVALUATIONS)
def test_evaluate_with_bad_arguments(here, capsys, arguments):
    (here / "short.txt").write_text("short")
    refused(capsys, evaluate, arguments.split(), EVALUATIONS[arguments])


def test_evaluate_in_a_process_of_its_own(here):
    done = run("evaluate", "model", "--text", "text.txt", "--seqlen", "64", "--json")
    assert done.returncode == 0 and done.stderr == ""
    result = json.loads(done.stdout)
    assert result["seqlen"] == 64 and result["tokens"] % 63 == 0
