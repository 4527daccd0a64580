"""A model folder or GGUF file, quantized or not, as a whole transformers model and its tokenizer.

This is where a new kind of artefact is taken in: `open_weights` gives its weights, `open_tokenizer` its tokenizer.
Packed weights are dequantized on the way, so no kernels are needed and what runs is what the file says.
"""

from dataclasses import dataclass
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from calibration.errors import InputError
from ptq.defaults import choose_device, choose_dtype
from ptq.reload import open_tokenizer, open_weights
from ptq.streamed import StreamedModel


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, in evaluation mode, and the folder it came from."""

    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_model(path: str | Path, *, device="auto", dtype="auto", trust_remote_code=False) -> LoadedModel:
    """Loads an artefact whole.

    Args:
        path: Model folder, hub id or GGUF file.
        device: As choose_device.
        dtype: As choose_dtype.
        trust_remote_code: Run Python code that the folder brings.

    Raises:
        InputError: As open_weights and StreamedModel, or there is no usable tokenizer.
    """
    weights = open_weights(path, trust_remote_code=trust_remote_code)
    tokenizer = open_tokenizer(weights, trust_remote_code=trust_remote_code)
    if tokenizer is None:
        raise InputError(f"{weights.folder}: has no usable tokenizer")
    place = choose_device(device)
    streamed = StreamedModel(
        weights,
        dtype=choose_dtype(dtype, place, weights.config),
        device=place,
        trust_remote_code=trust_remote_code,
    )
    model = streamed.whole()
    if (weights.folder / "generation_config.json").is_file():
        model.generation_config = _generation_config(weights.folder)
    return LoadedModel(weights.folder, model, tokenizer)


def _generation_config(folder):
    try:
        return GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{folder / 'generation_config.json'}: transformers cannot read it ({error})") from None
