"""python -m ptq.evaluate: perplexity of a model folder or GGUF file, quantized or not, as the file stands."""

import argparse
import json

from calibration.corpora import CORPORA
from calibration.errors import InputError
from calibration.tokens import heldout_tokens, is_token_file
from ptq.console import run_command
from ptq.evaluation.perplexity import measure_perplexity
from ptq.pipeline import choose_device, choose_dtype, window_length
from ptq.reload import open_tokenizer, open_weights
from ptq.streamed import StreamedModel


def parser() -> argparse.ArgumentParser:
    """The command line's flags."""
    p = argparse.ArgumentParser("python -m ptq.evaluate", description=__doc__, epilog=(
        "Windows of seqlen tokens that do not overlap, cut from the joined held-out text; every token of a window but "
        "the first counts. Figures compare only at the same text, tokenizer and seqlen."))  # fmt: skip
    p.add_argument("path", metavar="PATH", help="model folder, hub id or GGUF file")
    source = p.add_mutually_exclusive_group()
    source.add_argument("--corpus", choices=list(CORPORA), default="wikitext2", help="held-out part of a corpus")
    source.add_argument("--text", metavar="FILE", help=".txt, .jsonl, .parquet, or .npy token rows")
    p.add_argument("--seqlen", type=int, help="tokens in a window (default: 2048, or the model's context if shorter)")
    p.add_argument("--max-tokens", type=int, help="stop after so many tokens (default: the whole text)")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    p.add_argument("--trust-remote-code", action="store_true", help="run Python code that the model folder brings")
    return p


def main(argv=None):
    """Runs the command line."""
    args = parser().parse_args(argv)
    run_command(lambda: _evaluate(args))


def _evaluate(args):
    weights = open_weights(args.path, trust_remote_code=args.trust_remote_code)
    device = choose_device(args.device)
    model = StreamedModel(
        weights,
        dtype=choose_dtype(args.dtype, device, weights.config),
        device=device,
        trust_remote_code=args.trust_remote_code,
    )
    source = args.text or args.corpus
    tokenizer = open_tokenizer(weights, trust_remote_code=args.trust_remote_code)
    if tokenizer is None and not is_token_file(source):
        raise InputError(f"{weights.folder}: has no usable tokenizer; give --text a .npy file of ids")
    windows = heldout_tokens(
        tokenizer,
        source,
        seqlen=window_length(model.config, args.seqlen),
        max_tokens=args.max_tokens,
        vocab_size=model.config.vocab_size,
    )
    window_length(model.config, windows.shape[1])
    result = measure_perplexity(model, windows)
    if args.json:
        print(json.dumps({**result.as_dict(), "text": source}))
    else:
        print(f"perplexity {result.perplexity:.4f} on {result.tokens} tokens of {source}, windows of {result.seqlen}")


if __name__ == "__main__":
    main()
