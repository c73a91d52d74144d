"""OpenAI's objects as clients send them, and what of them is passed on to an engine.

Unknown top-level fields are ignored and not forwarded. `null` means "not given". What would change
the answer is either honoured, or refused by name: `needs` lists the fields that only some engines
honour and that were given a value asking for something.
"""

from openai_api.protocol.call import Call
from openai_api.protocol.chat import ChatCompletionRequest
from openai_api.protocol.completions import CompletionRequest
from openai_api.protocol.embeddings import EmbeddingRequest
from openai_api.protocol.rerank import RerankRequest

__all__ = ["Call", "ChatCompletionRequest", "CompletionRequest", "EmbeddingRequest", "RerankRequest"]
