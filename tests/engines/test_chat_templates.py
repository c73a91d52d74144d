"""The library of chat templates: each renders a conversation as the model's authors write it down.

Rendered as the engine does it, sandbox and bounds included; the sources are named in the templates.
"""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from inference.engines.base import BadRequest
from inference.engines.transformers.prompt import Prompts
from inference.engines.transformers.rendering import refused_by
from registry import chat_templates
from tests.engines.tiny_model import make_tiny_tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "Hello!"},
    {"role": "assistant", "content": "Hi there."},
    {"role": "user", "content": "Who are you?"},
]
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)

PLAIN = {
    "alpaca": f"<s>{ALPACA}\n\n### Instruction:\nHello!\n\n### Response:\nHi there.</s>\n\n"
    "### Instruction:\nWho are you?\n\n### Response:\n",
    "chatglm2": "[Round 1]\n\n问：Hello!\n\n答：Hi there.\n\n[Round 2]\n\n问：Who are you?\n\n答：",
    "chatml": "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\nHi there.<|im_end|>\n"
    "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n",
    "deepseek-llm": "<s>User: Hello!\n\nAssistant: Hi there.</s>User: Who are you?\n\nAssistant:",
    "gemma": "<s><start_of_turn>user\nHello!<end_of_turn>\n<start_of_turn>model\nHi there.<end_of_turn>\n"
    "<start_of_turn>user\nWho are you?<end_of_turn>\n<start_of_turn>model\n",
    "llama-2": "<s>[INST] Hello! [/INST] Hi there. </s><s>[INST] Who are you? [/INST]",
    "llama-3": "<s><|start_header_id|>user<|end_header_id|>\n\nHello!<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHi there.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWho are you?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral-instruct": "<s> [INST] Hello! [/INST] Hi there.</s> [INST] Who are you? [/INST]",
    "openchat": "<s>GPT4 Correct User: Hello!<|end_of_turn|>GPT4 Correct Assistant: Hi there.<|end_of_turn|>"
    "GPT4 Correct User: Who are you?<|end_of_turn|>GPT4 Correct Assistant:",
    "phi-2": "Instruct: Hello!\nOutput: Hi there.\nInstruct: Who are you?\nOutput:",
    "phi-3": "<|user|>\nHello!<|end|>\n<|assistant|>\nHi there.<|end|>\n"
    "<|user|>\nWho are you?<|end|>\n<|assistant|>\n",
    "tulu": "<|user|>\nHello!\n<|assistant|>\nHi there.</s>\n<|user|>\nWho are you?\n<|assistant|>\n",
    "vicuna": f"<s>{VICUNA} USER: Hello! ASSISTANT: Hi there.</s>USER: Who are you? ASSISTANT:",
    "zephyr": "<|user|>\nHello!</s>\n<|assistant|>\nHi there.</s>\n"
    "<|user|>\nWho are you?</s>\n<|assistant|>\n",
}
"""TURNS, and the place for an answer."""

WITH_SYSTEM = {
    "alpaca": ("<s>" + ALPACA, "<s>Be brief."),
    "chatglm2": ("问：Hello!", "问：Be brief.\n\nHello!"),
    "chatml": (
        "<|im_start|>user\nHello!",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello!",
    ),
    "deepseek-llm": ("<s>User", "<s>Be brief.\n\nUser"),
    "gemma": ("user\nHello!", "user\nBe brief.\nHello!"),
    "llama-2": ("[INST] Hello!", "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHello!"),
    "llama-3": ("<s>", "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"),
    "mistral-instruct": ("[INST] Hello!", "[INST] Be brief.\n\nHello!"),
    "openchat": ("<s>", "<s>Be brief.<|end_of_turn|>"),
    "phi-2": ("Instruct: Hello!", "Be brief.\nInstruct: Hello!"),
    "phi-3": ("<|user|>\nHello!", "<|system|>\nBe brief.<|end|>\n<|user|>\nHello!"),
    "tulu": ("<|user|>\nHello!", "<|system|>\nBe brief.\n<|user|>\nHello!"),
    "vicuna": (VICUNA, "Be brief."),
    "zephyr": ("<|user|>\nHello!", "<|system|>\nBe brief.</s>\n<|user|>\nHello!"),
}
"""What a system message changes: this, once, becomes that."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> object:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tiny_tokenizer(folder, controls=["<s>", "</s>"])
    tokenizer = AutoTokenizer.from_pretrained(folder, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = None
    return tokenizer


async def rendered(tokenizer: object, name: str, messages: list[dict[str, str]]) -> str:
    prompts = Prompts(tokenizer, chat_templates.read(name))
    try:
        return prompts.text_of(await prompts.encode(messages), special_tokens=True)
    finally:
        prompts.close()


def test_each_template_has_its_golden_text():
    assert chat_templates.names() == tuple(PLAIN) == tuple(WITH_SYSTEM)


@pytest.mark.parametrize("name", PLAIN)
async def test_a_conversation_is_written_as_the_authors_write_it(tokenizer: object, name: str) -> None:
    assert refused_by(chat_templates.read(name)) is None
    assert await rendered(tokenizer, name, TURNS) == PLAIN[name]
    before, after = WITH_SYSTEM[name]
    assert await rendered(tokenizer, name, [SYSTEM, *TURNS]) == PLAIN[name].replace(before, after, 1)


@pytest.mark.parametrize("name", ["llama-2", "mistral-instruct", "gemma", "chatglm2"])
async def test_who_speaks_twice_in_a_row_is_refused_where_the_form_has_no_place_for_it(
    tokenizer: object, name: str
) -> None:
    with pytest.raises(BadRequest, match="must alternate"):
        await rendered(tokenizer, name, [TURNS[0], TURNS[0]])


def test_a_template_is_suggested_by_the_name():
    fits = {
        "lmsys/vicuna-7b-v1.5": "vicuna",
        "meta-llama/Llama-2-7b-chat-hf": "llama-2",
        "meta-llama/Llama-2-7b-hf": None,
        "meta-llama/Meta-Llama-3-8B-Instruct": "llama-3",
        "mistralai/Mixtral-8x7B-Instruct-v0.1": "mistral-instruct",
        "google/gemma-2b-it": "gemma",
        "google/gemma-2b": None,
        "zai-org/chatglm2-6b": "chatglm2",
        "Qwen/Qwen2.5-0.5B-Instruct": "chatml",
        "microsoft/Phi-3.5-mini-instruct": "phi-3",
        "HuggingFaceH4/zephyr-7b-beta": "zephyr",
        "/srv/models/of-mine": None,
    }
    assert {name: chat_templates.suggested(name) for name in fits} == fits
    assert chat_templates.suggested("of-mine", "hub:lmsys/vicuna-7b-v1.5@0") == "vicuna"


def test_a_text_is_known_again_and_a_faulty_one_is_told_with_its_line():
    assert chat_templates.name_of(chat_templates.read("zephyr") + "\n") == "zephyr"
    assert chat_templates.name_of("{{ messages }}") is None
    assert chat_templates.problem_of(chat_templates.read("zephyr")) is None
    assert chat_templates.problem_of("{% generation %}{% break %}{% endgeneration %}") is None
    said = chat_templates.problem_of("{{ messages }}\n{% for %}")
    assert said is not None
    assert said.startswith("line 2: ")
