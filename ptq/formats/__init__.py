"""What a run's output may be: one module a kind of file, with everything that depends on the kind."""

from ptq.formats.gguf import GgufFormat
from ptq.formats.gptq import GptqFormat


def format_of(spec) -> GptqFormat | GgufFormat:
    """The format that a QuantSpec names."""
    return GgufFormat(spec) if spec.checkpoint_format == "gguf" else GptqFormat(spec)
