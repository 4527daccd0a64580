"""Every family, all the way: command line, file, reload; the file must be the model that the walk had in memory.

The file is unpacked a second time here, with numpy and from the format's description alone, and put into an untouched
Hugging Face model. All logits must be equal bit for bit.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import read_report, token_file
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import TEXT, make_tiny
from transformers import AutoConfig, AutoModelForCausalLM

from calibration.capture import run_block
from ptq import QuantSpec, evaluate, quantize, quantize_model
from ptq.families import FAMILIES
from ptq.reload import open_weights
from ptq.streamed import StreamedModel

# model_type: flags, and how the source is stored. Together: every width, both formats, groups and orders.
CASES = {
    "llama": ("--bits 2 --group 32", {"dtype": "bfloat16", "shards": 3}),
    "mistral": ("--bits 3 --group 64 --asym --format gptq_v2", {}),
    "gpt_bigcode": ("--bits 4 --group -1", {"dtype": "bfloat16"}),
    "gpt2": ("--bits 4 --group 32 --asym", {"dtype": "float16", "shards": 2}),
    "qwen2": ("--bits 8 --group 64 --format gptq_v2", {}),
    "qwen3": ("--bits 8 --group -1 --asym", {"dtype": "float16"}),
    "opt": ("--bits 3 --group -1 --act-order", {}),
    "gpt_neox": ("--bits 2 --group 64 --asym --act-order", {"shards": 2}),
    "phi3": ("--bits 1 --group 32", {}),
    "gemma2": ("--bits 1.58 --group 64 --format gptq_v2", {"dtype": "bfloat16"}),
    "gemma3_text": ("--bits 3 --group 48 --asym --no-act-order", {}),
    "gemma": ("--bits 4 --group 64", {"dtype": "bfloat16"}),
    "granite": ("--bits 4 --group 32 --asym", {}),
    "smollm3": ("--bits 2 --group 64", {"dtype": "bfloat16", "no_rope_layers": [1, 0]}),
    "seed_oss": ("--bits 4 --group 32", {}),
    "cwm": ("--bits 3 --group 32", {"shards": 2}),
    "ernie4_5": ("--bits 2 --group 32 --asym", {}),
    "helium": ("--bits 4 --group 64", {"dtype": "float16"}),
    "olmo2": ("--bits 4 --group 32 --format gptq_v2", {}),
    "olmo3": ("--bits 3 --group 64", {"dtype": "bfloat16"}),
    "exaone4": ("--bits 2 --group 64 --act-order", {}),
    "glm": ("--bits 4 --group -1", {}),
    "glm4": ("--bits 8 --group 32", {}),
    "starcoder2": ("--bits 2 --group 32 --asym", {"dtype": "bfloat16"}),
    "nemotron": ("--bits 4 --group 64", {}),
    "arcee": ("--bits 3 --group 32 --asym", {}),
    "apertus": ("--bits 4 --group 32", {"dtype": "bfloat16"}),
}


@dataclass(frozen=True)
class Finished:
    """A finished run."""

    model_type: str
    flags: str
    source: Path
    out: Path

    @property
    def packed(self) -> list[str]:
        """The quantized linears."""
        return list(read_report(self.out)["linears"])


@pytest.fixture(scope="module", params=CASES)
def finished(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    flags, stored = CASES[request.param]
    source = make_tiny(request.param, folder / "source", **stored)
    tokens, heldout = token_file(folder / "c.npy", 6, 48), token_file(folder / "h.npy", 4, 32, seed=1)
    arguments = ["--model", source, "--out", folder / "out", "--calibration", tokens, "--heldout", heldout]
    quantize.main([str(value) for value in (*arguments, *flags.split())])
    return Finished(request.param, flags, source, folder / "out")


def bit_field(words: np.ndarray, bits: int) -> np.ndarray:
    """(rows, n) int32 words to (rows, n*32/bits) codes: one little-endian bit stream a row."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    return stream.reshape(len(words), -1, bits) @ (1 << np.arange(bits))


