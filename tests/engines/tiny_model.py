"""A tiny random Llama with its own byte-level tokenizer: a real model folder, made without downloads.

It answers nonsense, but the same nonsense every time, and it loads in milliseconds:

    make_tiny_llama(tmp_path / "tiny")

The tokenizer has one token per byte (so any text survives encode and decode), plus `<|im_start|>`
and `<|im_end|>`; the chat template is ChatML. Ids: bytes 0 to 255 as 0 to 255 of the byte-level
alphabet in its own order, then the specials.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
START, END = "<|im_start|>", "<|im_end|>"


def make_tiny_tokenizer(folder: Path, controls: Sequence[str] = ()) -> int:
    """Write a byte-level tokenizer with a chat template into `folder`, with these special tokens before its
    own; return its vocabulary size."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in (*controls, START, END)])
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": START,
        "eos_token": END,
        "pad_token": END,
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2))
    return tokenizer.get_vocab_size()


def make_tiny_llama(
    folder: Path, *, seed: int = 0, context_length: int = 512, controls: Sequence[str] = ()
) -> Path:
    """Write a whole model into `folder` (made when missing) and return it. About 0.2 MB."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    size = make_tiny_tokenizer(folder, controls)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context_length,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
        tie_word_embeddings=True,
        initializer_range=0.5,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1, do_sample=False
    )
    model.save_pretrained(folder)
    return folder


def make_tiny_gguf(path: Path) -> Path:
    """Write a random Llama with a byte-level tokenizer as one GGUF file and return it.

    Its pre-tokenizer is SmolLM's: digits one by one. Two newlines are one token, id 256.
    """
    import gguf
    import numpy
    from tokenizers import pre_tokenizers

    newline = "\u010a"  # as the byte-level alphabet spells it
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), newline * 2, START, END]
    size, width, inner, heads = len(tokens), 32, 64, 4
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(1)
    writer.add_context_length(256)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * (size - 2) + [gguf.TokenType.CONTROL] * 2)
    # Whether this merge happens before a digit shows where the pre-tokenizer splits.
    writer.add_token_merges([f"{newline} {newline}"])
    writer.add_bos_token_id(size - 2)
    writer.add_eos_token_id(size - 1)
    writer.add_pad_token_id(size - 1)
    writer.add_chat_template(CHAT_TEMPLATE)
    random = numpy.random.default_rng(0)
    shapes = {
        "token_embd": (size, width),
        "output_norm": (width,),
        "blk.0.attn_norm": (width,),
        "blk.0.ffn_norm": (width,),
        "blk.0.attn_q": (width, width),
        "blk.0.attn_k": (width, width),
        "blk.0.attn_v": (width, width),
        "blk.0.attn_output": (width, width),
        "blk.0.ffn_gate": (inner, width),
        "blk.0.ffn_up": (inner, width),
        "blk.0.ffn_down": (width, inner),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
