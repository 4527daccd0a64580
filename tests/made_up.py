"""What pages are drawn from, made up: the record of a run, and the result of a cell of baselines."""

from ptq.spec import QuantSpec

KINDS = ("self_attn.q_proj", "mlp.down_proj")


def record(blocks=3, **changes):
    """A run of so many blocks, as in ptq_report.json."""
    linears = {
        f"model.layers.{i}.{kind}": {"error": 0.001 * (i + 1), "error_gptq": 0.2, "error_rtn": 0.3}
        for i in range(blocks)
        for kind in KINDS
    }
    measured = {"perplexity": 5.5, "nll": 1.7, "tokens": 4096, "seqlen": 2048, "stderr": 0.04}
    return {
        "identity": {
            "spec": QuantSpec().as_dict(),
            "calibration": {"source": "c4", "samples": 128, "seqlen": 2048, "fingerprint": "f1"},
        },
        "model": "demo",
        "command": "python -m ptq.quantize --bits 2 --out 'a b'",
        "perplexity": {"text": "wikitext2", "before": measured, "after": measured | {"perplexity": 9.25}},
        "parameters": 1000,
        "bits_per_weight": {"before": 16.0, "after": 2.5, "linears": 2.14},
        "file_bytes": {"before": 2_000_000, "after": 500_000},
        "seconds": {"solve": 60.0, "total": 61.0},
        "peak_memory_bytes": {"resident": 10**9},
        "resumed": False,
        "runtimes": [
            {"name": "transformers + GPTQModel", "loads": True, "why": ""},
            {"name": "ExLlamaV2", "loads": False, "why": "its kernel has 4"},
        ],
        "bytes": {"codes": 300_000, "kept matrices": 200_000},
        "histograms": {
            "model.layers.2.mlp.down_proj": {"low": -1.0, "high": 1.0, "before": [1, 5, 1], "after": [0, 7, 0]}
        },
        "linears": linears,
    } | changes  # fmt: skip


RESULT = {
    "figures": [{"task": "wikitext2", "metric": "perplexity", "value": 5.472, "stderr": 0.03, "questions": 9},
                {"task": "piqa", "metric": "acc", "value": 0.78, "stderr": 0.01, "questions": 9}],
    "bits_per_weight": {"before": 16, "after": 2.6, "linears": 2.14},
    "file_bytes": {"before": 1, "after": 2**31},
    "peak_memory_bytes": {"resident": 2_000_000_000},
    "seconds": 90.0,
    "resumed": False,
    "calibration": {"source": "c4", "samples": 128, "seqlen": 2048},
}  # fmt: skip
