"""python -m ptq.evaluate: perplexity or task scores of a model folder, quantized or not, as the file stands."""

import argparse
import json
import os
from pathlib import Path

from calibration.corpora import CORPORA
from calibration.errors import InputError
from calibration.tokens import heldout_tokens, is_token_file
from ptq.console import run_command, table
from ptq.evaluation.harness import answer_store, load_tasks, preset_average, run_tasks
from ptq.evaluation.perplexity import measure_perplexity
from ptq.evaluation.tasks import PRESETS, choose_tasks
from ptq.load import load_model
from ptq.pipeline import choose_device, choose_dtype, load_tokenizer, window_length
from ptq.reload import open_weights
from ptq.streamed import StreamedModel


def parser() -> argparse.ArgumentParser:
    """The command line's flags."""
    p = argparse.ArgumentParser("python -m ptq.evaluate", description=__doc__, epilog=(
        "Windows of seqlen tokens that do not overlap, cut from the joined held-out text; every token of a window but "
        "the first counts. Figures compare only at the same text, tokenizer and seqlen."))  # fmt: skip
    p.add_argument("path", metavar="PATH", help="model folder or hub id")
    source = p.add_mutually_exclusive_group()
    source.add_argument("--corpus", choices=list(CORPORA), default="wikitext2", help="held-out part of a corpus")
    source.add_argument("--text", metavar="FILE", help=".txt, .jsonl, .parquet, or .npy token rows")
    p.add_argument("--seqlen", type=int, help="tokens in a window (default: 2048, or the model's context if shorter)")
    p.add_argument("--max-tokens", type=int, help="stop after so many tokens (default: the whole text)")
    tasks = p.add_argument_group("tasks", "by lm-evaluation-harness; the whole model is held in memory")
    tasks.add_argument("--tasks", metavar="PRESET|NAME,NAME", help=f"{', '.join(PRESETS)}, or the harness's names")
    tasks.add_argument("--limit", type=int, metavar="N", help="questions of each task (default: all)")
    tasks.add_argument("--data-dir", type=Path, metavar="DIR", help="questions from DIR/TASK.jsonl, not from the hub")
    tasks.add_argument("--batch-size", type=int, default=8, metavar="N", help="requests in a forward (default: 8)")
    tasks.add_argument("--cache", type=Path, default=_default_cache(), metavar="DIR",
                       help="answers are kept here and not asked again (default: ~/.cache/ptq)")  # fmt: skip
    p.add_argument("--json", action="store_true", help="print one JSON object")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    p.add_argument("--trust-remote-code", action="store_true", help="run Python code that the model folder brings")
    return p


def main(argv=None):
    """Runs the command line."""
    args = parser().parse_args(argv)
    run_command(lambda: _perplexity(args) if args.tasks is None else _tasks(args))


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ptq"


def _tasks(args):
    for flag, value in (("--limit", args.limit), ("--batch-size", args.batch_size)):
        if value is not None and value < 1:
            raise InputError(f"{flag} {value} must be at least 1")
    names, absent = choose_tasks(args.tasks, args.data_dir)
    tasks = load_tasks(names, args.data_dir)
    loaded = load_model(args.path, device=args.device, dtype=args.dtype, trust_remote_code=args.trust_remote_code)
    store = answer_store(loaded.folder, loaded.model, args.cache)
    scores = run_tasks(loaded.model, loaded.tokenizer, tasks, store, batch_size=args.batch_size, limit=args.limit)
    average = preset_average(args.tasks, scores)
    if args.json:
        print(json.dumps({"scores": [score.as_dict() for score in scores], "average": average, "absent": absent}))
        return
    rows = [(s.task, s.metric, f"{s.value:.4f}", _plus_minus(s.stderr), str(s.questions)) for s in scores]
    rows += [(average[0], "", f"{average[1]:.4f}", "", "")] if average else []
    print(table([("", "metric", "value", "stderr", "questions"), *rows]))
    if absent:
        print(f"\nnot in {args.data_dir}: {', '.join(absent)}")


def _plus_minus(error):
    return "" if error is None else f"± {error:.4f}"


def _perplexity(args):
    weights = open_weights(args.path, trust_remote_code=args.trust_remote_code)
    device = choose_device(args.device)
    model = StreamedModel(
        weights,
        dtype=choose_dtype(args.dtype, device, weights.config),
        device=device,
        trust_remote_code=args.trust_remote_code,
    )
    source = args.text or args.corpus
    tokenizer = load_tokenizer(Path(weights.folder), args.trust_remote_code)
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
