"""The real consumers load our files: GPTQModel and transformers, in the environment that `make test-peers` makes."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ptq import QuantSpec, quantize_model
from ptq.demo import DEMO
from ptq.reload import open_weights

pytestmark = [pytest.mark.peers, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
PEERS = ROOT / ".venv-peers" / "bin" / "python"
SCRIPT = ROOT / "tests" / "peers" / "gptqmodel_logits.py"
# Consumers compute in bf16 or fp16 on a CPU: 2^-9 a rounding, some 50 roundings deep in 6 blocks; measured 0.4 to 1 %.
TOLERANCE = 2e-2

CELLS = [
    *((bits, 128, sym, form, "rtn") for bits in (2, 3, 4, 8) for sym in (True, False) for form in ("gptq", "gptq_v2")),
    (1, 128, True, "gptq", "rtn"),
    (2, 64, True, "gptq", "gptq"),  # signed scales
    (3, 32, False, "gptq", "gptq"),
    (4, 64, True, "gptq", "gptq"),  # whole rows fail in the 4-bit CPU kernel of both consumers, docs/formats.md
]


def _name(cell):
    bits, group, sym, form, method = cell
    return f"w{bits}g{group}{'sym' if sym else 'asym'}-{form}-{method}"


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory):
    """Every cell as a folder, and the consumers' logits beside it; (tokens, name -> folder)."""
    if not PEERS.exists():
        pytest.skip(f"{PEERS.relative_to(ROOT)} is not here: make test-peers makes it")
    folder = tmp_path_factory.mktemp("consumers")
    tokens = torch.randint(0, 4096, (2, 64), generator=torch.Generator().manual_seed(0))
    np.save(folder / "tokens.npy", tokens.numpy())
    for cell in CELLS:
        bits, group, sym, form, method = cell
        spec = QuantSpec(bits=bits, group_size=group, sym=sym, checkpoint_format=form, method=method)
        quantize_model(None, spec, out=folder / _name(cell), samples=4, seqlen=256, heldout="none")
    folders = {_name(cell): folder / _name(cell) for cell in CELLS}
    command = [PEERS, SCRIPT, folder / "tokens.npy", *folders.values()]
    subprocess.run(list(map(str, command)), check=True, timeout=1700, capture_output=True)
    return tokens, folders


def our_logits(folder, tokens):
    """Exact fp32 arithmetic on the file's dequantized weights."""
    weights = open_weights(folder)
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    state = weights.read([name for name in weights.names() if name in dict(model.named_parameters())])
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=False)
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("consumer", ["gptqmodel", "transformers"])
@pytest.mark.parametrize("cell", CELLS, ids=_name)
def test_consumer_agrees(artefacts, cell, consumer):
    tokens, folders = artefacts
    folder = folders[_name(cell)]
    failure = Path(f"{folder}.{consumer}.error")
    assert not failure.exists(), failure.read_text()
    theirs, ours = torch.from_numpy(np.load(f"{folder}.{consumer}.npy")), our_logits(folder, tokens)
    difference = float((theirs - ours).norm() / ours.norm())
    print(f"{folder.name} {consumer}: relative difference {difference:.5f}")
    assert difference < TOLERANCE
