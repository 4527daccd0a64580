"""python -m ptq.evaluate: perplexity or task scores of a model folder or GGUF file, quantized or not, as it stands."""

import argparse
import json
import tempfile
from pathlib import Path

from calibration.corpora import CORPORA
from calibration.errors import InputError
from ptq.console import run_command, table
from ptq.evaluation.protocols import PROTOCOLS
from ptq.evaluation.tasks import PRESETS, choose_tasks
from ptq.flags import Flags
from ptq.lazy import Lazy

defaults = Lazy("ptq.defaults")
divergence = Lazy("ptq.evaluation.divergence")
harness = Lazy("ptq.evaluation.harness")
measure = Lazy("ptq.measure")
perplexity = Lazy("ptq.evaluation.perplexity")

EPILOG = """protocols, never to be mixed:
  gptq       windows of 2048 tokens that do not overlap, cut from the joined text; every token but the first counts
  llama.cpp  as llama-perplexity: windows of 512 that begin with bos; the second half counts
  lm-eval    the harness's wikitext: whole documents; perplexity of words and bytes, bits per byte
Figures compare only at the same protocol, text, tokenizer and seqlen.
"""


def parser() -> Flags:
    """The command line's flags."""
    p = Flags("python -m ptq.evaluate", description=__doc__, epilog=EPILOG,
                                formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    p.add_argument("path", metavar="PATH", help="model folder, hub id or GGUF file")
    text = p.add_argument_group("perplexity")
    source = text.add_mutually_exclusive_group()
    source.add_argument("--corpus", choices=list(CORPORA), default="wikitext2", help="held-out part of a corpus")
    source.add_argument("--text", metavar="FILE", help=".txt, .jsonl, .parquet, or .npy token rows")
    text.add_argument("--protocol", choices=PROTOCOLS, default="gptq", help="see below (default: gptq)")
    text.add_argument("--seqlen", type=int, help="tokens in a window (default: the protocol's, or the model's context)")
    text.add_argument("--max-tokens", type=int, help="stop after so many tokens (default: the whole text)")
    text.add_argument("--reference", metavar="DIR", help="a full-precision model: KL divergence from it as well")
    tasks = p.add_argument_group("tasks", "by lm-evaluation-harness; the whole model is held in memory")
    tasks.add_argument("--tasks", metavar="PRESET|NAME,NAME", help=f"{', '.join(PRESETS)}, or the harness's names")
    tasks.add_argument("--limit", type=int, metavar="N", help="questions of each task (default: all)")
    tasks.add_argument("--data-dir", type=Path, metavar="DIR", help="questions from DIR/TASK.jsonl, not from the hub")
    tasks.add_argument("--batch-size", type=int, default=8, metavar="N", help="requests in a forward (default: 8)")
    tasks.add_argument("--cache", type=Path, metavar="DIR",
                       help="answers are kept here and not asked again (default: ~/.cache/ptq)")  # fmt: skip
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
    if args.tasks is not None:
        _tasks(args)
    elif args.protocol == "lm-eval":
        _documents(args)
    else:
        _windows(args)


def _tasks(args):
    for flag, value in (("--text", args.text), ("--max-tokens", args.max_tokens), ("--reference", args.reference)):
        if value is not None:
            raise InputError(f"--tasks asks questions and takes no {flag}: run the perplexity on its own")
    names, absent = choose_tasks(args.tasks, args.data_dir)
    scores = _scores(args, harness.load_tasks(names, args.data_dir))
    average = harness.preset_average(args.tasks, scores)
    if args.json:
        print(json.dumps({"scores": [score.as_dict() for score in scores], "average": average, "absent": absent}))
        return
    print(_score_table(scores, [(average[0], "", f"{average[1]:.4f}", "", "")] if average else []))
    if absent:
        print(f"\nnot in {args.data_dir}: {', '.join(absent)}")


def _documents(args):
    if args.max_tokens is not None or args.reference is not None:
        raise InputError("--protocol lm-eval takes whole documents: no --max-tokens, and no --reference")
    scores = _scores(args, measure.whole_documents(_source(args), args.data_dir))
    if args.json:
        print(json.dumps({"scores": [s.as_dict() for s in scores], "protocol": "lm-eval", "text": _source(args)}))
    else:
        print(_score_table(scores, []))


def _scores(args, tasks):
    counts = {"limit": args.limit, "batch_size": args.batch_size, "seqlen": args.seqlen}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value} must be at least 1")
    return measure.task_scores(args.path, tasks, cache=args.cache or measure.default_cache(), **counts, **_how(args))


def _score_table(scores, more):
    rows = [(s.task, s.metric, f"{s.value:.4f}", _plus_minus(s.stderr), str(s.questions)) for s in scores]
    return table([("", "metric", "value", "stderr", "samples"), *rows, *more])


def _plus_minus(error):
    return "" if error is None else f"± {error:.4f}"


def _windows(args):
    model = measure.open_streamed(args.path, **_how(args))
    cut = {"seqlen": args.seqlen, "max_tokens": args.max_tokens, "trust_remote_code": args.trust_remote_code}
    windows, skip = measure.protocol_windows(model, _source(args), args.protocol, **cut)
    with tempfile.TemporaryDirectory(prefix="ptq-") as folder:
        spill = {"spill": Path(folder), "budget": defaults.default_budget()}
        if args.reference is None:
            result = perplexity.measure_perplexity(model, windows, skip=skip, **spill)
            lines = [_perplexity_line(result, args)]
        else:
            reference = measure.open_streamed(args.reference, **_how(args))
            result = divergence.measure_divergence(model, reference, windows, skip=skip, **spill)
            lines = _divergence_lines(result, args)
    if args.json:
        print(json.dumps({**result.as_dict(), "protocol": args.protocol, "text": _source(args)}))
    else:
        print("\n".join(lines))


def _how(args):
    return {"device": args.device, "dtype": args.dtype, "trust_remote_code": args.trust_remote_code}


def _source(args):
    return args.text or args.corpus


def _perplexity_line(result, args):
    protocol = "" if args.protocol == "gptq" else f", protocol {args.protocol}"
    return (
        f"perplexity {result.perplexity:.4f} on {result.tokens} tokens of {_source(args)},"
        f" windows of {result.seqlen}{protocol}"
    )


def _divergence_lines(result, args):
    return [
        _perplexity_line(result.model, args),
        f"reference  {result.reference.perplexity:.4f} ({args.reference})",
        f"KL divergence {result.kl:.6f} ± {result.kl_stderr:.6f} nats; 99 % below {result.kl_99:.4f}, at most"
        f" {result.kl_max:.4f}",
        f"same likeliest token {result.same_top:.2%}",
    ]


if __name__ == "__main__":
    main()
