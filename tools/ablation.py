"""What each ingredient of an effort is worth: alone, and left out; one JSON line a variant, and a Markdown table.

    python tools/ablation.py --model DIR --calibration rows.npy --evaluation held.npy --out ablation.jsonl

Divergence from the full-precision model and perplexity of the written folder; processor seconds of the run by its own
report, imports not among them. Finished variants are skipped, so it can be killed and started again.
"""

import argparse
import json
import tempfile
from pathlib import Path

from ptq import QuantSpec, quantize_model
from ptq.defaults import default_budget
from ptq.evaluation.divergence import measure_divergence
from ptq.measure import open_streamed, protocol_windows
from ptq.spec import EFFORTS

BARE = {"fisher_tokens": 0, "correction": 0.0, "refine_rounds": 0}
BALANCED = EFFORTS["balanced"]
VARIANTS = {
    "GPTQ with none of it": BARE,
    "refinement alone": BARE | {"refine_rounds": 8},
    "correction alone": BARE | {"correction": 1.0},
    "outputs weighed alone": BARE | {"fisher_tokens": 1 << 13},
    "fast": {},
    "fast without refinement": {"refine_rounds": 0},
    "fast without correction": {"correction": 0.0},
    "fast without outputs weighed": {"fisher_tokens": 0},
    "fast in natural order": {"column_order": "natural"},
    "fast with damping 0.01": {"damp_percent": 0.01},
    "fast, asymmetric": {"sym": False},
    "balanced": BALANCED,
    "balanced without own text": BALANCED | {"own_tokens": 0},
    "balanced without tuning": BALANCED | {"tune_epochs": 0},
    "balanced, scales tuned alone": BALANCED | {"tune_drift": 0.0},
    "balanced without outputs weighed": BALANCED | {"fisher_tokens": 0},
}


def measure(variant, args, folder):
    """One variant: quantized, read back, compared."""
    spec = QuantSpec(**({"bits": args.bits, "group_size": args.group} | VARIANTS[variant]))
    made = quantize_model(args.model, spec, out=folder / "artefact", calibration=str(args.calibration), heldout="none")
    model = open_streamed(made.folder)
    windows, skip = protocol_windows(model, str(args.evaluation), "gptq")
    spill = {"spill": folder, "budget": default_budget()}
    found = measure_divergence(model, open_streamed(args.model), windows, skip=skip, **spill)
    seconds = made.report["processor_seconds"]["total"]
    return {"variant": variant, "kl": found.kl, "perplexity": found.model.perplexity, "cpu_seconds": seconds}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, required=True)
    p.add_argument("--calibration", type=Path, required=True, help=".npy rows")
    p.add_argument("--evaluation", type=Path, required=True, help=".npy windows")
    p.add_argument("--out", type=Path, required=True, help="JSON lines, appended to")
    p.add_argument("--bits", type=int, default=2)
    p.add_argument("--group", type=int, default=128)
    p.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    args = p.parse_args()
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    for variant in args.variants:
        if variant in [row["variant"] for row in rows]:
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(variant, args, Path(folder)))
        with args.out.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    print("| variant | divergence | perplexity | processor s |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['variant']} | {row['kl']:.4g} | {row['perplexity']:.3f} | {row['cpu_seconds']:.0f} |")


if __name__ == "__main__":
    main()
