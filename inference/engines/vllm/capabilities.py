"""Which fields of requests vLLM honours, in the words of the gateway."""

from __future__ import annotations

from inference.engines.vllm.arguments import Arguments
from inference.protocol import LORA

_SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "stop", "seed", "n", "logit_bias"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty"),
    *("stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens", "bad_words"),
    *("skip_special_tokens", "spaces_between_special_tokens", "allowed_token_ids"),
    *("truncate_prompt_tokens", "truncation_side", "repetition_detection"),
    *("logprobs", "top_logprobs", "prompt_logprobs", "logprob_token_ids"),
)
_SHAPE = (
    *("structured_outputs", "structured_outputs.regex"),
    *("structured_outputs.grammar", "structured_outputs.structural_tag"),
    *("response_format", "return_token_ids", "return_tokens_as_token_ids"),
    *("echo", "add_special_tokens", "add_generation_prompt", "continue_final_message"),
    *("documents", "chat_template_kwargs", "include_reasoning", "return_prompt_text"),
)
_TOOLS = ("tools", "tool_choice", "parallel_tool_calls")
_REASONING = ("reasoning_effort", "thinking_token_budget")


def capabilities(arguments: Arguments, *, chat: bool) -> frozenset[str]:
    """`chat`: the model has a template. Beam search is left out: one request could take all the memory."""
    found = {*_SAMPLING, *_SHAPE, "endpoint:completions", "endpoint:tokenize"}
    found.update(LORA + name for name in arguments.lora_adapters or ())
    if chat:
        found.add("endpoint:chat")
        if arguments.tool_call_parser is not None:
            found.update(_TOOLS)
        if arguments.reasoning_parser is not None:
            found.update(_REASONING)
    return frozenset(found)
