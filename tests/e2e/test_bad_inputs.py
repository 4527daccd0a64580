"""What a user can get wrong, through the real command lines: one line on stderr, status 2, nothing left behind."""

import json
import os
import resource
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import read_report, run, token_file
from damage import WEIGHTS, assert_one_line, config, cut, edit_json, edit_tensors, refused, set_values, write
from safetensors.torch import load_file, save_file
from tiny_models import TEXT, make_tiny

from ptq import quantize
from ptq.demo import DEMO

INDEX = "model.safetensors.index.json"
FIRST = "model.layers.0.self_attn.q_proj.weight"
QUICK = "--bits 4 --group 32 --samples 4 --seqlen 32 --heldout none"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return make_tiny("llama", tmp_path_factory.mktemp("pristine") / "model")


@pytest.fixture
def here(pristine, tmp_path, monkeypatch):
    """A folder of its own for each test, with a model, token rows and a text; the current one."""
    shutil.copytree(pristine, tmp_path / "model")
    token_file(tmp_path / "c.npy", 4, 32)
    (tmp_path / "text.txt").write_text(TEXT * 20)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def only_pickle(folder):
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK")


def shard_index(weight_map):
    def change(folder):
        (folder / WEIGHTS).rename(folder / "part.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return change


def narrower(tensors):
    tensors[FIRST] = tensors[FIRST][:, :32].contiguous()


def integers(tensors):
    tensors[FIRST] = tensors[FIRST].to(torch.int8)


def odd_outputs(folder):
    shutil.rmtree(folder)
    make_tiny("llama", folder)
    tensors = load_file(folder / WEIGHTS)
    for name, tensor in tensors.items():
        if "mlp" in name:
            tensors[name] = (tensor[:, :80] if "down" in name else tensor[:80]).contiguous()
    save_file(tensors, folder / WEIGHTS)
    edit_json(folder / "config.json", intermediate_size=80)


REMOTE = {"model_type": "mystery", "auto_map": {"AutoModelForCausalLM": "modeling.Mystery"}}

MODELS = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json: is missing"),
    "config cut short": (cut("config.json", 40), "config.json: cannot be read as JSON"),
    "config that no model fits": (config(num_attention_heads=0), "config.json: transformers cannot build"),
    "config with a word for a number": (config(hidden_size="wide"), "config.json: transformers cannot build"),
    "countless blocks": (config(num_hidden_layers=2**31), "num_hidden_layers is 2147483648; the checkpoint has 21"),
    "unknown activation": (config(hidden_act="nope"), "config.json: transformers cannot build"),
    "no model_type": (config(model_type=None), "no model_type; known: "),
    "unknown model_type": (config(model_type="bert"), "'bert' is not a known family; known: apertus"),
    "remote code only": (config(**REMOTE), "'mystery'", "--trust-remote-code"),
    "quantized already": (config(quantization_config={"quant_method": "awq"}), "is quantized already"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"has no {WEIGHTS}"),
    "pickles": (only_pickle, "pickle", "never read"),
    "weights cut short": (cut(WEIGHTS, -1), WEIGHTS, "cut short or damaged"),
    "weights of zero bytes": (cut(WEIGHTS, 0), WEIGHTS, "0 bytes"),
    "header of noise": (write(WEIGHTS, b"\x09" + bytes(7) + b"not json!"), WEIGHTS, "not a whole safetensors file"),
    "index out of the folder": (shard_index({FIRST: "../../part.safetensors"}), INDEX, "plain .safetensors file name"),
    "index to a missing shard": (shard_index({FIRST: "gone.safetensors"}), "'gone.safetensors', which is missing"),
    "index to a missing tensor": (shard_index({"no": "part.safetensors"}), "'no' is not in 'part.safetensors'"),
    "a tensor missing": (lambda folder: edit_tensors(folder, lambda t: t.pop(FIRST)), f"lacks {FIRST}"),
    "a tensor of another shape": (lambda folder: edit_tensors(folder, narrower), FIRST, "has shape (64, 32)"),
    "config of another shape": (config(vocab_size=299), "has shape (300, 64); config.json asks for (299, 64)"),
    "weights of integers": (lambda folder: edit_tensors(folder, integers), f"{FIRST} is stored as I8"),
    "odd inputs": (odd_outputs, "has 80 outputs, and GPTQ files pack 32 at a time"),
    "NaN": (set_values("model.layers.1.mlp.up_proj.weight", torch.nan, (3, 4)), "up_proj.weight holds NaN or inf"),
    "infinity": (set_values("model.norm.weight", torch.inf, 5), "model.norm.weight holds NaN or infinite"),
    "activations that overflow": (
        set_values("model.layers.1.input_layernorm.weight", 1e38),
        "the activations that leave model.layers.1 are not finite",
    ),
}


