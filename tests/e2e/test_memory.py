"""Peak resident memory of a run on the shape of TinyLlama 1.1B: bounded, and not a matter of depth."""

import json
import re
import subprocess
import sys

import pytest
from commands import REPOSITORY, command, environment, hashes, run, token_file

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


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("given", "limits"),
    [([], (1.0, 2.0)), (["--fisher-tokens", "0"], (1.0, 2.0)), (["--effort", "balanced"], (2.0,))],
    ids=["default", "plain", "balanced"],
)
def test_max_memory_is_obeyed_and_changes_nothing(tmp_path, given, limits):
    model, tokens = tmp_path / "model", token_file(tmp_path / "c.npy", 8, 512, vocab=32000)
    measure([sys.executable, str(REPOSITORY / "tools/random_model.py"), "tinyllama-1.1b", str(model), "--blocks", "1"])
    flags = ["--model", model, "--calibration", tokens, "--heldout", "none", "--device", "cpu", *given]
    refused = run("quantize", *flags, "--max-memory", "0.5GB", "--out", tmp_path / "refused")
    needed = re.fullmatch(r"error: max_memory 0.50 GB is too .* it takes ([0-9.]+) GB(,.*)?\n", refused.stderr)
    assert refused.returncode == 2 and needed and float(needed[1]) <= limits[0]
    written = {}
    for limit in (*limits, None):
        out = tmp_path / f"out-{limit}"
        wanted = [] if limit is None else ["--max-memory", f"{limit}GB"]
        peak, seconds = measure(command("quantize", *flags, *wanted, "--out", out))
        print(f"{limit} GB: peak {peak / 1e9:.3f} GB in {seconds:.0f} s")
        assert limit is None or peak < limit * 1e9
        written[limit] = hashes(out)
    assert all(found == written[None] for found in written.values())
