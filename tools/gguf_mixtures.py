r"""Files under a target size against llama.cpp's named mixes and against pure types of ours, all measured by llama.cpp.

    python tools/gguf_mixtures.py --model DIR --calibration rows.npy --evaluation held.npy --client DIR \
        --out table.jsonl --cells mix:Q2_K_S bpw:2.6 pure:Q2_K+Q6_K

A cell is `mix:` and the name of a mix, quantized by ggml_quantize_chunk of the xllamacpp wheel (llama-quantize's bytes)
with an importance matrix of the same calibration rows; `bpw:` and a target of ours; or `pure:` and our type of the
linears and of the embedding. All go through the same writer with the same metadata. Finished cells are skipped; a row
holds the size of the file, bits a weight of all tensors, KL from the F32 file, and what was predicted. See gguf_grid.py
for how KL is measured and for `--client`.
"""

import argparse
import ctypes
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from gguf_grid import Reference, measure, predictions

from ptq import QuantSpec, quantize_model
from ptq.gguf.file import GgufFile
from ptq.mixture.assignment import fitting, recipe_types
from ptq.mixture.recipes import HEAD, RECIPES

CELLS = (
    *(f"bpw:{bits}" for bits in (2.3, 2.6, 3.0, 3.5, 4.5)),
    *(f"mix:{name}" for name in ("Q2_K_S", "Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M")),
    *(f"pure:{kind}+{kind}" for kind in ("TQ2_0", "Q2_0", "Q2_K", "Q3_K", "IQ4_XS", "Q4_K")),
    *(f"pure:{kind}+Q6_K" for kind in ("TQ2_0", "Q2_0", "Q2_K", "Q3_K")),
)
PROVENANCE = {"quantize.ptq.method": "gptq", "quantize.ptq.type": "Q2_K"}  # so that the metadata is as long


def mix_types(reference, name):
    """llama.cpp's type of each tensor; tied embeddings count as the head."""
    model = reference.streamed
    types = dict(recipe_types(RECIPES[name], model.config, reference.squares))
    types[model.embedding_key] = RECIPES[name].ggml_type
    types[model.head_key or model.embedding_key] = HEAD
    shapes = {key: model.checkpoint.shape(f"{key}.weight" if key in reference.squares else key) for key in types}
    return {key: fitting(kind, shapes[key][1]) for key, kind in types.items()}


def made(cell, args, reference, scratch):
    """The file of a cell, and the report of ours."""
    kind, _, what = cell.partition(":")
    if kind == "mix":
        reference.write(scratch / "mix.gguf", mix_types(reference, what), PROVENANCE)
        return scratch / "mix.gguf", {}
    linears, _, embedding = what.partition("+")
    chosen = {"target_bpw": float(what)} if kind == "bpw" else {"ggml_type": linears, "embed_type": embedding}
    spec = QuantSpec(checkpoint_format="gguf", seed=args.seed, **chosen)
    artefact = quantize_model(args.model, spec, out=scratch / "ours", calibration=args.calibration, heldout="none")
    (path,) = artefact.folder.glob("*.gguf")
    return path, artefact.report


def bits(path, model):
    """Bits a weight of all tensors of a file."""
    file = GgufFile(path)
    total = sum(np.prod(t.shape[:-1]) * t.ggml_type.row_bytes(t.shape[-1]) for t in file.tensors.values())
    return float(8 * total / sum(np.prod(model.checkpoint.shape(name)) for name in model.checkpoint.names()))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--model", "--calibration", "--evaluation", "--client", "--out"):
        p.add_argument(flag, required=True)
    p.add_argument("--cells", nargs="+", default=CELLS)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--windows", type=int, default=24)
    args = p.parse_args()
    sys.path.append(args.client)
    import llamac
    import xllamacpp  # noqa: F401 - loads the library

    out = Path(args.out)
    windows = torch.from_numpy(np.load(args.evaluation)).long()[: args.windows]
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        tokens = torch.from_numpy(np.load(args.calibration)).long()
        reference = Reference(args.model, tokens, ctypes.CDLL(llamac._lib()))
        full = predictions(reference, windows, llamac, scratch / "f32.gguf")
        for cell in args.cells:
            if out.exists() and cell in (json.loads(line)["cell"] for line in out.open()):
                continue
            start = time.process_time()
            path, report = made(cell, args, reference, scratch)
            row = {"cell": cell, "bits": bits(path, reference.streamed)}
            row["cpu_seconds"] = round(time.process_time() - start, 1)
            row |= measure(path, full, windows, llamac)
            if report.get("mixture"):
                row |= {"predicted": report["mixture"]["kl"], "types": report["mixture"]["types"]}
            with out.open("a") as file:
                file.write(json.dumps(row) + "\n")
                os.fsync(file.fileno())
            print({key: value for key, value in row.items() if key != "types"}, flush=True)
            shutil.rmtree(scratch / "ours", ignore_errors=True)


if __name__ == "__main__":
    main()
