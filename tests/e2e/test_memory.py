"""Peak resident memory of a run on the shape of TinyLlama 1.1B: bounded, and not a matter of depth."""

import json
import subprocess
import sys

import pytest
from commands import REPOSITORY, command, environment, token_file

LIMIT = 1.5e9

# A process counts its parent's memory as its own peak until it has more: so pytest may not be the parent.
LAUNCHER = """
import json, resource, subprocess, sys, time
start = time.monotonic()
status = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(json.dumps([status, peak, time.monotonic() - start]))
"""


def measure(arguments, **variables) -> tuple[int, float]:
    """Peak resident bytes and seconds of a command that must succeed."""
    environ = environment(**variables)
    done = subprocess.run(
        [sys.executable, "-S", "-c", LAUNCHER, *arguments], capture_output=True, text=True, env=environ
    )
    assert done.returncode == 0, done.stderr
    status, peak, seconds = json.loads(done.stdout)
    assert status == 0, done.stderr
    return peak, seconds


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_peak_memory_does_not_grow_with_depth(tmp_path):
    tokens, peaks = token_file(tmp_path / "c.npy", 8, 512, vocab=32000), {}
    for blocks in (2, 4):
        model, tool = tmp_path / f"model{blocks}", REPOSITORY / "tools" / "random_model.py"
        made, _ = measure([sys.executable, str(tool), "tinyllama-1.1b", str(model), "--blocks", str(blocks)])
        flags = ["--calibration", tokens, "--heldout", tokens, "--out", tmp_path / f"out{blocks}", "--device", "cpu"]
        peaks[blocks], seconds = measure(command("quantize", "--model", model, *flags), OMP_NUM_THREADS="2")
        print(f"{blocks} blocks: peak {peaks[blocks] / 1e9:.3f} GB in {seconds:.0f} s; making them {made / 1e9:.3f} GB")
    assert max(peaks.values()) < LIMIT
    assert peaks[4] < peaks[2] * 1.03