def unpack(folder: Path) -> dict[str, torch.Tensor]:
    """(O, I) fp32 weights of every packed linear of a GPTQ folder, from the files alone."""
    config = json.loads((folder / "quantize_config.json").read_text())
    first_zero = {"gptq": 1, "gptq_v2": 0}[config["checkpoint_format"]]
    weights = {}
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, framework="np") as file:
            for name in [n.removesuffix(".qweight") for n in file.keys() if n.endswith(".qweight")]:  # noqa: SIM118
                qweight, qzeros, scales, g = (
                    file.get_tensor(f"{name}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")
                )
                codes, zeros = bit_field(qweight.T, config["bits"]), bit_field(qzeros, config["bits"]) + first_zero
                values = scales.astype(np.float32)[g].T * (codes - zeros[g].T).astype(np.float32)
                weights[name] = torch.from_numpy(values)
    return weights


def reference(finished: Finished) -> torch.nn.Module:
    """Hugging Face's model of the source, with the unpacked weights written into it."""
    model = AutoModelForCausalLM.from_pretrained(finished.source, dtype=torch.float32).eval()
    state, transposed = model.state_dict(), FAMILIES[finished.model_type].transposed
    for linear, weight in unpack(finished.out).items():
        state[f"{linear}.weight"].copy_(weight.T if transposed else weight)
    return model


@torch.no_grad()
def streamed_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = StreamedModel(open_weights(folder))
    with model.outside(head=False):
        hidden, arguments = model.embed(tokens)
    for i in range(len(model.blocks)):
        with model.block(i) as block:
            hidden = run_block(block, hidden, arguments[i])
    with model.outside(head=True):
        return model.logits(hidden)


def test_every_model_type_has_a_case():
    assert set(CASES) == set(FAMILIES)


def test_the_file_is_the_model_in_memory(finished):
    weights, linears = unpack(finished.out), read_report(finished.out)["linears"]
    blocks = AutoConfig.from_pretrained(finished.source).num_hidden_layers
    assert set(weights) == set(linears) and len(linears) == blocks * len(FAMILIES[finished.model_type].linears)
    for name, weight in weights.items():
        assert hashlib.sha256((weight + 0.0).numpy().tobytes()).hexdigest() == linears[name]["sha256"], name


@torch.no_grad()
def test_logits_are_equal_bit_for_bit(finished):
    tokens = torch.randint(0, 300, (3, 40), generator=torch.Generator().manual_seed(2))
    expected = reference(finished)(tokens, use_cache=False).logits
    assert torch.equal(streamed_logits(finished.out, tokens), expected)
    original = AutoModelForCausalLM.from_pretrained(finished.source, dtype=torch.float32).eval()
    assert not torch.equal(original(tokens, use_cache=False).logits, expected)
    weights, config = open_weights(finished.out), AutoConfig.from_pretrained(finished.source)
    config.dtype = torch.float32
    state = weights.read(weights.names())
    plain = type(original).from_pretrained(None, config=config, state_dict=state)
    assert torch.equal(plain.eval()(tokens, use_cache=False).logits, expected)


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}


def test_untouched_tensors_and_files_are_copied_byte_for_byte(finished):
    before, after = stored_tensors(finished.source), stored_tensors(finished.out)
    packed = finished.packed
    kept = [name for name in before if name.removesuffix(".weight") not in packed]
    parts = [f"{linear}.{part}" for linear in packed for part in ("qweight", "qzeros", "scales", "g_idx")]
    assert set(after) == {*kept, *parts} and kept
    for name in kept:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name].flatten().view(torch.uint8), before[name].flatten().view(torch.uint8)), name
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (finished.out / name).read_bytes() == (finished.source / name).read_bytes()
    config = json.loads((finished.out / "config.json").read_text())
    assert config.pop("quantization_config") == json.loads((finished.out / "quantize_config.json").read_text())
    assert config == json.loads((finished.source / "config.json").read_text())


