"""Perplexity, divergence and cost of ptq.quantize over a grid of cells, each the file as written; one JSON line a cell.

    python tools/quality_grid.py --model DIR --calibration 'rows.seed{seed}.npy' --evaluation held.npy --out grid.jsonl

A method is what METHODS names: the default (gptq), plain GPTQ, rounding to nearest, OmniQuant or an effort. The
divergence is that from the full-precision model's predictions. Finished cells are skipped, so it can be killed and
started again. Every cell runs in a process of its own: its seconds are that process's user and system time, imports
included, and its memory is its own peak.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ptq.spec import width

METHODS = {
    "gptq": (),
    "draft": ("--effort", "draft"),
    "plain": ("--fisher-tokens", 0),
    "rtn": ("--method", "rtn"),
    "omniquant": ("--method", "omniquant"),
    "balanced": ("--effort", "balanced"),
    "best": ("--effort", "best"),
}


def run(arguments):
    """Runs a module of ptq; returns its output, CPU seconds and peak resident bytes."""
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen([sys.executable, "-m", *map(str, arguments)], stdout=output)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise SystemExit(f"{' '.join(map(str, arguments))} ended with status {child.returncode}")
        output.seek(0)
        return output.read(), usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def measure(cell, args, folder):
    """One cell: quantize, then evaluate the folder."""
    out = folder / "artefact"
    grid = ["--bits", cell["bits"], "--group", cell["group"], "--sym" if cell["sym"] else "--asym"]
    text = args.calibration.format(seed=cell["seed"])
    options = [*METHODS[cell["method"]], "--calibration", text, "--seed", cell["seed"], "--heldout", "none"]
    command = ["ptq.quantize", "--model", args.model, *grid, *options, "--out", out]
    _, seconds, peak = run(command)
    printed, _, _ = run(["ptq.evaluate", out, "--text", args.evaluation, "--reference", args.model, "--json"])
    found = json.loads(printed)
    report = json.loads((out / "ptq_report.json").read_text())
    shutil.rmtree(out)
    return {
        **cell,
        "perplexity": found["model"]["perplexity"],
        "kl": found["kl"],
        "cpu_seconds": round(seconds, 2),
        "seconds": report["seconds"],
        "peak_memory_bytes": peak,
        "bits_per_weight": report["bits_per_weight"]["linears"],
    }


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, required=True)
    p.add_argument("--calibration", required=True, help=".npy rows; {seed} stands for the seed")
    p.add_argument("--evaluation", required=True, help=".npy windows")
    p.add_argument("--out", type=Path, required=True, help="JSON lines, appended to")
    p.add_argument("--methods", nargs="+", choices=METHODS, default=["gptq", "rtn"])
    p.add_argument("--bits", nargs="+", type=width, default=[2, 3, 4])
    p.add_argument("--groups", nargs="+", type=int, default=[128, 64, 32])
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--grids", nargs="+", choices=["sym", "asym"], default=["sym", "asym"])
    args = p.parse_args()
    names = ("model", "method", "seed", "bits", "group", "sym")
    axes = ([args.model.name], args.methods, args.seeds, args.bits, args.groups, [grid == "sym" for grid in args.grids])
    lines = args.out.read_text().splitlines() if args.out.exists() else []
    done = [{name: json.loads(line)[name] for name in names} for line in lines]
    with tempfile.TemporaryDirectory() as folder:
        for values in itertools.product(*axes):
            cell = dict(zip(names, values, strict=True))
            if cell in done or (cell["method"] == "rtn" and cell["seed"] != args.seeds[0]):
                continue
            row = measure(cell, args, Path(folder))
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps({k: row[k] for k in (*names, "perplexity", "kl", "cpu_seconds")}), flush=True)


if __name__ == "__main__":
    main()
