"""python -m ptq.generate: text from a model folder, quantized or not, as the file stands."""

import gc
import shutil
import textwrap
from itertools import zip_longest

from calibration.errors import InputError
from ptq.console import run_command
from ptq.flags import Flags
from ptq.lazy import Lazy

transformers = Lazy("transformers")
continuation = Lazy("ptq.continuation")
load = Lazy("ptq.load")

GAP = "  |  "


def parser() -> Flags:
    """The command line's flags."""
    p = Flags("python -m ptq.generate", description=__doc__)
    p.add_argument("path", metavar="PATH", help="model folder or hub id")
    p.add_argument("--prompt", metavar="TEXT", required=True, help="what the text goes on from")
    p.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    p.add_argument("--compare", metavar="OTHER", help="a second artefact, printed beside the first")
    p.add_argument("--max-new-tokens", type=int, metavar="N",
                   help="stop after so many (default: 128, or what the context has room for)")  # fmt: skip
    p.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token")
    p.add_argument("--top-p", type=float, default=1.0, help="draw among the likeliest with this probability in all")
    p.add_argument("--seed", type=int, default=0, help="seed of the drawing")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    p.add_argument("--trust-remote-code", action="store_true", help="run Python code that the model folder brings")
    return p


def main(argv=None):
    """Runs the command line."""
    args = parser().parse_args(argv)
    run_command(lambda: _generate(args))


def _generate(args):
    _check(args)
    if args.compare is None:
        loaded = _load(args.path, args)
        streamer = transformers.TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
        _continue(loaded, args, streamer=streamer)
        return
    ids, texts = zip(*(_tokens_and_text(path, args) for path in (args.path, args.compare)), strict=True)
    print(side_by_side([args.path, args.compare], texts, shutil.get_terminal_size().columns))
    print(f"\n{_agreement(*ids)}")


def _check(args):
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {args.max_new_tokens} must be at least 1")
    if not 0 <= args.temperature < float("inf"):
        raise InputError(f"--temperature {args.temperature:g} must be 0 or more")
    if not 0 < args.top_p <= 1:
        raise InputError(f"--top-p {args.top_p:g} is not above 0 and at most 1")
    if not 0 <= args.seed < 2**32:
        raise InputError(f"--seed {args.seed} is not in 0 to 2^32 - 1")


def _load(path, args):
    return load.load_model(path, device=args.device, dtype=args.dtype, trust_remote_code=args.trust_remote_code)


def _continue(loaded, args, **options) -> list[int]:
    drawing = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
    ids = continuation.prompt_tokens(loaded, args.prompt, chat=args.chat)
    return continuation.continuation(loaded, ids, max_new_tokens=args.max_new_tokens, **drawing, **options)


def _tokens_and_text(path, args):
    loaded = _load(path, args)
    new = _continue(loaded, args)
    text = loaded.tokenizer.decode(new, skip_special_tokens=True)
    del loaded
    gc.collect()  # one model in memory at a time
    return new, text


def side_by_side(titles, texts, columns: int) -> str:
    """Two texts in two columns under their titles."""
    width = max(20, (columns - len(GAP)) // 2)
    cells = [[title[-width:], "-" * width, *_wrapped(text, width)] for title, text in zip(titles, texts, strict=True)]
    return "\n".join(f"{left:<{width}}{GAP}{right}".rstrip() for left, right in zip_longest(*cells, fillvalue=""))


def _wrapped(text, width):
    lines = text.expandtabs(4).splitlines()
    return [part for line in lines for part in textwrap.wrap(line, width, drop_whitespace=False) or [""]]


def _agreement(first, second):
    same = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    if same is None and len(first) == len(second):
        return f"the same {len(first)} tokens"
    return f"the same for {min(len(first), len(second)) if same is None else same} tokens"


if __name__ == "__main__":
    main()
