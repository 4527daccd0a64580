"""python -m ptq.report: draws OUT/report.html anew, with text of both models where the original is given."""

import gc
import json
from pathlib import Path

from calibration.errors import InputError
from ptq.console import run_command
from ptq.flags import Flags
from ptq.lazy import Lazy
from ptq.report.files import PAGE, REPORT, write_page
from ptq.report.page import Generations

continuation = Lazy("ptq.continuation")
load = Lazy("ptq.load")

PROMPT = "The "


def parser() -> Flags:
    """The command line's flags."""
    p = Flags("python -m ptq.report", description=__doc__)
    p.add_argument("out", type=Path, metavar="OUT", help="a folder that ptq.quantize wrote")
    p.add_argument("--model", metavar="DIR|HUB_ID", help="the full-precision model: what both say after the prompt")
    p.add_argument("--prompt", default=PROMPT, metavar="TEXT", help=f"(default: {PROMPT!r})")
    p.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="(default: 64)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    return p


def main(argv=None):
    """Runs the command line."""
    args = parser().parse_args(argv)
    run_command(lambda: _report(args))


def _report(args):
    if args.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {args.max_new_tokens} must be at least 1")
    report = read_report(args.out)
    generations = None
    if args.model is not None:
        texts = [_said(path, args) for path in (args.model, args.out)]
        generations = Generations(args.prompt, *texts)
    write_page(args.out, report, generations)
    print(f"written: {args.out / PAGE}")


def read_report(out: Path) -> dict:
    """A run's record.

    Raises:
        InputError: There is none, or it is damaged.
    """
    file = out / REPORT
    if not file.is_file():
        raise InputError(f"{out}: has no {REPORT}; give a folder that ptq.quantize wrote")
    try:
        report = json.loads(file.read_bytes())
    except ValueError:
        raise InputError(f"{file}: damaged") from None
    if not isinstance(report, dict) or not {"identity", "linears", "bits_per_weight"} <= report.keys():
        raise InputError(f"{file}: is no record of a run of ptq.quantize")
    return report


def _said(path, args):
    loaded = load.load_model(path, device=args.device, dtype=args.dtype)
    new = continuation.continuation(
        loaded, continuation.prompt_tokens(loaded, args.prompt), max_new_tokens=args.max_new_tokens
    )
    text = loaded.tokenizer.decode(new, skip_special_tokens=True)
    del loaded
    gc.collect()  # one model in memory at a time
    return text


if __name__ == "__main__":
    main()
