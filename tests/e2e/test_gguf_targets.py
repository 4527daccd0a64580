"""`--target-bpw` and `--target-size`: the file has the size, a killed run goes on with the same types, bad targets."""

import math
from pathlib import Path

import pytest
from commands import token_file
from damage import refused
from tiny_models import make_tiny

from ptq import QuantSpec, quantize, quantize_model
from ptq.checkpoint import open_checkpoint
from ptq.gguf.file import GgufFile
from ptq.workdir import WorkFolder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_tiny("llama", tmp_path / "model", tie=True)
    token_file(tmp_path / "c.npy", 6, 32)
    return tmp_path


def made(out="out", resume=False, **options):
    """The file, and the report's part on types."""
    spec = QuantSpec(checkpoint_format="gguf", refine_rounds=1, **options)
    artefact = quantize_model("model", spec, out=out, calibration="c.npy", heldout="none", resume=resume)
    (path,) = artefact.folder.glob("*.gguf")
    return path, artefact.report["mixture"]


def test_bits_a_weight(folder):
    path, mixture = made(target_bpw=4.0)
    source, stored = open_checkpoint("model"), GgufFile(path).tensors
    weights = sum(math.prod(source.shape(name)) for name in source.names())
    size = sum(math.prod(t.shape[:-1]) * t.ggml_type.row_bytes(t.shape[-1]) for t in stored.values())
    assert path.name == "model-4bpw.gguf" and mixture["size"] == size
    assert 0.99 * 4.0 <= 8 * size / weights == mixture["bits"] <= 4.0
    assert len({t.ggml_type.name for t in stored.values() if len(t.shape) > 1}) > 1
    assert [row["kl"] for row in mixture["table"]] == sorted((row["kl"] for row in mixture["table"]), reverse=True)
    assert mixture["kl"] in [row["kl"] for row in mixture["table"] if row["budget"] == mixture["budget"]]


def test_bytes_of_the_file(folder):
    """Metadata count: what was predicted is the length of the file, to the byte."""
    target = made(target_bpw=5.0)[0].stat().st_size
    path, mixture = made(out="again", target_bytes=target + 100)
    assert 0.99 * target <= path.stat().st_size == mixture["size"] <= target + 100


@pytest.mark.parametrize("after", ["plan", "tables", "block"])
def test_killed_and_resumed(folder, monkeypatch, after):
    expected = made(target_bpw=4.0)[0].read_bytes()
    method = "save_block" if after == "block" else "save_part"
    keep = getattr(WorkFolder, method)

    def killed(self, name, *rest):
        keep(self, name, *rest)
        if name in (after, 0):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(WorkFolder, method, killed)
        made(out="second", target_bpw=4.0)
    measured = []
    monkeypatch.setattr("ptq.mixture.mixture.Survey.run", lambda self, tokens: measured.append(tokens))
    assert made(out="second", target_bpw=4.0, resume=True)[0].read_bytes() == expected
    assert not measured, "the plan is kept"


def test_a_damaged_plan_is_made_again(folder, monkeypatch):
    expected = made(target_bpw=4.0)[0].read_bytes()
    keep = WorkFolder.save_part

    def killed(self, name, *rest):
        keep(self, name, *rest)
        path = Path("second.ptq-work/plan.safetensors")
        path.write_bytes(path.read_bytes().replace(b"Q8_0", b"Q4_0"))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(WorkFolder, "save_part", killed)
        made(out="second", target_bpw=4.0)
    # Nothing else was finished, so the run begins again, with or without --resume.
    assert made(out="second", target_bpw=4.0, resume=True)[0].read_bytes() == expected


def test_the_embedding_can_be_told(folder):
    path, _ = made(target_bpw=6.0, embed_type="IQ4_NL")
    assert GgufFile(path).tensors["model.embed_tokens.weight"].ggml_type.name == "IQ4_NL"


def test_a_mix_by_name(folder):
    """Rows of 64 and 128 do not fill K blocks: the types that take over."""
    path, mixture = made(ggml_type="Q4_K_M")
    of = {name: t.ggml_type.name for name, t in GgufFile(path).tensors.items()}
    assert path.name == "model-Q4_K_M.gguf" and mixture is None
    assert of["model.layers.1.mlp.down_proj.weight"] == "Q8_0" and of["model.layers.1.mlp.up_proj.weight"] == "Q5_0"


def test_mistakes_are_one_line(folder, capsys):
    given = ["--model", "model", "--calibration", "c.npy", "--heldout", "none", "--format", "gguf"]
    refused(capsys, quantize, [*given, "--target-bpw", "1.2"], "--target-bpw 1.2 cannot be met", " to ")
    refused(capsys, quantize, [*given, "--target-bpw", "12"], "--target-bpw 12 cannot be met")
    refused(capsys, quantize, [*given, "--target-bpw", "nan"], "--target-bpw")
    refused(capsys, quantize, [*given, "--target-size", "1kB"], "--target-size", "cannot be met")
    refused(capsys, quantize, [*given, "--target-size", "big"], "'big' is not a size")
    refused(capsys, quantize, [*given, "--target-size", "1MB", "--target-bpw", "4"], "give one")
    refused(capsys, quantize, [*given, "--target-bpw", "4", "--type", "Q4_0"], "exclude each other")
    refused(capsys, quantize, [*given, "--target-bpw", "4", "--method", "rtn"], "method gptq")
    refused(capsys, quantize, [*given[:-2], "--target-bpw", "4"], "format gguf")
    refused(capsys, quantize, [*given, "--type", "Q4_K_X"], "--type 'Q4_K_X' is not one of", "Q4_K_M")
