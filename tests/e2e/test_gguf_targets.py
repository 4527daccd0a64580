"""`--target-bpw` and `--target-size`: the file has the size, a killed run goes on with the same types, bad targets."""

import math
import shutil
from pathlib import Path

import pytest
from commands import read_report, token_file
from damage import refused
from tiny_models import make_tiny

from ptq import QuantSpec, quantize, quantize_model
from ptq.checkpoint import open_checkpoint
from ptq.gguf.file import GgufFile
from ptq.workdir import WorkFolder


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A tiny model, tokens, and in `expected` an uninterrupted run's folder."""
    folder = tmp_path_factory.mktemp("pristine")
    make_tiny("llama", folder / "model", tie=True)
    token_file(folder / "c.npy", 6, 32)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        made(out="expected", target_bpw=4.0)
    return folder


@pytest.fixture(autouse=True)
def here(pristine, tmp_path, monkeypatch):
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


EXPECTED = Path("expected/model-4bpw.gguf")


def made(out="out", resume=False, **options):
    """The file, and the report's part on types."""
    spec = QuantSpec(checkpoint_format="gguf", refine_rounds=1, **options)
    artefact = quantize_model("model", spec, out=out, calibration="c.npy", heldout="none", resume=resume)
    (path,) = artefact.folder.glob("*.gguf")
    return path, artefact.report["mixture"]


def test_bits_a_weight():
    path, mixture = EXPECTED, read_report("expected")["mixture"]
    source, stored = open_checkpoint("model"), GgufFile(path).tensors
    weights = sum(math.prod(source.shape(name)) for name in source.names())
    size = sum(math.prod(t.shape[:-1]) * t.ggml_type.row_bytes(t.shape[-1]) for t in stored.values())
    assert mixture["size"] == size
    assert 0.99 * 4.0 <= 8 * size / weights == mixture["bits"] <= 4.0
    assert len({t.ggml_type.name for t in stored.values() if len(t.shape) > 1}) > 1
    assert [row["kl"] for row in mixture["table"]] == sorted((row["kl"] for row in mixture["table"]), reverse=True)
    assert mixture["kl"] in [row["kl"] for row in mixture["table"] if row["budget"] == mixture["budget"]]


def test_bytes_of_the_file():
    """Metadata count: what was predicted is the length of the file, to the byte."""
    target = EXPECTED.stat().st_size + 2000
    path, mixture = made(target_bytes=target)
    assert 0.99 * target <= path.stat().st_size == mixture["size"] <= target


@pytest.mark.parametrize("after", ["plan", "tables", "block"])
def test_killed_and_resumed(monkeypatch, after):
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
    assert made(out="second", target_bpw=4.0, resume=True)[0].read_bytes() == EXPECTED.read_bytes()
    assert not measured, "the plan is kept"


def test_a_damaged_plan_is_made_again(monkeypatch):
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
    assert made(out="second", target_bpw=4.0, resume=True)[0].read_bytes() == EXPECTED.read_bytes()


def test_the_embedding_can_be_told():
    path, _ = made(target_bpw=6.0, embed_type="IQ4_NL")
    assert GgufFile(path).tensors["token_embd.weight"].ggml_type.name == "IQ4_NL"


def test_a_mix_by_name():
    """Rows of 64 and 128 do not fill K blocks: the types that take over."""
    path, mixture = made(ggml_type="Q4_K_M")
    of = {name: t.ggml_type.name for name, t in GgufFile(path).tensors.items()}
    assert path.name == "model-Q4_K_M.gguf" and mixture is None
    assert of["blk.1.ffn_down.weight"] == "Q8_0" and of["blk.1.ffn_up.weight"] == "Q5_0"


def test_mistakes_are_one_line(capsys):
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
