"""Time, memory and perplexity of ptq.quantize beside other tools, on identical tokens.

    python tools/peer_speed.py --scripts DIR --python gptqmodel=.venv-peers/bin/python --model MODEL \
        --calibration rows.npy --evaluation held.npy --repeat 3 --out speed.jsonl

DIR holds a script for each tool that takes --model --calib --bits --group --threads --out, and eval_ppl.py, which
measures all of them. One JSON line a run, and a table of medians at the end. Runs are paired: every tool once, then all
again. Seconds are the whole process's, imports included; importing alone is measured apart. Without --evaluation
nothing is evaluated.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple


class Tool(NamedTuple):
    """Its environment, script, options, and what it imports."""

    environment: str
    script: str
    options: tuple[str, ...]
    imports: str


OURS = {"ptq": (), "ptq-draft": ("--effort", "draft")}
TOOLS = {
    "gptqmodel": Tool("gptqmodel", "run_gptqmodel.py", (), "gptqmodel"),
    "gptqmodel-best": Tool("gptqmodel", "run_gptqmodel.py", ("--gptaq", "--desc-act", "--mse", "2.4"), "gptqmodel"),
    "llmcompressor": Tool("llmcompressor", "run_llmcompressor.py", ("--dense",), "llmcompressor, datasets"),
    "autoround-0": Tool("autoround", "run_autoround.py", ("--iters", "0"), "auto_round"),
    "autoround-200": Tool("autoround", "run_autoround.py", ("--iters", "200"), "auto_round"),
}


def timed(arguments, **options):
    """Runs a command that must succeed: what it printed, and what it took."""
    with tempfile.TemporaryFile("w+") as output:
        start = time.perf_counter()
        child = subprocess.Popen([*map(str, arguments)], stdout=output, stderr=subprocess.STDOUT, **options)
        _, status, usage = os.wait4(child.pid, 0)
        passed = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        printed = output.read()
    if child.returncode:
        raise SystemExit(f"{' '.join(map(str, arguments))} ended with status {child.returncode}:\n{printed[-2000:]}")
    processor = round(usage.ru_utime + usage.ru_stime, 2)
    return printed, {"seconds": round(passed, 2), "processor": processor, "peak_mb": usage.ru_maxrss * 1024 // 10**6}


def commands(name, args, out):
    """(what quantizes, what only imports)."""
    if name in OURS:
        text = ["--calibration", args.calibration, "--heldout", "none"]
        grid = ["--model", args.model, "--bits", args.bits, "--group", args.group, "--out", out]
        run = [sys.executable, "-m", "ptq.quantize", *grid, *text, *OURS[name]]
        return run, [sys.executable, "-c", "import ptq.pipeline"]
    tool, python = TOOLS[name], args.python[TOOLS[name].environment]
    given = ["--model", args.model, "--calib", args.calibration, "--bits", args.bits, "--group", args.group]
    run = [python, args.scripts / tool.script, *given, "--threads", args.threads, "--out", out, *tool.options]
    return run, [python, "-c", f"import {tool.imports}"]


def measure(name, args, folder):
    """One run of one tool."""
    out = folder / name
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    quantize, imports = commands(name, args, out)
    row = {"tool": name, "model": args.model.name, "bits": args.bits, "group": args.group, "threads": args.threads}
    row["calibration"] = args.calibration.name
    _, taken = timed(quantize, env=environment)
    row |= taken | {"imports": timed(imports, env=environment)[1]["processor"]}
    if args.evaluation:
        script = args.scripts / "eval_ppl.py"
        printed, _ = timed([sys.executable, script, "--model", out, "--tokens", args.evaluation], env=environment)
        row["perplexity"] = perplexity(printed)
    shutil.rmtree(out)
    return row


def perplexity(printed):
    """The evaluator's figure: the last of its lines that is JSON."""
    lines = [line.removeprefix("RESULT ") for line in printed.splitlines() if line.startswith(("{", "RESULT {"))]
    return json.loads(lines[-1])["ppl"]


def table(rows):
    """Medians of each tool's runs, as Markdown."""
    heads = ("tool", "runs", "processor s", "imports s", "seconds", "peak MB", "perplexity")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name in dict.fromkeys(row["tool"] for row in rows):
        runs = [row for row in rows if row["tool"] == name]
        cells = [median(row[key] for row in runs) for key in ("processor", "imports", "seconds", "peak_mb")]
        found = [row["perplexity"] for row in runs if "perplexity" in row]
        cells.append(f"{median(found):.4f}" if found else "")
        lines.append(f"| {name} | {len(runs)} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--scripts", type=Path, required=True, help="folder of the tools' scripts")
    p.add_argument("--python", action="append", default=[], metavar="ENVIRONMENT=PATH", help="a tool's interpreter")
    p.add_argument("--model", type=Path, required=True)
    p.add_argument("--calibration", type=Path, required=True, help=".npy rows")
    p.add_argument("--evaluation", type=Path, help=".npy windows")
    p.add_argument("--bits", type=int, default=2)
    p.add_argument("--group", type=int, default=128)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--tools", nargs="+", choices=[*OURS, *TOOLS], default=[*OURS, *TOOLS])
    p.add_argument("--repeat", type=int, default=1)
    p.add_argument("--out", type=Path, required=True, help="JSON lines, appended to")
    args = p.parse_args()
    args.python = dict(pair.split("=", 1) for pair in args.python)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.repeat):
            for name in args.tools:
                rows.append(measure(name, args, Path(folder)))
                with args.out.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