@pytest.mark.parametrize(("damage", "words"), [(d, w) for d, *w in MODELS.values()], ids=MODELS)
def test_damaged_model(here, capsys, damage, words):
    damage(here / "model")
    flags = QUICK.replace("--heldout none", "--heldout c.npy").split()
    refused(capsys, quantize, ["--model", "model", "--calibration", "c.npy", "--out", "new/out", *flags], *words)


def save(name, array, **options):
    return lambda: np.save(name, array, **options)


CALIBRATIONS = {
    "id out of vocabulary": ("x.npy", save("x.npy", np.full((4, 32), 300)), "token id 300", "vocabulary is 300 ids"),
    "negative id": ("x.npy", save("x.npy", np.full((4, 32), -1)), "token id -1"),
    "rows of floats": ("x.npy", save("x.npy", np.ones((4, 32))), "must be an integer type"),
    "one row without a second dimension": ("x.npy", save("x.npy", np.ones(32, int)), "must have two dimensions"),
    "rows longer than the context": ("x.npy", save("x.npy", np.ones((1, 257), int)), "context of 256 positions"),
    "pickled rows": ("x.npy", save("x.npy", np.array([None]), allow_pickle=True), "not a readable .npy"),
    "rows cut short": ("x.npy", lambda: Path("x.npy").write_bytes(Path("c.npy").read_bytes()[:-9]), "not a readable"),
    "missing rows": ("x.npy", None, "x.npy: no such file"),
    "missing text": ("x.txt", None, "x.txt: no such file"),
    "empty text": ("x.txt", lambda: Path("x.txt").touch(), "x.txt: is empty"),
    "text of spaces": ("x.txt", lambda: Path("x.txt").write_text("  \n "), "x.txt: holds no text"),
    "text too short": ("x.txt", lambda: Path("x.txt").write_text("short"), "tokens; 4 samples of 32 need 128"),
    "text in Latin-1": ("x.txt", lambda: Path("x.txt").write_bytes(b"caf\xe9 " * 99), "not UTF-8 at byte 3"),
    "broken JSON lines": ("x.jsonl", lambda: Path("x.jsonl").write_text('{"text": 1'), "line 1: malformed JSON"),
    "broken parquet": ("x.parquet", lambda: Path("x.parquet").write_bytes(b"PAR1"), "not a readable parquet"),
    "a format that is none": ("x.pdf", lambda: Path("x.pdf").write_bytes(b"%PDF"), "'.pdf' is not a text format"),
    "unknown corpus": ("wikitext9", None, "'wikitext9' is not a corpus; known: wikitext2"),
}


@pytest.mark.parametrize("name", CALIBRATIONS)
def test_bad_calibration(here, capsys, name):
    source, make, *words = CALIBRATIONS[name]
    if make:
        make()
    refused(capsys, quantize, ["--model", "model", "--calibration", source, "--out", "out", *QUICK.split()], *words)


TOKENIZERS = {
    "of another model": (lambda folder: shutil.copy(DEMO / "tokenizer.json", folder), "text.txt", "through this"),
    "cut short": (cut("tokenizer.json", 99), "text.txt", "has no usable tokenizer"),
    "missing, and a text to measure on": (lambda folder: (folder / "tokenizer.json").unlink(), "c.npy", "--heldout"),
}


@pytest.mark.parametrize(("damage", "source", "word"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_bad_tokenizer(here, capsys, damage, source, word):
    damage(here / "model")
    flags = QUICK.replace("--heldout none", "--heldout text.txt").split()
    refused(capsys, quantize, ["--model", "model", "--calibration", source, "--out", "out", *flags], word)


FLAGS = {
    "--bits 0": "bits 0 is none of 1, 1.58, 2, 3",
    "--bits 5": "bits 5: GPTQ files hold weights of 2, 3, 4 or 8 bits",
    "--bits 9": "bits 9 is none of 1, 1.58, 2, 3",
    "--bits x": "argument --bits: invalid width value: 'x'",
    "--bits 1 --asym": "bits 1 has only the symmetric grid of 2 values",
    "--bits 1.58 --asym": "bits 1.58 has only the symmetric grid of 3 values",
    "--bits 1.5": "bits 1.5 is none of 1, 1.58, 2, 3",
    "--group 0": "group 0 is neither -1",
    "--group -7": "group -7 is neither -1",
    "--group 65": "group 65 is longer than the 64 inputs",
    "--samples 0": "samples 0 must be at least 1",
    "--seed -1": "seed -1 must be at least 0",
    "--seqlen 0": "seqlen 0 must be at least 1",
    "--seqlen 257": "seqlen 257 is longer than the model's context of 256",
    "--heldout text.txt --seqlen 1": "windows of 1 token predict nothing",
    "--heldout nothing.txt": "nothing.txt: no such file",
    "--device tpu": "device 'tpu' is not auto, cpu, cuda or cuda:N",
    "--device cuda:99": "device 'cuda:99' is not here",
    "--dtype int8": "dtype 'int8' is not auto, float32",
    "--method awq": "argument --method: invalid choice: 'awq'",
    "--format ggml": "argument --format: invalid choice: 'ggml'",
    "--model nowhere/at/all": "nowhere/at/all: there is no such folder",
    "--model text.txt": "text.txt: is a file",
    "--out text.txt": "text.txt: exists already",
    "--out model": "model: exists already",
    "--out text.txt/out": "text.txt/out.ptq-work: Not a directory",
    "--out model --resume": "model: exists already and is not this run's",
}


@pytest.mark.parametrize("flags", FLAGS)
def test_bad_flags(here, capsys, flags):
    base = ["--model", "model", "--calibration", "text.txt", "--out", "new/out", *QUICK.split()]
    refused(capsys, quantize, [*base, *flags.split()], FLAGS[flags])


def test_output_that_is_a_broken_link(here, capsys):
    (here / "out").symlink_to("nowhere")
    refused(capsys, quantize, ["--model", "model", "--calibration", "c.npy", "--out", "out", *QUICK.split()], "exists")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "model"], ["corpus c4: could not fetch", "without network use stdlib"]),
        (["--model", "nobody/no-such-model"], ["'nobody/no-such-model' is no folder here", "hub did not give it"]),
    ],
)
def test_no_network(here, flags, words):
    done = run("quantize", *flags, "--out", "out", *QUICK.split())
    assert done.returncode == 2 and done.stdout == ""
    assert_one_line(done.stderr, *words)
    assert not list(here.glob("out*"))


