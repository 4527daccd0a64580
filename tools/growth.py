"""How the time and memory of ptq.quantize grow when tokens, depth and width double.

    python tools/growth.py --threads 2 --repeat 3

Random models of Llama's proportions; every run is a process of its own, runs alternate. Printed are medians, and how
many times as much each doubling takes as the base. Seconds are those of the walk: what its phases take, without imports
and reading the result back.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import numpy as np

from ptq.benchmark.random_model import write_random_model
from ptq.benchmark.shapes import SHAPES

BASE = {"tokens": 8192, "depth": 2, "width": 1024}
SEQLEN, VOCABULARY = 512, 4096
OTHERS = ("total", "verify", "write", "generate", "perplexity", "calibration", "types")


def model(folder, width, depth):
    """A random Llama, written once."""
    out = folder / f"model-{width}-{depth}"
    if not out.exists():
        sizes = {"hidden_size": width, "intermediate_size": 11 * width // 4, "num_attention_heads": width // 64}
        small = {"num_key_value_heads": width // 256, "vocab_size": VOCABULARY, "num_hidden_layers": depth}
        SHAPES["grown"] = SHAPES["tinyllama-1.1b"] | sizes | small
        write_random_model("grown", out)
    return out


def run(folder, threads, *, tokens, depth, width):
    """(seconds of the walk, peak MB) of one run."""
    rows = folder / f"rows-{tokens}.npy"
    np.save(rows, np.random.default_rng(0).integers(0, VOCABULARY, (tokens // SEQLEN, SEQLEN)))
    flags = ["--model", model(folder, width, depth), "--calibration", rows, "--heldout", "none"]
    with tempfile.TemporaryDirectory(dir=folder) as out:
        artefact = Path(out) / "artefact"
        command = [sys.executable, "-m", "ptq.quantize", *map(str, flags), "--out", str(artefact), "--device", "cpu"]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        report = json.loads((artefact / "ptq_report.json").read_text())
    seconds = sum(spent for phase, spent in report["seconds"].items() if phase not in OTHERS)
    return seconds, report["peak_memory_bytes"]["resident"] / 1e6


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--repeat", type=int, default=1)
    args = p.parse_args()
    cases = {"base": BASE} | {f"{name} x 2": BASE | {name: 2 * BASE[name]} for name in BASE}
    taken = {name: [] for name in cases}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.repeat):
            for name, case in cases.items():
                taken[name].append(run(Path(folder), args.threads, **case))
    print("| | tokens | depth | width | seconds | times | peak MB |\n|---|---|---|---|---|---|---|")
    base = median(seconds for seconds, _ in taken["base"])
    for name, case in cases.items():
        seconds, peak = (median(column) for column in zip(*taken[name], strict=True))
        sizes = " | ".join(str(case[key]) for key in BASE)
        print(f"| {name} | {sizes} | {seconds:.1f} | {seconds / base:.2f} | {peak:.0f} |")


if __name__ == "__main__":
    main()
