r"""Pure GGUF types, ours against llama.cpp's own quantizer with an importance matrix, both measured by llama.cpp.

    python tools/gguf_grid.py --model DIR --calibration 'rows.seed{seed}.npy' --evaluation held.npy \
        --client DIR --out grid.jsonl

Both get the same calibration tokens, keep embedding and head in F16, and write through the same code; they differ in
how the linears' bytes are chosen. The reference is ggml_quantize_chunk of the xllamacpp wheel: llama-quantize's bytes.
KL is the mean over predictions of the divergence from the F32 file's, in nats. Finished cells are skipped. `--client`
holds llamac.py, which drives the wheel.
"""

import argparse
import ctypes
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from ptq import QuantSpec, quantize_model
from ptq.checkpoint import open_checkpoint
from ptq.export.gguf.layout import EncodedTensor
from ptq.export.gguf.types import BY_NAME
from ptq.export.gguf.writer import write_gguf
from ptq.reload import load_tokenizer
from ptq.streamed import StreamedModel

TYPES = """Q2_K Q3_K Q4_K Q5_K Q6_K Q4_0 Q4_1 Q5_0 IQ4_NL IQ4_XS TQ2_0 Q2_0
           IQ3_S IQ3_XXS IQ2_S IQ2_XS IQ2_XXS""".split()


class Reference:
    """llama.cpp's quantizer on a model's linears."""

    def __init__(self, model, tokens, library):
        self.streamed, self.library = StreamedModel(open_checkpoint(model)), library
        library.ggml_quantize_chunk.restype = ctypes.c_size_t
        self.squares = mean_squares(model, tokens, self.streamed)

    def write(self, path, types=None, extra=None):
        """Writes a file whose linears and tables have the types given by name, or, without types, all in F32.

        Linears take their importance along; llama-imatrix gathers none for embedding and head.
        """
        source, encoded = self.streamed.checkpoint, {}
        for name, ggml_type in (types or {}).items():
            weight = f"{name}.weight" if name in self.squares else name
            read = partial(self._quantize, weight, self.squares.get(name), ggml_type)
            encoded[weight] = EncodedTensor(BY_NAME[ggml_type].number, read)
        config, tokenizer = self.streamed.config, load_tokenizer(source.folder)
        kind = "F16" if types else "F32"
        write_gguf(path, source, encoded, config=config, tokenizer=tokenizer, float_type=kind, extra=extra)

    def _quantize(self, name, squares, ggml_type):
        W = self.streamed.checkpoint.read([name])[name].float()
        outputs, inputs = W.shape
        rows = np.empty((outputs, BY_NAME[ggml_type].row_bytes(inputs)), np.uint8)
        values = W.contiguous()
        importance = None if squares is None else ctypes.c_void_p(squares.contiguous().data_ptr())
        self.library.ggml_quantize_chunk(
            BY_NAME[ggml_type].number, ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(rows.ctypes.data),
            ctypes.c_int64(0), ctypes.c_int64(outputs), ctypes.c_int64(inputs),
            importance,
        )  # fmt: skip
        return rows


@torch.no_grad()
def mean_squares(model, tokens, streamed):
    """The importance matrix: mean squared input of each linear, by its name in the checkpoint."""
    whole, sums = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), {}
    for i, name in itertools.product(range(len(streamed.blocks)), streamed.family.linears):
        linear = whole.get_submodule(f"{streamed.block_name(i)}.{name}")
        linear.register_forward_pre_hook(partial(_note, sums, streamed.stored_name(i, name)))
    for rows in tokens.split(4):
        whole.base_model(rows)  # no logits
    return {key: total / tokens.numel() for key, total in sums.items()}


def _note(sums, key, _, inputs):
    sums[key] = sums.get(key, 0) + inputs[0].float().square().flatten(0, -2).sum(0)


def predictions(reference, windows, client, path):
    """Log-probabilities of the F32 file on each window."""
    reference.write(path)
    model = client.Llama(str(path), n_ctx=windows.shape[1], threads=1)
    full = [torch.from_numpy(np.array(model.logits(row.tolist()))).log_softmax(-1)[:-1] for row in windows]
    model.close()
    return full


def measure(path, full, windows, client):
    """Perplexity, and mean KL from the F32 file's predictions."""
    model, nll, divergence, count = client.Llama(str(path), n_ctx=windows.shape[1], threads=1), 0.0, 0.0, 0
    for row, reference in zip(windows, full, strict=True):
        ours = torch.from_numpy(np.array(model.logits(row.tolist()))).double().log_softmax(-1)[:-1]
        theirs = reference.double()
        nll -= float(ours.gather(1, row[1:, None]).sum())
        divergence += float((theirs.exp() * (theirs - ours)).sum())
        count += len(ours)
    model.close()
    return {"perplexity": float(np.exp(nll / count)), "kl": divergence / count, "bytes": Path(path).stat().st_size}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--model", "--calibration", "--evaluation", "--client", "--out"):
        p.add_argument(flag, required=True)
    p.add_argument("--types", nargs="+", default=TYPES)
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--windows", type=int, default=48)
    args = p.parse_args()
    sys.path.append(args.client)
    import llamac
    import xllamacpp  # noqa: F401 - loads the library

    out = Path(args.out)
    done = (
        {tuple(json.loads(line)[k] for k in ("type", "seed", "tool")) for line in out.open()} if out.exists() else set()
    )
    windows = torch.from_numpy(np.load(args.evaluation)).long()[: args.windows]
    with tempfile.TemporaryDirectory() as scratch:
        scratch, full = Path(scratch), None
        for seed in args.seeds:
            calibration = args.calibration.format(seed=seed)
            todo = [(t, tool) for t in args.types for tool in ("llama.cpp", "ptq") if (t, seed, tool) not in done]
            if not todo:
                continue
            reference = Reference(args.model, torch.from_numpy(np.load(calibration)).long(), ctypes.CDLL(llamac._lib()))
            full = full or predictions(reference, windows, llamac, scratch / "f32.gguf")
            for ggml_type, tool in todo:
                start = time.process_time()
                if tool == "ptq":
                    spec = QuantSpec(
                        checkpoint_format="gguf", ggml_type=ggml_type, embed_type="F16", head_type="F16", seed=seed
                    )
                    folder = quantize_model(
                        args.model, spec, out=scratch / "ours", calibration=calibration, heldout="none"
                    ).folder
                    (path,) = folder.glob("*.gguf")
                else:
                    path = scratch / "reference.gguf"
                    reference.write(path, dict.fromkeys(reference.squares, ggml_type))
                seconds = time.process_time() - start
                row = {"model": Path(args.model).name, "type": ggml_type, "seed": seed, "tool": tool}
                row |= measure(path, full, windows, llamac) | {"cpu_seconds": round(seconds, 2)}
                shutil.rmtree(scratch / "ours", ignore_errors=True)
                with out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                    os.fsync(file.fileno())
                print(row, flush=True)


if __name__ == "__main__":
    main()
