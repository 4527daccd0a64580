"""python -m ptq.demo.bigcode OUT: a small GPTBigCode, StarCoder's architecture, made and trained on the spot.

It stands in where the real model cannot be had: one key-value head, learned positions, biases everywhere and a tied
head, as in StarCoderBase, a thousandth of its size. Half a minute of training on the running Python's library takes it
to a perplexity near 200: it shows that every step works, and says little about what quantization costs.
"""

import argparse
import math
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoTokenizer, GPTBigCodeConfig, GPTBigCodeForCausalLM, PreTrainedTokenizerBase

from calibration.tokens import sample_calibration
from ptq.demo import DEMO

WIDTH, BLOCKS, HEADS, CONTEXT = 256, 2, 4, 512
STEPS, ROWS, SEQLEN = 60, 8, 128
RATE, WARMUP, LOWEST_RATE = 2e-3, 10, 0.05


def make_bigcode(out: str | Path, *, tokenizer: str | Path | None = None, steps: int = STEPS, seed: int = 0) -> Path:
    """Trains the model and writes it as a Hugging Face folder in bf16, unless the folder is there.

    Args:
        out: The folder.
        tokenizer: Folder or hub id of the tokenizer, for example the real one's, bigcode/starcoderbase-3b; None for
            the embedded demo model's. A vocabulary of 49,152 takes five times as long.
        steps: Of ROWS x SEQLEN tokens.
        seed: Of weights and text.

    Raises:
        OSError: transformers finds no tokenizer there.
        InputError: The text does not suffice.
    """
    out = Path(out)
    if out.exists():
        return out
    words = AutoTokenizer.from_pretrained(DEMO if tokenizer is None else tokenizer)
    rows = sample_calibration(words, "stdlib", samples=steps * ROWS, seqlen=SEQLEN, seed=seed, vocab_size=len(words))
    torch.manual_seed(seed)
    model = GPTBigCodeForCausalLM(_config(words))
    if tokenizer is None:  # the same tokens and width: a start that is worth many minutes
        model.get_input_embeddings().weight.data.copy_(_demo_embedding())
    _train(model, rows.tokens.view(steps, ROWS, SEQLEN))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.") as aside:
        whole = Path(aside) / out.name
        model.to(torch.bfloat16).save_pretrained(whole)
        words.save_pretrained(whole)
        whole.rename(out)
    return out


def _config(words: PreTrainedTokenizerBase) -> GPTBigCodeConfig:
    return GPTBigCodeConfig(
        vocab_size=len(words),
        n_embd=WIDTH,
        n_inner=4 * WIDTH,
        n_layer=BLOCKS,
        n_head=HEADS,
        n_positions=CONTEXT,
        multi_query=True,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )


def _demo_embedding() -> torch.Tensor:
    with safe_open(DEMO / "model.safetensors", "pt") as file:
        return file.get_tensor("model.embed_tokens.weight")


def _train(model, batches: torch.Tensor):
    """One step a batch (rows, seqlen): AdamW, a short warm-up, half a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    model.train()
    for step, batch in enumerate(batches):
        cosine = 0.5 * (1 + math.cos(math.pi * step / len(batches)))
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / WARMUP) * (LOWEST_RATE + (1 - LOWEST_RATE) * cosine)
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()


def main(argv=None):
    """Runs the command line."""
    p = argparse.ArgumentParser("python -m ptq.demo.bigcode", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    p.add_argument("out", metavar="OUT", help="folder to write; left alone if it is there")
    p.add_argument("--tokenizer", metavar="DIR|HUB_ID", help="(default: the embedded demo model's)")
    p.add_argument("--steps", type=int, default=STEPS, help=f"of training (default: {STEPS})")
    args = p.parse_args(argv)
    print(make_bigcode(args.out, tokenizer=args.tokenizer, steps=args.steps))


if __name__ == "__main__":
    main()
