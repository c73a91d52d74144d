"""Every bound on what a client may send, in one table. `docs` print it; each is tested at the limit
and one past it."""

BODY_BYTES = 4 * 1024 * 1024
JSON_DEPTH = 64
MESSAGES = 4096
CONTENT_PARTS = 4096
PROMPTS = 128
"""Prompts of one completions request."""
EMBEDDING_INPUTS = 2048
RERANK_DOCUMENTS = 2048
STOP_STRINGS = 16
STOP_STRING_BYTES = 256
"""Of `bad_words` too."""
TOOLS = 128
N = 128
LOGIT_BIAS_ENTRIES = 1024
TOP_LOGPROBS = 20
TOKEN_ID_MAX = 2**31 - 1
LISTED_TOKENS = 1024
"""Token ids of one field (`stop_token_ids`, `allowed_token_ids`, `logprob_token_ids`)."""
BAD_WORDS = 128
RAG_DOCUMENTS = 1024
"""`documents` of one chat request."""
TEMPLATE_VALUES = 64
"""`chat_template_kwargs` of one chat request."""
SCHEMA_BYTES = 64 * 1024
"""A JSON schema, a grammar, or the choices of one structured output."""
SCHEMA_DEPTH = 16
REGEX_BYTES = 4 * 1024
REGEX_STEPS = 16 * 1024
"""Characters of a regex once its counted repetitions are written out."""
MODEL_NAME_LENGTH = 256
SESSION_BYTES = 256
"""Of the header `X-Session-Id` and of `prompt_cache_key`."""
INT64_MAX = 2**63 - 1
INT64_MIN = -(2**63)

TEMPERATURE_MAX = 2.0
TOP_P_MAX = 1.0
PENALTY_MAX = 2.0
"""Presence and frequency penalties lie within minus this and this."""
REPETITION_PENALTY_MAX = 10.0
LENGTH_PENALTY_MAX = 10.0
"""Lies within minus this and this."""
TOP_K_MAX = 1_000_000

FORM_BYTES = 160 * 1024
"""A form, or whatever else is sent to a page: taking one apart costs a microsecond per byte at worst."""
HEADER_BLOCK_BYTES = 16 * 1024
HEADER_SECONDS = 10.0
"""A connection that has not sent a whole header after this is closed."""
BODY_SECONDS = 30.0
"""A body that is not complete this long after its header ends the connection."""
STALLED_SECONDS = 120.0
"""A client that takes nothing of its answer for so long is cut off."""
VANISHED_SECONDS = 14.0
"""As is one that does not confirm for so long that anything arrived."""

TEMPLATE_TOKENS = 1024
"""A prompt has at most as many tokens as its request has bytes, and these, which a template may add."""
UNKNOWN_CONTEXT = 131_072
"""Context length of a model whose engine has not told it yet, where the most is to be assumed."""
TRUE_UP_SECONDS = 1.0
"""Limits hear this often what an open stream has used so far."""

WORKERS_TRIED = 3
"""How many workers one request may try before its first byte."""
CONTINUATIONS = 3
"""How often one stream goes on with another worker after its first byte."""