@torch.no_grad()
def test_perplexity_is_that_of_hugging_face(finished, capsys):
    windows = finished.out.parent / "h.npy"
    capsys.readouterr()
    evaluate.main([str(finished.out), "--text", str(windows), "--json"])
    printed = capsys.readouterr().out
    result = json.loads(printed)
    assert printed.count("\n") == 1 and {"perplexity", "nll", "tokens", "seqlen"} <= set(result)
    tokens = torch.from_numpy(np.load(windows))
    logits = reference(finished)(tokens, use_cache=False).logits[:, :-1]
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert result["nll"] == pytest.approx(float(nll), rel=1e-4)
    assert result["perplexity"] == pytest.approx(float(nll.exp()), rel=1e-4)
    assert (result["tokens"], result["seqlen"]) == (4 * 31, 32)
    assert read_report(finished.out)["perplexity"]["after"]["nll"] == result["nll"]


def test_report(finished):
    report = read_report(finished.out)
    spec = report["identity"]["spec"]
    flags = finished.flags.split()
    assert spec["bits"] == float(flags[1]) and spec["group_size"] == int(flags[3])
    assert spec["sym"] == ("--asym" not in flags) and spec["desc_act"] == ("--act-order" in flags)
    calibration = report["identity"]["calibration"]
    assert calibration["samples"] == 6 and calibration["seqlen"] == 48 and len(calibration["fingerprint"]) == 64
    assert {"calibration", "forward", "hessian", "solve", "write", "verify", "total"} <= set(report["seconds"])
    assert report["peak_memory_bytes"]["resident"] > 1e8
    before, after = report["bits_per_weight"]["before"], report["bits_per_weight"]["after"]
    linears, shortest = report["bits_per_weight"]["linears"], report["bits_per_weight"]["shortest"]
    assert before > after > linears >= shortest > spec["bits"]
    assert (shortest < linears) == (spec["bits"] < 2)
    shards = finished.out.glob("*.safetensors")
    assert report["file_bytes"]["after"] == sum(shard.stat().st_size for shard in shards)
    for entry in report["linears"].values():
        assert 0 <= entry["error"] < entry["error_rtn"] and entry["damp_percent"] > 0
        assert 0 <= entry["dead_inputs"] < 0.1  # OPT's ReLU leaves some
    assert {verdict["name"] for verdict in report["runtimes"]} >= {"transformers + GPTQModel", "vLLM (Marlin kernels)"}


def test_python_api_and_text_calibration(tmp_path):
    source = make_tiny("llama", tmp_path / "source")
    (tmp_path / "text.txt").write_text(TEXT * 20)
    spec = QuantSpec(bits=4, group_size=32)
    options = dict(calibration=str(tmp_path / "text.txt"), samples=4, seqlen=32, heldout=str(tmp_path / "text.txt"))
    artefact = quantize_model(source, spec, out=tmp_path / "out", **options)
    assert artefact.folder == tmp_path / "out" and artefact.report == read_report(artefact.folder)
    assert artefact.report["identity"]["spec"] == spec.as_dict()
    assert artefact.report["perplexity"]["text"] == str(tmp_path / "text.txt")


def test_round_to_nearest_needs_no_text(tmp_path, capsys):
    source = make_tiny("qwen2", tmp_path / "source")
    flags = ["--method", "rtn", "--bits", "8", "--group", "32", "--heldout", "none"]
    quantize.main(["--model", str(source), "--out", str(tmp_path / "out"), *flags])
    assert "written: " in capsys.readouterr().out
    report = read_report(tmp_path / "out")
    assert report["identity"]["calibration"] is None and report["perplexity"] is None
    assert all(0 < entry["error"] < 1e-4 for entry in report["linears"].values())
