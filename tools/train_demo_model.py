"""Trains the small Llama that is embedded in the package (ptq/demo) on the running Python's own standard library.

    python tools/train_demo_model.py --out /tmp/demo-llama --minutes 85

Text, file filter and the split into 95% training and 5% held-out files are those of the `stdlib` corpus
(calibration/corpora.py), so what `ptq.evaluate --corpus stdlib` measures was never trained on. The learning rate
follows the clock, so a run is as good as its machine and not repeatable to the bit.

The committed model: these defaults, 85 minutes on 2 CPU cores, 11.4 million tokens (under two epochs of CPython 3.11's
library), held-out perplexity 23.7 on 60,809 tokens in windows of 512. It is under-trained, so coarse grids hurt it
less than they hurt a finished model. A GPU gets through as many tokens in minutes: --device cuda.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from calibration.corpora import load_documents
from calibration.tokens import heldout_tokens

END = "<|endoftext|>"
HEAD = 32  # width of an attention head
CONTEXT = 1024
HELDOUT_WINDOWS = 119
WARMUP_STEPS = 100
LOWEST_RATE = 0.05  # of the highest, at the end of the cosine


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    p.add_argument("--minutes", type=float, default=85, help="time to train for (default: 85)")
    p.add_argument("--probe", action="store_true", help="train for one minute, print the speed and write nothing")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    p.add_argument("--compile", action="store_true", help="compile the model first: worth it on a GPU")
    p.add_argument("--hidden", type=int, default=256, help="hidden size, a multiple of 64 (default: 256)")
    p.add_argument("--inter", type=int, default=768, help="width of the MLP (default: 768)")
    p.add_argument("--layers", type=int, default=6, help="decoder blocks (default: 6)")
    p.add_argument("--vocab", type=int, default=4096, help="tokens of the byte-level BPE (default: 4096)")
    p.add_argument("--seqlen", type=int, default=512, help="tokens in a training window (default: 512)")
    p.add_argument("--batch", type=int, default=16, help="windows in a step (default: 16)")
    p.add_argument("--rate", type=float, default=2e-3, help="highest learning rate (default: 2e-3)")
    p.add_argument("--seed", type=int, default=0, help="of weights and windows (default: 0)")
    return p


def train_tokenizer(texts: list[str], vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer whose one special token, id 0, stands before every file."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, clean_up_tokenization_spaces=False
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All files as one row of ids, each behind the end token."""
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([i for ids in encoded for i in (tokenizer.bos_token_id, *ids)])


def build_model(args: argparse.Namespace) -> LlamaForCausalLM:
    """A Llama with two query heads to a key-value head and a tied head."""
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.inter,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // HEAD,
        num_key_value_heads=args.hidden // HEAD // 2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).to(args.device)


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW that decays the linears, not norms and embeddings."""
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        (decayed if parameter.dim() == 2 and "embed" not in name else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def rate_at(step: int, share: float, highest: float) -> float:
    """Learning rate after `share` of the time: a short warm-up by steps, then half a cosine by the clock."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(share, 1)))
    return highest * min(1, (step + 1) / WARMUP_STEPS) * (LOWEST_RATE + (1 - LOWEST_RATE) * cosine)


def train(model: nn.Module, ids: torch.Tensor, args: argparse.Namespace, seconds: float):
    """Trains on random windows until the time is over; prints about a hundred lines on the way."""
    optimizer, forward = build_optimizer(model), torch.compile(model) if args.compile else model
    generator = torch.Generator().manual_seed(args.seed + 1)
    start, step, shown, pause = time.perf_counter(), 0, 0.0, max(5.0, seconds / 100)
    while (spent := time.perf_counter() - start) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, spent / seconds, args.rate)
        loss = take_step(forward, optimizer, draw_windows(ids, args, generator))
        step += 1
        if spent - shown >= pause:
            shown = spent
            print(f"{spent / 60:.1f} min, {progress(step, spent, ids, args)}, loss {loss.item():.3f}", flush=True)
    print(f"trained: {progress(step, time.perf_counter() - start, ids, args)}", flush=True)


def draw_windows(ids: torch.Tensor, args: argparse.Namespace, generator: torch.Generator) -> torch.Tensor:
    """(batch, seqlen) ids at random places."""
    starts = torch.randint(0, len(ids) - args.seqlen + 1, (args.batch,), generator=generator).tolist()
    return torch.stack([ids[i : i + args.seqlen] for i in starts]).to(args.device)


def take_step(forward, optimizer: torch.optim.Optimizer, windows: torch.Tensor) -> torch.Tensor:
    """One optimizer step in bf16 with gradients clipped to norm 1; the loss before it."""
    with torch.autocast(windows.device.type, dtype=torch.bfloat16):
        loss = forward(input_ids=windows, labels=windows, use_cache=False).loss
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    return loss.detach()


def progress(step: int, seconds: float, ids: torch.Tensor, args: argparse.Namespace) -> str:
    """Steps, tokens, epochs and speed so far."""
    seen = step * args.batch * args.seqlen
    return f"{step} steps, {seen} tokens, {seen / len(ids):.2f} epochs, {seen / max(seconds, 1e-9):.0f} tokens/s"


@torch.no_grad()
def measure_perplexity(model: nn.Module, windows: torch.Tensor) -> float:
    """Perplexity of windows (n, seqlen), each on its own."""
    losses = [model(input_ids=w[None].to(model.device), labels=w[None].to(model.device)).loss.item() for w in windows]
    return math.exp(sum(losses) / len(losses))


def main(argv=None):
    args = parser().parse_args(argv)
    if args.out.exists():
        parser().error(f"{args.out} exists already")
    torch.manual_seed(args.seed)
    texts = load_documents("stdlib", "train", needed_characters=None)
    tokenizer = train_tokenizer(texts, args.vocab)
    ids, model = encode(tokenizer, texts), build_model(args)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(texts)} files, {len(ids)} training tokens, {parameters} parameters, on {args.device}", flush=True)
    train(model, ids, args, seconds=60 if args.probe else 60 * args.minutes)
    if args.probe:
        return
    model = model.eval().to(torch.bfloat16).float()  # what the file will hold
    windows = heldout_tokens(tokenizer, "stdlib", seqlen=args.seqlen, max_tokens=HELDOUT_WINDOWS * args.seqlen)
    counted = windows.numel() - len(windows)
    print(f"held-out perplexity {measure_perplexity(model, windows):.2f} on {counted} tokens", flush=True)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
