"""Tiny random BERTs with a WordPiece tokenizer of their own: real model folders, made without downloads.

    make_tiny_encoder(tmp_path / "plain")                      # texts to vectors of 16 numbers
    make_tiny_encoder(tmp_path / "cls", pooling="cls", ...)    # described by a modules.json
    make_tiny_reranker(tmp_path / "pairs")                     # pairs to one score

A token is one lower-case letter or digit; anything else is [UNK]. A text is framed [CLS] … [SEP].
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
CONTEXT = 64


def make_tiny_encoder(
    folder: Path, *, pooling: str | None = None, prompts: dict[str, str] | None = None, **config: Any
) -> Path:
    """A BertModel; with `pooling`, described as sentence-transformers does."""
    from transformers import BertModel

    _save(folder, BertModel, config)
    if pooling is not None:
        kinds = ["Transformer", "Pooling", "Normalize"]
        modules = [
            {
                "idx": at,
                "name": str(at),
                "path": "" if at == 0 else f"{at}_{kind}",
                "type": f"sentence_transformers.models.{kind}",
            }
            for at, kind in enumerate(kinds)
        ]
        write(folder / "modules.json", modules)
        write(folder / "sentence_bert_config.json", {"max_seq_length": CONTEXT, "do_lower_case": True})
        write(
            folder / "1_Pooling" / "config.json",
            {
                "word_embedding_dimension": 16,
                "pooling_mode_mean_tokens": False,
                f"pooling_mode_{pooling}": True,
            },
        )
        write(folder / "config_sentence_transformers.json", {"prompts": prompts or {}})
    return folder


def make_tiny_reranker(folder: Path, *, labels: int = 1) -> Path:
    from transformers import BertForSequenceClassification

    _save(folder, BertForSequenceClassification, {"num_labels": labels})
    return folder


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def _save(folder: Path, kind: Any, config: dict[str, Any]) -> None:
    import torch
    from transformers import BertConfig

    size = _make_tokenizer(folder)
    torch.manual_seed(0)
    model = kind(
        BertConfig(
            vocab_size=size,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=CONTEXT,
            initializer_range=0.5,
            **config,
        )
    )
    model.save_pretrained(folder)


def _make_tokenizer(folder: Path) -> int:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    letters = [*string.ascii_lowercase, *string.digits]
    words = [*SPECIALS, *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {word: at for at, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    tokenizer.add_special_tokens(SPECIALS)
    # As real models bring them along; an engine must not be cut to these.
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": CONTEXT,
            "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
            **names,
        },
    )
    return len(words)