# The disk


@contextmanager
def largest_file(size):
    """This process may write no larger file; not a fixture, which would still hold while pytest writes its own log."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_disk_that_fails_before_the_first_block(here, capsys):
    flags = ["--model", "model", "--calibration", "c.npy", "--out", "new/out", *QUICK.split()]
    with largest_file(10_000):
        refused(capsys, quantize, flags, "File too large")


def test_disk_that_fails_later_keeps_what_is_finished(here, capsys):
    flags = ["--model", "model", "--calibration", "c.npy", "--out", "out", "--fisher-tokens", "0", *QUICK.split()]
    with largest_file(100_000), pytest.raises(SystemExit) as left:  # a block fits, the whole file does not
        quantize.main(flags)
    assert left.value.code == 2 and not Path("out").exists()
    assert_one_line(capsys.readouterr().err, "File too large; 2 finished blocks stay in out.ptq-work, --resume goes on")
    quantize.main([*flags, "--resume"])
    assert read_report(Path("out"))["resumed"] and not Path("out.ptq-work").exists()


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of a few pages, where this user may."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no file systems may be mounted here")
        mounted.append(folder)
        return folder

    yield mount
    for each in mounted:
        subprocess.run(["umount", str(each)], check=True)


@pytest.mark.parametrize(
    ("options", "word"), [("size=16k", "No space left on device"), ("ro", "Read-only file system")]
)
def test_disk_that_takes_nothing(here, capsys, small_disk, options, word):
    flags = ["--model", "model", "--calibration", "c.npy", "--out", f"{small_disk(options)}/new/out", *QUICK.split()]
    refused(capsys, quantize, flags, word)


@pytest.mark.skipif(os.geteuid() == 0, reason="a superuser may write anywhere")
def test_folder_that_may_not_be_written(here, capsys):
    (here / "locked").mkdir(mode=0o555)
    flags = ["--model", "model", "--calibration", "c.npy", "--out", "locked/new/out", *QUICK.split()]
    refused(capsys, quantize, flags, "Permission denied")


# Inputs that are unusual and must work


def test_dead_inputs_are_reported(here):
    edit_tensors(here / "model", lambda t: t["model.layers.0.input_layernorm.weight"][:8].zero_())
    quantize.main(["--model", "model", "--calibration", "c.npy", "--out", "out", *QUICK.split()])
    linears = read_report(Path("out"))["linears"]
    assert linears["model.layers.0.self_attn.q_proj"]["dead_inputs"] == 8 / 64
    assert linears["model.layers.1.self_attn.q_proj"]["dead_inputs"] == 0


def test_inputs_that_are_all_zero(here):
    edit_tensors(here / "model", lambda t: t["model.layers.0.input_layernorm.weight"].zero_())
    quantize.main(["--model", "model", "--calibration", "c.npy", "--out", "out", *QUICK.split()])
    assert read_report(Path("out"))["linears"]["model.layers.0.self_attn.q_proj"]["dead_inputs"] == 1


def test_group_that_does_not_divide(here):
    flags = QUICK.replace("--group 32", "--group 48").split()
    quantize.main(["--model", "model", "--calibration", "c.npy", "--out", "out", *flags])
    verdicts = read_report(Path("out"))["runtimes"]
    assert verdicts and not any(verdict["loads"] for verdict in verdicts)
    assert all(verdict["why"] for verdict in verdicts)
