"""Texts of all lengths one behind the other in a single row, without padding, for a model on a processor.

Everything but attention looks at one token at a time, so nothing else sees the difference; attention is
replaced by one that keeps each text to itself. An accelerator does better with padding than with many
small attentions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface

from inference.engines.embedding.tokens import Piece

logger = logging.getLogger("roundhouse.engine")

ATTENTION = "each_text_by_itself"
ENDS = "cu_seq_lens_q"
"""Where each text begins, and the last one ends: transformers' name, which the pooling knows too."""
EXAMPLES = ("One.", "A text of some more words than the other two have.", "One of a few words.")
TOLERANCE = 1e-4

Rows = np.ndarray[Any, np.dtype[np.float32]]


class NotWholeTexts(Exception):
    """The model's tokens do not look at all of their text alike, which is all that `attend` can do."""


def attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: None, **given: Any
) -> tuple[torch.Tensor, None]:
    """See `transformers.AttentionInterface`. Raises NotWholeTexts for a model that masks, or weighs, tokens
    by their places."""
    narrowed = getattr(module, "is_causal", False) or given.get("sliding_window") is not None
    if narrowed or given.get("position_bias") is not None:
        raise NotWholeTexts
    lengths = given[ENDS].diff().tolist()
    texts = zip(*(whole.split(lengths, dim=2) for whole in (query, key, value)), strict=True)
    made = [
        torch.nn.functional.scaled_dot_product_attention(*text, scale=given.get("scaling")) for text in texts
    ]
    return torch.cat(made, dim=2).transpose(1, 2), None


def pack(transformer: Any, encode: Callable[[Sequence[Piece], bool], Rows], examples: list[Piece]) -> bool:
    """Have `transformer`, a module of sentence-transformers, read packed rows from now on.

    `encode` runs pieces through the whole model, packed or padded. False where the model gives other
    vectors for `examples` so, or fails: then it is as it was.
    """
    model = transformer.model
    if not model.is_backend_compatible() or model.dtype != torch.float32:
        return False
    padded = encode(examples, False)
    before = model.config._attn_implementation
    parameters = transformer.model_forward_params
    try:
        AttentionInterface.register(ATTENTION, attend)
        model.set_attn_implementation(ATTENTION)
        transformer.model_forward_params = parameters | {ENDS}
        if np.allclose(encode(examples, True), padded, rtol=0, atol=TOLERANCE * np.abs(padded).max()):
            return True
        logger.info("The model's vectors differ without padding, so its texts are padded.")
    except Exception as error:
        logger.info(
            "The model cannot do without padding (%s), so its texts are padded.", type(error).__name__
        )
    model.set_attn_implementation(before)
    transformer.model_forward_params = parameters
    return False
