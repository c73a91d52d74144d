"""Attention for a batch of requests of unequal length, for processors.

transformers' way without a flash kernel packs all requests into one long sequence and masks out what
is not theirs: 8 requests of 1000 tokens then pay for 64. Here each request attends to its own tokens
only; those that add one token, and are of lengths not too unlike, do so together. It is the same arithmetic,
so float32 answers stay those of `model.generate`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

NAME = "roundhouse_per_request"

PADDED = 2
"""Requests attend together while filling them all up to the longest one makes at most so much of them."""


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

    AttentionInterface.register(NAME, Attention())
    model.set_attn_implementation(NAME)
    return True


@dataclass(frozen=True, slots=True)
class _Step:
    """What all layers of one step share. `ends_q` and `ends_k` are where each request's tokens begin and
    end, of those that are new and of all."""

    read_index: list[torch.Tensor]
    """Of the batch: a list of its own for each step."""
    ends_q: list[int]
    ends_k: list[int]
    together: list[torch.Tensor] | None
    """The `read_index` that reads as many tokens for each request; None: they attend one by one."""
    mask: torch.Tensor | None
    """Of these, which are there. None: all."""


class Attention:
    """The attention of all layers."""

    def __init__(self) -> None:
        self._step: _Step | None = None

    def __call__(
        self,
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
        step = self._step
        if step is None or step.read_index is not kwargs["read_index"]:
            step = self._step = _step(kwargs, query.dtype)
        if step.together is not None:
            kwargs["read_index"] = step.together
        key, value = cache.update(
            key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs
        )
        if step.together is not None:
            return _attend_together(query, key, value, step.mask, scaling), None
        parts = [
            _attend_one(query[:, :, q0:q1], key[:, :, k0:k1], value[:, :, k0:k1], scaling)
            for (q0, q1), (k0, k1) in zip(pairwise(step.ends_q), pairwise(step.ends_k), strict=True)
        ]
        return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _step(kwargs: dict[str, Any], dtype: torch.dtype) -> _Step:
    read_index = kwargs["read_index"]
    (ends,) = kwargs["cu_seq_lens_k"].values()
    ends_q, ends_k = kwargs["cu_seq_lens_q"].tolist(), ends.tolist()
    lengths = [end - begin for begin, end in pairwise(ends_k)]
    count, longest = len(lengths), max(lengths)
    if count == 1 or ends_q[-1] > count or count * longest > PADDED * ends_k[-1]:
        return _Step(read_index, ends_q, ends_k, None, None)
    (reads,) = read_index
    if count * longest == ends_k[-1]:
        return _Step(read_index, ends_q, ends_k, read_index, None)
    # What fills a request up is its first token, which it does not look at.
    there = torch.arange(longest) < torch.tensor(lengths).unsqueeze(-1)
    filled = reads[torch.tensor(ends_k[:-1])].unsqueeze(-1).repeat(1, longest)
    filled[there] = reads
    mask = torch.zeros(there.shape, dtype=dtype).masked_fill(~there, -torch.inf)
    return _Step(read_index, ends_q, ends_k, [filled.flatten()], mask[:, None, None])


def _attend_together(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
) -> torch.Tensor:
    """One new token of each request; heads that share keys stand as rows of one. Returns
    [1, requests, heads, width]."""
    heads, requests, width = query.shape[1:]
    kv_heads = key.shape[1]
    rows = query.transpose(1, 2).reshape(requests, kv_heads, heads // kv_heads, width)
    key, value = (one.reshape(kv_heads, requests, -1, width).transpose(0, 1) for one in (key, value))
    attended = scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
    return attended.reshape(1, requests, heads, width)


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
