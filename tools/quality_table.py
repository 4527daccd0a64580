"""Markdown tables from the JSON lines of quality_grid.py: mean perplexity over seeds, spread, and seconds.

    python tools/quality_table.py grid.jsonl ... > table.md

Lines of other tools join in if they carry the same keys: model, method, seed, bits, group, sym, perplexity,
cpu_seconds.
"""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path


def summarise(rows):
    """(mean perplexity, half the spread, median seconds, seeds) of one cell's rows."""
    values = [row["perplexity"] for row in rows]
    half = (max(values) - min(values)) / 2
    return statistics.fmean(values), half, statistics.median(row["cpu_seconds"] for row in rows), len(values)


def main():
    cells = defaultdict(list)
    for path in sys.argv[1:]:
        for line in Path(path).read_text().splitlines():
            row = json.loads(line)
            cells[row["model"], row["bits"], row["group"], not row["sym"], row["method"]].append(row)
    methods = sorted({key[-1] for key in cells}, key=lambda m: (m != "rtn", m == "gptq", m))
    for model in sorted({key[0] for key in cells}):
        print(f"\n**{model}**\n")
        print("| cell | " + " | ".join(methods) + " | " + " | ".join(f"{m} s" for m in methods) + " |")
        print("|---" * (1 + 2 * len(methods)) + "|")
        for key in sorted({key[:-1] for key in cells if key[0] == model}):
            _, bits, group, asym = key
            found = {m: summarise(cells[(*key, m)]) for m in methods if cells.get((*key, m))}
            best = min(value[0] for value in found.values())
            texts = [_perplexity(found.get(m), best) for m in methods]
            seconds = [f"{found[m][2]:.0f}" if m in found else "" for m in methods]
            print(f"| w{bits} g{group} {'asym' if asym else 'sym'} | " + " | ".join(texts + seconds) + " |")


def _perplexity(cell, best):
    if cell is None:
        return ""
    mean, half, _, seeds = cell
    text = f"{mean:.4g}" if mean >= 1000 else f"{mean:.4f}"
    text = f"**{text}**" if mean == best else text
    return text + (f" ± {half:.4f} ({seeds})" if seeds > 1 else "")


if __name__ == "__main__":
    main()
