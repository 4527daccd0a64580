"""Attention on a CPU, among those that transformers chooses from: the fastest of several ways to the same numbers.

Causal attention of short rows goes by pieces (calibration/causal.py). With AMX, where no gradients are asked for,
torch's fused kernel takes factors in bf16 and sums in fp32, whatever the rows; in rows of 512 tokens its way back is
slower in bf16, and without AMX its way forth too.
"""

from functools import partial

import torch
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from calibration.causal import LONG, causal_attention
from calibration.processor import has_amx, product_precision, rounds

FASTER = "ptq_sdpa"  # its name among transformers' attention functions


def use_faster_attention(model: PreTrainedModel):
    """Lets a model whose attention would be torch's fused kernel have it from here."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(FASTER)


def is_faster(config: PreTrainedConfig) -> bool:
    """Whether attention is the one of this module."""
    return config._attn_implementation == FASTER


def _attention(module, query, key, value, attention_mask, **settings):
    """(B, T, H, E) what transformers' own gives for queries (B, H, T, D), keys and values (see causal_attention); None.

    Keys that are kept in bf16 take the fused kernel in bf16.
    """
    attend = partial(sdpa_attention_forward, module, attention_mask=attention_mask, **settings)
    if query.device.type != "cpu" or query.dtype != torch.float32:
        return attend(query, key, value)
    trained, in_bf16 = torch.is_grad_enabled(), rounds() and has_amx()
    if key.dtype == torch.bfloat16 or (in_bf16 and not trained):
        return _of_rounded_factors(module, query, key, value, attention_mask, **settings)
    if attention_mask is None and _is_short_and_causal(module, query, key, **settings):
        scale = settings.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return causal_attention(query, key, value, scale, trained=trained), None
    return (_InFp32.apply(attend, query, key, value), None) if in_bf16 else attend(query, key, value)


def _is_short_and_causal(
    module, query, key, dropout=0.0, is_causal=None, position_bias=None, cache=None, softcap=None, **_
):
    """Whether it is plain causal attention of a row over itself, short enough to go by pieces."""
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = is_causal and not dropout and position_bias is None and cache is None and softcap is None
    return plain and query.shape[2] == key.shape[2] < LONG


def _of_rounded_factors(module, query, key, value, mask, **settings):
    if mask is not None and mask.is_floating_point():
        mask = mask.bfloat16()
    factors = (factor.bfloat16() for factor in (query, key, value))
    out, weights = sdpa_attention_forward(module, *factors, mask, **settings)
    return out.to(query.dtype), weights


class _InFp32(torch.autograd.Function):
    """attend(query, key, value) and its gradients, both with products in fp32 whatever is on around them."""

    @staticmethod
    def forward(ctx, attend, *factors):
        ctx.factors = [factor.detach().requires_grad_() for factor in factors]
        with torch.enable_grad(), product_precision("ieee"):
            ctx.out, _ = attend(*ctx.factors)
        return ctx.out.detach()

    @staticmethod
    def backward(ctx, gradient):
        with product_precision("ieee"):
            return None, *torch.autograd.grad(ctx.out, ctx.factors, gradient, retain_graph=True)


AttentionInterface.register(FASTER, _attention)
AttentionMaskInterface.register(FASTER, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
