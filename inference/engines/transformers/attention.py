"""Attention for a batch of requests of unequal length, for processors.

transformers' way without a flash kernel packs all requests into one long sequence and masks out what
is not theirs: 8 requests of 1000 tokens then pay for 64. Here each request attends to its own tokens
only. It is the same arithmetic, so float32 answers stay those of `model.generate`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

NAME = "roundhouse_per_request"


def use_in(model: Any) -> bool:
    """Let `model` attend per request, if it is of the plain kind that this can do.

    To be called when the batching manager is there (it knows no names but its own) and its cache is
    not (which asks by name whether a mask is wanted: not here).
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    plain = kinds == {"full_attention"} and getattr(config, "sliding_window", None) is None
    if model.device.type != "cpu" or model.config._attn_implementation != "sdpa" or not plain:
        return False
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    model.set_attn_implementation(NAME)
    return True


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """One layer. `query` is [1, heads, tokens, width], requests one after the other."""
    if kwargs.get("softcap") is not None or kwargs.get("position_bias") is not None:
        raise ValueError("This kind of attention needs a mask.")
    if cache is None:  # one request alone, its earlier keys and values already with it
        return _attend_one(query, key, value, scaling).transpose(1, 2).contiguous(), None
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
    ends_q, ends_k = kwargs["cu_seq_lens_q"].tolist(), kwargs["cu_seq_lens_k"].tolist()
    parts = [
        _attend_one(query[:, :, q0:q1], key[:, :, k0:k1], value[:, :, k0:k1], scaling)
        for q0, q1, k0, k1 in zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _attend_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    heads, tokens, width = query.shape[1:]
    kv_heads, total = key.shape[1:3]
    if tokens == 1:
        # The usual step. Heads that share keys stand as rows of one: no copies of keys, no mask.
        rows = query.reshape(1, kv_heads, heads // kv_heads, width)
        return scaled_dot_product_attention(rows, key, value, scale=scaling).reshape(1, heads, 1, width)
    grouped = heads != kv_heads
    if tokens == total:
        return scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped
        )
    # A later piece of a prompt: all of what was there before, and its own tokens up to each.
    mask = torch.ones(tokens, total, dtype=torch.bool).tril(total - tokens)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=grouped)
