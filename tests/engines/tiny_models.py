"""More tiny random models, of the kinds that continuous batching cannot run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.engines.tiny_model import make_tiny_tokenizer


def make_tiny_t5(folder: Path, *, chat: bool = False) -> Path:
    """An encoder-decoder model, which answers what its encoder has read. With `chat`, it has a template."""
    import json

    from transformers import T5Config, T5ForConditionalGeneration

    size = make_tiny_tokenizer(folder)
    if not chat:
        about = json.loads((folder / "tokenizer_config.json").read_text())
        del about["chat_template"]
        (folder / "tokenizer_config.json").write_text(json.dumps(about))
    config = T5Config(
        vocab_size=size,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        n_positions=256,
        pad_token_id=size - 1,
        eos_token_id=size - 1,
        decoder_start_token_id=size - 1,
        initializer_factor=4.0,
        tie_word_embeddings=False,
        dtype="float32",
    )
    return _saved(T5ForConditionalGeneration, config, folder)


def make_tiny_wide_llama(folder: Path) -> Path:
    """One whose rows are as long as bitsandbytes' blocks: shorter ones are none of its business."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = make_tiny_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
        initializer_range=0.5,
        dtype="float32",
    )
    return _saved(LlamaForCausalLM, config, folder)


def make_tiny_bloom(folder: Path) -> Path:
    """A decoder without paged attention: its positions are biases."""
    from transformers import BloomConfig, BloomForCausalLM

    size = make_tiny_tokenizer(folder)
    config = BloomConfig(
        vocab_size=size,
        hidden_size=32,
        n_layer=2,
        n_head=4,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
        initializer_range=0.5,
        dtype="float32",
    )
    return _saved(BloomForCausalLM, config, folder)


def make_tiny_mamba(folder: Path) -> Path:
    """A decoder without attention: padding would go through its state."""
    from transformers import MambaConfig, MambaForCausalLM

    size = make_tiny_tokenizer(folder)
    config = MambaConfig(
        vocab_size=size,
        hidden_size=32,
        state_size=4,
        num_hidden_layers=2,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
        initializer_range=0.5,
        dtype="float32",
    )
    return _saved(MambaForCausalLM, config, folder)


def _saved(kind: Any, config: Any, folder: Path) -> Path:
    import torch
    from transformers import GenerationConfig

    torch.manual_seed(0)
    model = kind(config)
    model.generation_config = GenerationConfig(
        bos_token_id=getattr(config, "bos_token_id", None),
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        decoder_start_token_id=getattr(config, "decoder_start_token_id", None),
        do_sample=False,
    )
    model.save_pretrained(folder)
    return folder
