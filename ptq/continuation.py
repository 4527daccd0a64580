"""What a loaded model says after a prompt."""

import torch
from transformers import TextStreamer, set_seed

from calibration.errors import InputError
from ptq.defaults import context_length
from ptq.load import LoadedModel

NEW_TOKENS = 128


def prompt_tokens(loaded: LoadedModel, prompt: str, *, chat=False) -> torch.Tensor:
    """A prompt as token ids (1, T), with `chat` inside the model's chat template.

    Raises:
        InputError: There are no tokens, the tokenizer does not fit the model, or there is no working template.
    """
    tokenizer, vocabulary = loaded.tokenizer, loaded.model.config.vocab_size
    text = _in_template(loaded, prompt) if chat else prompt
    ids = torch.tensor([tokenizer(text, add_special_tokens=not chat).input_ids], dtype=torch.long)
    if ids.numel() == 0:
        raise InputError(f"the prompt {prompt!r} has no tokens")
    if int(ids.max()) >= vocabulary:
        raise InputError(
            f"{loaded.folder}: its tokenizer gives id {int(ids.max())}; the vocabulary is {vocabulary} ids"
        )
    return ids


def continuation(
    loaded: LoadedModel,
    ids: torch.Tensor,
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    streamer: TextStreamer | None = None,
) -> list[int]:
    """The tokens that follow ids (1, T).

    Args:
        loaded: The model.
        ids: The prompt.
        max_new_tokens: At most so many; None for NEW_TOKENS, or what the context has room for.
        temperature: 0 takes the likeliest token, else tokens are drawn.
        top_p: Draws among the likeliest tokens with this probability in all.
        seed: Of the drawing.
        streamer: Prints tokens as they come.

    Raises:
        InputError: The context has no room.
    """
    context = context_length(loaded.model.config) or 1 << 30
    wanted = max_new_tokens or min(NEW_TOKENS, max(1, context - ids.shape[1]))
    if ids.shape[1] + wanted > context:
        raise InputError(
            f"a prompt of {ids.shape[1]} tokens and {wanted} new ones pass the model's context of {context} positions"
        )
    end = loaded.model.generation_config.eos_token_id
    if temperature > 0:
        set_seed(seed)
    out = loaded.model.generate(
        ids.to(loaded.model.device),
        attention_mask=torch.ones_like(ids).to(loaded.model.device),
        max_new_tokens=wanted,
        do_sample=temperature > 0,
        pad_token_id=end[0] if isinstance(end, list) else end,  # one row has no padding; unset, transformers warns
        streamer=streamer,
        **({"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}),
    )
    return out[0, ids.shape[1] :].tolist()


def _in_template(loaded, prompt):
    if not loaded.tokenizer.chat_template:
        raise InputError(f"{loaded.folder}: its tokenizer has no chat template; leave out --chat")
    messages = [{"role": "user", "content": prompt}]
    try:
        return loaded.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program of the model's author
        raise InputError(f"{loaded.folder}: its chat template fails ({type(error).__name__}: {error})") from None
